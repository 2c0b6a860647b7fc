"""One execution of one plan: Dask graphs over a thread pool, shards sealed as they fill.

The main thread only waits, so that it can be interrupted. A few driver threads take bundle after bundle and hand each
to Dask's threaded scheduler; all bundles share the workers, and the earlier one goes first. The reader hears of each
some bundles before its turn (:mod:`mergepipe.pipeline.upcoming`). A finished unit is committed to the journal once it
is durable; a finished tensor leaves its statistics behind and counts down its shard (:mod:`mergepipe.pipeline.shards`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from mergepipe.errors import Interrupted, WorkspaceError
from mergepipe.pipeline import devices, outputs, recheck, scoring, stages
from mergepipe.pipeline.admission import Admission
from mergepipe.pipeline.diagnostics import Findings, remark
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.events import (
    Announcer,
    Note,
    RunStarted,
    TensorFinished,
    UnitFinished,
)
from mergepipe.pipeline.graph import MAX_BUNDLE_BYTES, Graph, bundles, count_tasks, run_bundle, tensor_graph
from mergepipe.pipeline.inputs import Inputs, mark_damage
from mergepipe.pipeline.masks import TaskMasks
from mergepipe.pipeline.memory import TENSORS_IN_FLIGHT, Ceiling
from mergepipe.pipeline.plan import Plan, PlannedTensor, Source
from mergepipe.pipeline.reading import ReaderKind, choose_reading
from mergepipe.pipeline.resume import (
    Progress,
    begin_record,
    plan_record,
    remaining,
    round_record,
    state_record,
)
from mergepipe.pipeline.rounds import RoundId, SharedStates, groups
from mergepipe.pipeline.schedule import ScheduledTensor, held_for_matrices, is_resident
from mergepipe.pipeline.shards import Shards
from mergepipe.pipeline.side_heads import SideHeads
from mergepipe.pipeline.space import journal_room
from mergepipe.pipeline.upcoming import Upcoming, W
from mergepipe.pipeline.vocabulary_rows import gathered_manifests
from mergepipe.pipeline.workers import Workers, always
from mergepipe.storage.atomic import make_folder
from mergepipe.storage.ballast import Ballast
from mergepipe.storage.journal import Journal, read_journal
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.statistics import StatisticsStore
from mergepipe.storage.workspace import Workspace
from mergepipe.storage.writer import SealedShard
from mergepipe.tasks.copy_nodes import TensorCopy
from mergepipe.tasks.listed import Room
from mergepipe.tasks.matrix_nodes import MatrixWork
from mergepipe.tasks.method import Job, MergeMethod, State, lasting
from mergepipe.tasks.nodes import Nowhere, TensorWork, WorkerBuffers
from mergepipe.tasks.registry import method as find_method
from mergepipe.tasks.rows_torch import Scorer
from mergepipe.tasks.sources import TensorSource

logger = logging.getLogger(__name__)

Verify = Literal["none", "sample", "full"]


@dataclass(frozen=True, slots=True)
class How:
    """The options of a run that are the same for all its stages."""

    ceiling: Ceiling
    device: str
    reader: ReaderKind
    sha256: bool
    on_shard: str | None
    verify: Verify
    stop: threading.Event


class Execution:
    """One execution of one plan."""

    def __init__(
        self,
        plan: Plan,
        workspace: Workspace,
        how: How,
        announce: Announcer,
        given: State,
    ) -> None:
        self.plan = plan
        self.workspace = workspace
        self.announce = announce
        self._given = given
        self.workers = how.ceiling.workers
        self.sha256 = how.sha256
        self.on_shard = how.on_shard
        stores = [
            ChunkManifest.load(workspace.manifest_file(number, model.label)) for number, model in enumerate(plan.models)
        ]
        self.manifests = gathered_manifests(workspace.vocabulary, plan.vocabulary, stores)
        self._unchanged = Inputs.of(self.manifests)  # before anything is read of them
        ceiling = how.ceiling
        self._allowed = ceiling.allowed
        self._reading = choose_reading(how.reader, plan, ceiling, self.manifests)
        if self._reading.measured:
            announce(Note(self._reading.measured))
        self.scheduled = self._reading.scheduled
        self._whole = any(item.held for item in self.scheduled)
        self._asked_device = how.device
        self._staging = scoring.staging_bytes(plan)
        self._scoring = self._settle_scoring(ceiling, self._reading.gathered) if self._staging else "cpu"
        self._drivers = Drivers(how.stop, f"`mergepipe run --work {workspace.name}` goes on with it")
        self._admission = Admission(held_for_matrices(self.scheduled, ceiling.allowed), self._drivers.check_stop)
        self._element_wise = threading.BoundedSemaphore(TENSORS_IN_FLIGHT)
        self._reading = replace(self._reading, scheduled=self.scheduled)
        self._reader, self._pool_bytes = self._reading.open(), self._reading.pool
        self.layout = plan.layout()
        self.folder = Path(plan.output)
        self.squares: dict[int, State] = {}
        # What adjustments need is read while a unit's own windows are held: never from a direct reader's pool.
        self._beside = MmapReader(files=self._reading.files)
        self._buffers = WorkerBuffers()
        self._room = Room(max((item.listed for item in self.scheduled), default=0))
        self._lock = threading.Lock()

    def _settle_scoring(self, ceiling: Ceiling, gathered: Sequence[bool]) -> str:
        """Where rows are scored, and the schedule if that is not the CPU."""
        recorded = Progress.replay(read_journal(self.workspace.journal_file)).device
        room = partial(scoring.fits, self.plan, ceiling, gathered, staging=self._staging)
        device = scoring.device_for(self._asked_device, recorded, room, bound=not self._whole)
        if device != "cpu":
            self.scheduled = scoring.schedule_with(self.plan, ceiling, gathered, device, self._staging)
        elif not self._whole:
            self._asked_device = "cpu"
        return device

    def execute(self, verify: Verify) -> list[SealedShard]:
        """Do everything up to the sealing of the last shard."""
        self._journal = Journal(self.workspace.journal_file)
        self._masks = TaskMasks(self.plan)
        self._heads = SideHeads(self.plan, self.manifests)
        try:
            with self._unchanged.unchanged():
                self._progress = self._resume(verify)
                self._settle_device()
                self.shards = self._new_shards()
                return self._make()
        finally:
            self._masks.close()
            self._heads.close()
            self._reader.close()
            self._beside.close()
            self._journal.close()
            mark_damage(self.workspace, self.plan, self.manifests, self._reading.files.damaged)

    def _make(self) -> list[SealedShard]:
        """Make the output with all its space taken."""
        room = journal_room(self.plan, self.workspace, self.scheduled)
        with Ballast(self.workspace.ballast_file, room) as ballast:
            self._journal.ballast = self._statistics.ballast = ballast
            try:
                self.shards.open()
                self._heads.open()
                self._masks.reserve(begun=self._has_output)
                with devices.one_thread(self._whole or self._scorer is not None):
                    return self._compute()
            finally:
                self.shards.close()
                self._statistics.flush()

    def _resume(self, verify: Verify) -> Progress:
        """What earlier runs have done, and is still there to see."""
        progress = Progress.replay(self._journal.records)
        if progress.plan is not None and (progress.plan, progress.version) != (self.plan.id, self.plan.version):
            raise WorkspaceError(
                f"the unfinished work in '{self.workspace.name}' belongs to another plan or version "
                f"({progress.version}): finish it with that, or drop it with `mergepipe run --restart`"
            )
        torn = self._journal.torn_bytes
        began = progress.plan is not None
        # A journal torn in its first record is one whose run had found the folder empty.
        ours = outputs.work_names(self.plan) if began or torn else outputs.first_names(self.plan)
        outputs.check_folder(self.folder, stages.folders_read(self.plan), ours)
        outputs.sweep(self.plan)
        make_folder(self.folder)
        names = [tensor.name for tensor in self.plan.tensors]
        self._statistics = StatisticsStore(self.workspace.statistics, names, resume=began)
        self.findings = Findings(names, self._statistics, self._where)
        if torn:
            self.announce(Note(f"dropped a damaged end of {torn:,} bytes from the journal: that work is done again"))
        self._journal.append([begin_record()] if began else [plan_record(self.plan), begin_record()])
        if not began:
            return progress
        self._redo_damaged(progress, verify)
        done = progress.done_bytes(self.plan)
        self.announce(Note(f"going on with an earlier run: {done:,} of {self.layout.nbytes:,} bytes are done"))
        return progress

    def _settle_device(self) -> None:
        """Whole matrices are worked on, and rows scored, where earlier runs of this plan did."""
        recorded, needed = self._progress.device, self._whole or bool(self._staging)
        self.device = devices.choose(self._asked_device, recorded, needed=needed)
        if needed and recorded is None:
            self._journal.append([devices.device_record(self.device)])
        self._scorer: Scorer | None = None
        if self._scoring != "cpu":
            self._scorer = Scorer(self._scoring, max(self._staging.values()))

    def _redo_damaged(self, progress: Progress, verify: Verify) -> None:
        """Forget what can't be believed: first in the journal, then on disk, so that a name never stands for damage."""
        damage = recheck.check(progress, self.plan, self.layout, self.folder, verify, self._drivers.check_stop)
        if not damage:
            return
        record = damage.record()
        self._journal.append([record])
        progress.add(record)
        outputs.withdraw_index(self.plan)
        for shard in damage.shards:
            (self.folder / self.layout.shards[shard].file).unlink(missing_ok=True)
        for text in damage.notes:
            self.announce(Note(text))

    def _new_shards(self) -> Shards:
        return Shards(
            self.plan,
            self.layout,
            self._progress,
            self._journal,
            self._masks,
            self._drivers,
            self.announce,
            self._unchanged.check,
            workers=self.workers,
            sha256=self.sha256,
            on_shard=self.on_shard,
        )

    def _compute(self) -> list[SealedShard]:
        self._plan_rest()
        total = sum(item.bytes_read + item.tensor.output.nbytes for item in self.scheduled)
        left = sum(self._bytes_left(number) for number in self._todo)
        kind = type(self._reader).__name__
        logger.info(
            "%d of %d tensors to make, %d workers, %s", len(self._todo), len(self.scheduled), self.workers, kind
        )
        self.announce(RunStarted(total, len(self.scheduled), total - left, self._allowed))
        workers = Workers(self.workers)
        try:
            self.shards.start()
            self._make_rounds(workers)
            self._masks.open(self._rounds.state_of, begun=self._has_output)
            works = Upcoming(self._work)
            self._drivers.drive(self._bundles(works), partial(self._run, works, workers), self._driver_count)
            self.shards.commit()
            self._masks.finish()
            self._heads.write(self._reader)
            return self.shards.all_sealed()
        except Interrupted:
            workers.close()
            self.shards.drain()
            self._drivers.raise_failure()  # of what was still to be written
            raise
        finally:
            workers.close()

    @property
    def _has_output(self) -> bool:
        """Whether earlier runs have made some of it."""
        return bool(self._progress.written or self._progress.sealed)

    @property
    def _driver_count(self) -> int:
        """Bundles at work at once; whole matrices are admitted by their memory."""
        return max(TENSORS_IN_FLIGHT, self.workers if self._whole else 0)

    def _plan_rest(self) -> None:
        """Cut out what is done: `_todo` are the tensors left."""
        self._rounds = SharedStates(groups(self.plan), self._progress.rounds)
        self._todo: list[int] = []
        self._rest: dict[int, ScheduledTensor] = {}
        for number, item in enumerate(self.scheduled):
            state = self._progress.states.get(number)
            if state is not None:
                self._keep(number, state)
            if self.shards.is_sealed(number):
                continue
            rest = remaining(item, self._progress.written.get(number, ()))
            if rest.units or not item.units:
                self._todo.append(number)
                self._rest[number] = rest
                self.shards.expect(number)
        self._todo.sort(
            key=self.shards.place_of
        )  # in the order of the files, whose checksums are taken from the first byte on
        self._rank = {number: rank for rank, number in enumerate(self._todo)}

    def _bytes_left(self, number: int) -> int:
        item, rest = self.scheduled[number], self._rest[number]
        share = len(rest.units) / max(1, len(item.units))
        sweeps = 0.0 if number in self._progress.states else item.sweep_reads
        sweeps += sum(len(one.reductions(item.tensor.job(self.plan.seed))) for one in self._rounds.left_of(number))
        return int(item.tensor.input_bytes() * (sweeps + share) + item.tensor.output.nbytes * share)

    def _make_rounds(self, workers: Workers) -> None:
        """Find out what has to be known of the whole model, unless an earlier run has."""
        for which in self._rounds.left() if self._todo else ():
            group = self._rounds.groups[which[0]]
            one, items = group.rounds[which[1]], [self.scheduled[number] for number in group.numbers]
            pairs = zip(group.jobs, items, strict=True)
            tasks = [count_tasks(len(one.reductions(job)), len(item.units)) for job, item in pairs]
            cut = bundles(tasks, [item.tensor.input_bytes() for item in items])
            works = Upcoming(partial(self._round_work, which))
            waiting = works.in_sight([group.numbers[position] for position in bundle] for bundle in cut)
            self._drivers.drive(waiting, partial(self._sweep, works, workers), self._driver_count)
            self.shards.committer.add_record(round_record(*which, self._rounds.finish(which)))
            self.shards.commit()
        for number in (member for group in self._rounds.groups for member in group.numbers):
            if number not in self._progress.states:
                self.findings.keep(number, self._rounds.state_of(number))

    def _sweep(self, works: Upcoming[TensorWork], workers: Workers, bundle: Sequence[int]) -> None:
        """One round over some tensors."""
        with self._element_wise:
            graphs = (self._graph(number, works[number], partial(works.end, number)) for number in bundle)
            run_bundle(graphs, workers, bundle[0], self._at_hand(works, bundle))

    def _round_work(self, which: RoundId, number: int) -> TensorWork:
        def collect(state: State) -> None:
            self._statistics.put(number, lasting(state))
            self._rounds.collect(which, number, state)

        tensor, group = self.plan.tensors[number], self._rounds.groups[which[0]]
        job = group.jobs[group.numbers.index(number)]
        return TensorWork(
            *self._inputs(number),
            (),
            self._reader,
            Nowhere(),
            self._buffers,
            self._drivers.check_stop,
            self._reporter(number),
            sweep_units=self.scheduled[number].units,
            on_state=collect,
            resident=self._is_resident(number),
            shared=self._rounds.state_of(number),
            carried=self._carried(number),
            importances=[self._source(source, tensor.work) for source in tensor.importances],
            sweeps=group.rounds[which[1]].reductions(job),
            scorer=self._scorer,
        )

    def _bundles(self, works: Upcoming[TensorWork | TensorCopy]) -> Iterator[list[int]]:
        """Numbers of the tensors of each bundle, once there is room for its output."""
        for bundle in works.in_sight(self._cut()):
            for number in bundle:
                self.shards.make_room(number)
            yield bundle

    def _cut(self) -> Iterator[list[int]]:
        """Numbers of the tensors of each bundle; of one shard only where shards are handed over one by one."""
        for _, group in groupby(self._todo, lambda number: self.on_shard is None or self.shards.shard_of(number)):
            numbers = list(group)
            rest = [self._rest[number] for number in numbers]
            # A whole matrix has a bundle for itself: it waits for its memory alone.
            nbytes = [MAX_BUNDLE_BYTES + 1 if item.held else item.tensor.input_bytes() for item in rest]
            for bundle in bundles([item.tasks for item in rest], nbytes):
                yield [numbers[position] for position in bundle]

    def _run(self, works: Upcoming[TensorWork | TensorCopy], workers: Workers, bundle: Sequence[int]) -> None:
        """Make some tensors of the output."""
        with self._admitted(bundle):
            graphs = (self._graph(number, works[number], partial(self._finish, works, number)) for number in bundle)
            run_bundle(graphs, workers, self._rank[bundle[0]], self._at_hand(works, bundle))

    def _at_hand(self, works: Upcoming[W], bundle: Sequence[int]) -> Callable[[], bool]:
        """Whether what a bundle needs next is there.

        Tensors that share a bundle are small, and what they need is read together: they don't wait. Nor does anything
        beside whole matrices, whose panels may take all room for as long as one is worked on.
        """
        return works[bundle[0]].is_at_hand if len(bundle) == 1 and not self._whole else always

    def _admitted(self, bundle: Sequence[int]) -> AbstractContextManager[object]:
        """A whole matrix waits for its bytes, a bundle of other tensors for its turn."""
        held = sum(self.scheduled[number].held for number in bundle)
        return self._admission.holding(held) if held else self._element_wise

    def _graph(self, number: int, work: TensorWork | TensorCopy, done: Callable[[], None]) -> Graph:
        return tensor_graph(self.plan.tensors[number].name, work, lambda _name, _units: done())

    def _work(self, number: int) -> TensorWork | TensorCopy:
        stop = self._drivers.check_stop
        rest, tensor, report = self._rest[number], self.plan.tensors[number], self._reporter(number)
        sink = self.shards.sink(number)
        if tensor.action == "copy":
            assert tensor.base is not None, "a copied tensor has a source"
            return TensorCopy(self._source(tensor.base, tensor.work), rest.units, self._reader, sink, stop, report)
        kind = partial(MatrixWork, device=self.device) if self.scheduled[number].held else TensorWork
        return kind(
            *self._inputs(number),
            rest.units,
            self._reader,
            sink,
            self._buffers,
            stop,
            report,
            sweep_units=self.scheduled[number].units,
            state=self._progress.states.get(number),
            on_state=lambda state: self._found(number, state),
            resident=self._is_resident(number),
            shared={**self._rounds.state_of(number), **self._given_to(tensor)},
            carried=self._carried(number),
            scorer=self._scorer,
            importances=[self._source(source, tensor.work) for source in tensor.importances],
            room=self._room,
        )

    def _given_to(self, tensor: PlannedTensor) -> State:
        """What the first stage has to say to a tensor."""
        return self._given if stages.carries(tensor) else {}

    def _carried(self, number: int) -> TensorSource | None:
        tensor = self.plan.tensors[number]
        return None if tensor.carried is None else self._source(tensor.carried, tensor.work)

    def _where(self, number: int) -> str:
        """The device that a tensor is worked on with."""
        if self.scheduled[number].held:
            return self.device
        return self._scoring if number in self._staging else "cpu"

    def _inputs(self, number: int) -> tuple[Job, MergeMethod, TensorSource | None, list[TensorSource], str]:
        tensor = self.plan.tensors[number]
        base = None if tensor.base is None else self._source(tensor.base, tensor.work)
        models = [self._source(source, tensor.work) for source in tensor.models]
        job = replace(tensor.job(self.plan.seed), listed=self.scheduled[number].listed)
        return job, find_method(tensor.method), base, models, tensor.dtype

    def _reporter(self, number: int) -> Callable[[str, int], None]:
        name = self.plan.tensors[number].name
        return lambda stage, nbytes: self.announce(UnitFinished(name, stage, nbytes))

    def _is_resident(self, number: int) -> bool:
        return not self._reading.direct or is_resident(self.scheduled[number], self._pool_bytes)

    def _source(self, source: Source, work: str) -> TensorSource:
        model = self.plan.models[source.model]
        found = TensorSource(model.reference or model.path, self.manifests[source.model], source.name, source.dtype)
        return found.adjusted(source.adjust, np.dtype(work), self._beside)

    def _found(self, number: int, state: State) -> None:
        """The reductions of a tensor are done: keep what they found, here and for a resume."""
        if text := remark(self.plan.tensors[number].name, state):
            self.announce(Note(text))
        self._keep(number, state)
        self.shards.committer.add_record(state_record(number, state))

    def _keep(self, number: int, state: State) -> None:
        self.findings.keep(number, state)
        if "task_squares" in state:
            with self._lock:
                self.squares[number] = state

    def _finish(self, works: Upcoming[TensorWork | TensorCopy], number: int) -> None:
        """A tensor is computed."""
        works.end(number)
        name = self.plan.tensors[number].name
        logger.debug("'%s' is made", name)
        self.shards.when_written(number, lambda: self.announce(TensorFinished(name)))
