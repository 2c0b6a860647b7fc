"""Running a plan, or going on with it: Dask graphs over a thread pool, shards sealed as they fill, the index last.

The main thread only waits, so that it can be interrupted. A few driver threads take bundle after bundle and hand each
to Dask's threaded scheduler; all bundles share one pool. A finished unit is committed to the journal once it is
durable; a finished tensor leaves its statistics behind and counts down its shard (:mod:`mergepipe.pipeline.shards`).
Running again replays the journal and does the rest.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline import changes, devices, outputs, recheck, scoring, stages
from mergepipe.pipeline.admission import Admission
from mergepipe.pipeline.chain_run import earlier_first
from mergepipe.pipeline.diagnostics import Findings, remark
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.eventlog import EventLog
from mergepipe.pipeline.events import (
    Announcer,
    Listener,
    Note,
    RunFinished,
    RunStarted,
    TensorFinished,
    UnitFinished,
)
from mergepipe.pipeline.graph import MAX_BUNDLE_BYTES, Graph, bundles, count_tasks, run_bundle, tensor_graph
from mergepipe.pipeline.handover import check_command, hand_over, handed_record
from mergepipe.pipeline.inputs import check_inputs, mark_damage
from mergepipe.pipeline.masks import TaskMasks
from mergepipe.pipeline.measure import Meter
from mergepipe.pipeline.memory import TENSORS_IN_FLIGHT, Ceiling
from mergepipe.pipeline.move import move_output
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
from mergepipe.pipeline.schedule import ScheduledTensor, ceiling_of, held_for_matrices, is_resident
from mergepipe.pipeline.shards import Shards
from mergepipe.pipeline.side_heads import SideHeads
from mergepipe.pipeline.space import statistics_need
from mergepipe.pipeline.vocabulary_rows import gathered_manifests
from mergepipe.storage.atomic import no_room_errors
from mergepipe.storage.ballast import Ballast
from mergepipe.storage.journal import Journal, read_journal
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.statistics import StatisticsStore
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from mergepipe.storage.writer import SealedShard
from mergepipe.tasks.method import Job, MergeMethod, State
from mergepipe.tasks.nodes import MatrixWork, Nowhere, TensorCopy, TensorSource, TensorWork, WorkerBuffers
from mergepipe.tasks.registry import method as find_method
from mergepipe.tasks.rows_torch import Scorer

logger = logging.getLogger(__name__)

Verify = Literal["none", "sample", "full"]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind.

    Attributes
    ----------
    output : Path
        The merged checkpoint's folder.
    manifest : dict
        Contents of its `mergepipe_manifest.json`.
    """

    output: Path
    manifest: dict[str, Any]


@earlier_first
def run(
    work: str | Path = ".mergepipe",
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    device: str = "auto",
    reader: ReaderKind = "auto",
    sha256: bool = True,
    verify: Verify = "sample",
    restart: bool = False,
    on_shard: str | None = None,
    diagnostics: bool = False,
    stop: threading.Event | None = None,
    on_event: Listener | None = None,
) -> Result:
    """Carry out the plan of a workspace, or go on with it where an earlier run ended.

    Parameters
    ----------
    work : path
        The workspace that `build` wrote.
    out : path, optional
        The output folder, in place of the plan's: until work begins the output can be moved.
    memory : size, optional
        Ceiling of this run ("2GiB"); the plan's by default.
    workers : int, optional
        Threads that compute; one per processor by default.
    device : str
        'cpu', 'cuda', 'cuda:N', or 'auto' for the first GPU if there is one: where whole matrices are worked on, and
        rows scored (by 'auto' only if the ceiling has room for that).
    reader : {'auto', 'mmap', 'direct'}
        How inputs are read: through windows onto the page cache, or past it; past it where all filesystems allow that.
    sha256 : bool
        Whether to record the SHA-256 of each shard.
    verify : {'none', 'sample', 'full'}
        How much of the work of an earlier run is read back and checked before it is believed.
    restart : bool
        Forget the work of earlier runs.
    on_shard : str, optional
        A command for the shell that takes each complete shard over, `{path}` in it being the file; see
        :mod:`mergepipe.pipeline.handover`. Only a few unfinished shards take up disk space then.
    diagnostics : bool
        Read output and base once more in the end, and put into the manifest how each tensor has changed; see
        :mod:`mergepipe.pipeline.changes`. Of a merge that is finished, too.
    stop : threading.Event, optional
        Set it (from a signal handler, say) to end the run: units at work are finished and committed first.
    on_event : callable, optional
        Told what happens; see :mod:`mergepipe.pipeline.events`.

    Returns
    -------
    Result

    Raises
    ------
    WorkspaceError
        If there is no plan, or one of another version, or another process is at work on it; or if `out` is another
        folder than that in which work has begun.
    InputChangedError
        If an input file is no longer what it was when the plan was made.
    MemoryBudgetError, DiskFullError
        If the ceiling or the disk does not suffice.
    HandOverError
        If the command `on_shard` fails; the shard is kept.
    NonFiniteError
        If an input tensor holds a NaN or an infinity.
    Interrupted
        If the process was asked to stop; what was done is kept.
    """
    if on_shard is not None:
        check_command(on_shard)
    workspace = Workspace(Path(work))
    workspace.read_plan()  # says so if there is none; a lock needs a folder to be in
    log = EventLog(workspace.events_file, also=on_event)
    with no_room_errors(workspace.root), WorkspaceLock(workspace), log:
        announce = Announcer(log)
        plan = Plan.from_json(workspace.read_plan())
        _check_version(plan, workspace)
        if out is not None:
            plan = move_output(plan, workspace, out, restart=restart, handed_over=on_shard is not None)
        ended = stop or threading.Event()
        ceiling = ceiling_of(plan, memory, workers)
        if diagnostics:
            changes.check(plan, ceiling, on_shard)
        complete = None if restart else outputs.finished(plan)
        if complete is not None:
            _hand_over_single(plan, workspace, on_shard)
            if diagnostics and not changes.are_in(complete):
                at = devices.choose(device, complete["device"] if device == "auto" else None, needed=True)
                _compare(complete, plan, workspace, ceiling, at, ended, announce)
                outputs.replace_manifest(plan, complete)
            else:
                announce(Note(f"'{plan.output}' is complete already: nothing to do"))
            return Result(Path(plan.output), complete)
        if restart and workspace.begun():
            outputs.remove_work(plan)
            workspace.forget_progress()
        how = _How(ceiling, device, reader, sha256, on_shard, verify, ended)
        if plan.first_stage is None:
            manifest = _carry_out(plan, workspace, how, announce)
        else:
            first = _first_stage(plan, plan.first_stage, workspace, how, announce)
            manifest = stages.joined(_carry_out(plan, workspace, how, announce, stages.scaling(first)), first)
        if diagnostics:
            _compare(manifest, plan, workspace, ceiling, manifest["device"], ended, announce)
        outputs.publish(plan, manifest, workspace.beside)
        _hand_over_single(plan, workspace, on_shard)
        announce(RunFinished(plan.output, manifest["seconds"]))
    return Result(Path(plan.output), manifest)


def _compare(
    manifest: dict[str, Any],
    plan: Plan,
    workspace: Workspace,
    ceiling: Ceiling,
    device: str,
    stop: threading.Event,
    announce: Announcer,
) -> None:
    """Add to a manifest how the tensors have changed."""
    changes.add_to(manifest, changes.Survey(plan, workspace, ceiling, device, stop, announce).make())


@dataclass(frozen=True, slots=True)
class _How:
    """The options of a run that are the same for all its stages."""

    ceiling: Ceiling
    device: str
    reader: ReaderKind
    sha256: bool
    on_shard: str | None
    verify: Verify
    stop: threading.Event


def _first_stage(plan: Plan, first: Plan, workspace: Workspace, how: _How, announce: Announcer) -> dict[str, Any]:
    """Make what the plan reads, or find it made; its manifest."""
    record = stages.complete(first)
    made = record is None
    if record is None:
        ours = outputs.work_names(plan) if workspace.begun() else ()
        outputs.check_folder(Path(plan.output), stages.folders_read(plan), ours)
        workspace.first_stage.root.mkdir(exist_ok=True)
        record = _carry_out(first, workspace.first_stage, replace(how, on_shard=None), announce)
        outputs.publish(first, record, workspace.beside)
    stages.open_carried(plan, workspace, anew=made)
    return record


def _carry_out(
    plan: Plan, workspace: Workspace, how: _How, announce: Announcer, given: State | None = None
) -> dict[str, Any]:
    """Carry out one plan, up to its manifest."""
    with Meter() as meter:
        job = _Run(plan, workspace, how, announce, given or {})
        sealed = job.execute(how.verify)
    manifest = outputs.manifest(plan, sealed, job.findings.records, meter, job.workers, device=job.device)
    for number, entry in enumerate(manifest["shards"]):
        if number in job.shards.handed:
            entry["handed_over"] = True
    return manifest | (stages.norms(plan, job.squares) if plan.sidecar is None else {})


def _check_version(plan: Plan, workspace: Workspace) -> None:
    """A plan is carried out by the version that made it: another may merge the same recipe into other bytes."""
    if plan.version != version("mergepipe"):
        raise WorkspaceError(
            f"the plan in '{workspace.root}' was made by mergepipe {plan.version}, this is {version('mergepipe')}: "
            f"build it again, or finish it with the version that began it"
        )


def _hand_over_single(plan: Plan, workspace: Workspace, command: str | None) -> None:
    """A single file gets its name last of all, and is handed over after that."""
    if command is None or len(plan.groups) > 1:
        return
    with closing(Journal(workspace.journal_file)) as journal:
        if 0 not in Progress.replay(journal.records).handed:
            hand_over(command, Path(plan.output) / plan.layout().shards[0].file)
            journal.append([handed_record(0)])


class _Run:
    """One execution of one plan."""

    def __init__(
        self,
        plan: Plan,
        workspace: Workspace,
        how: _How,
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
        check_inputs(self.manifests)
        ceiling = how.ceiling
        self._allowed = ceiling.allowed
        self._reading = choose_reading(how.reader, plan, ceiling, self.manifests)
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
        self._lock = threading.Lock()
        self._works: dict[int, TensorWork | TensorCopy] = {}

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
            self._progress = self._resume(verify)
            self._settle_device()
            self.shards = self._new_shards()
            room = statistics_need(self.plan, self.workspace).nbytes
            with Ballast(self.workspace.ballast_file, room) as self._statistics.ballast:
                try:
                    self.shards.open()
                    self._heads.open()
                    self._masks.reserve(begun=self._has_output)
                    with devices.one_thread(self._whole or self._scorer is not None):
                        sealed = self._compute()
                finally:
                    self.shards.close()
                    self._statistics.flush()
            check_inputs(self.manifests)
            return sealed
        finally:
            self._masks.close()
            self._heads.close()
            self._reader.close()
            self._beside.close()
            self._journal.close()
            mark_damage(self.workspace, self.plan, self.manifests, self._reading.files.damaged)

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
        self.folder.mkdir(parents=True, exist_ok=True)
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
        damage = recheck.check(progress, self.plan, self.layout, self.folder, verify)
        if not damage:
            return
        record = damage.record()
        self._journal.append([record])
        progress.add(record)
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
        pool = ThreadPoolExecutor(self.workers, "mergepipe-worker")
        try:
            self.shards.start()
            self._make_rounds(pool)
            self._masks.open(self._rounds.state_of, begun=self._has_output)
            self._drivers.drive(self._bundles(), lambda bundle: self._run(bundle, pool), self._driver_count)
            self.shards.committer.commit()
            self._masks.finish()
            self._heads.write(self._reader)
            return self.shards.all_sealed()
        finally:
            pool.shutdown(cancel_futures=True)

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
        if self.on_shard is not None:
            self._todo.sort(key=self.shards.shard_of)

    def _bytes_left(self, number: int) -> int:
        item, rest = self.scheduled[number], self._rest[number]
        share = len(rest.units) / max(1, len(item.units))
        sweeps = 0.0 if number in self._progress.states else item.sweep_reads
        sweeps += sum(len(one.reductions(item.tensor.job(self.plan.seed))) for one in self._rounds.left_of(number))
        return int(item.tensor.input_bytes() * (sweeps + share) + item.tensor.output.nbytes * share)

    def _make_rounds(self, pool: ThreadPoolExecutor) -> None:
        """Find out what has to be known of the whole model, unless an earlier run has."""
        for which in self._rounds.left() if self._todo else ():
            group = self._rounds.groups[which[0]]
            one, items = group.rounds[which[1]], [self.scheduled[number] for number in group.numbers]
            pairs = zip(group.jobs, items, strict=True)
            tasks = [count_tasks(len(one.reductions(job)), len(item.units)) for job, item in pairs]
            cut = bundles(tasks, [item.tensor.input_bytes() for item in items])
            waiting = ([group.numbers[position] for position in bundle] for bundle in cut)
            self._drivers.drive(waiting, partial(self._sweep, which, pool), self._driver_count)
            self.shards.committer.record(round_record(*which, self._rounds.finish(which)))
        for number in (member for group in self._rounds.groups for member in group.numbers):
            if number not in self._progress.states:
                self.findings.keep(number, self._rounds.state_of(number))

    def _sweep(self, which: RoundId, pool: ThreadPoolExecutor, bundle: Sequence[int]) -> None:
        """One round over some tensors."""
        with self._element_wise:
            run_bundle([self._round_graph(which, number) for number in bundle], pool)

    def _round_graph(self, which: RoundId, number: int) -> Graph:
        def collect(state: State) -> None:
            self._statistics.put(number, state)
            self._rounds.collect(which, number, state)

        tensor, group = self.plan.tensors[number], self._rounds.groups[which[0]]
        job = group.jobs[group.numbers.index(number)]
        work = TensorWork(
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
        work.begin()
        return tensor_graph(tensor.name, work, lambda _name, _sweeps: work.end())

    def _bundles(self) -> Iterator[list[int]]:
        """Numbers of the tensors of each bundle; of one shard only where shards are handed over one by one."""
        for _, group in groupby(self._todo, lambda number: self.on_shard is None or self.shards.shard_of(number)):
            numbers = list(group)
            rest = [self._rest[number] for number in numbers]
            # A whole matrix has a bundle for itself: it waits for its memory alone.
            nbytes = [MAX_BUNDLE_BYTES + 1 if item.held else item.tensor.input_bytes() for item in rest]
            for bundle in bundles([item.tasks for item in rest], nbytes):
                chosen = [numbers[position] for position in bundle]
                for number in chosen:
                    self.shards.make_room(number)
                yield chosen

    def _run(self, bundle: Sequence[int], pool: ThreadPoolExecutor) -> None:
        """Make some tensors of the output."""
        with self._admitted(bundle):
            run_bundle([self._graph(number) for number in bundle], pool)

    def _admitted(self, bundle: Sequence[int]) -> AbstractContextManager[object]:
        """A whole matrix waits for its bytes, a bundle of other tensors for its turn."""
        held = sum(self.scheduled[number].held for number in bundle)
        return self._admission.holding(held) if held else self._element_wise

    def _graph(self, number: int) -> Graph:
        work = self._work(number)
        with self._lock:
            self._works[number] = work
        work.begin()
        return tensor_graph(self.plan.tensors[number].name, work, lambda _name, _units: self._finish(number))

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
        return tensor.job(self.plan.seed), find_method(tensor.method), base, models, tensor.dtype

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
        self._statistics.put(number, state)
        self._keep(number, state)
        self.shards.committer.add_record(state_record(number, state))

    def _keep(self, number: int, state: State) -> None:
        self.findings.keep(number, state)
        if "task_squares" in state:
            with self._lock:
                self.squares[number] = state

    def _finish(self, number: int) -> None:
        """A tensor is complete."""
        with self._lock:
            work = self._works.pop(number)
        work.end()
        logger.debug("'%s' is made", self.plan.tensors[number].name)
        self.announce(TensorFinished(self.plan.tensors[number].name))
        self.shards.finish(number)
