"""``run --diagnostics``: the norm of what a thinning keeps of each task vector, where the merge has not measured it.

One read of the inputs of every tensor that is thinned, when the output is done: the states of the tensors are in the
journal, and with them which elements were dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from mergepipe.pipeline.afterwards import Afterwards
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.events import Announcer, Note
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.memory import TENSORS_IN_FLIGHT, Ceiling
from mergepipe.pipeline.plan import Plan, Source
from mergepipe.pipeline.resume import Progress
from mergepipe.pipeline.rounds import SharedStates, groups
from mergepipe.pipeline.schedule import ScheduledTensor, schedule
from mergepipe.pipeline.vocabulary_rows import gathered_manifests
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.journal import Journal
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks import kept_norms
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.method import InPlace, Job, State
from mergepipe.tasks.nodes import Nowhere, TensorWork, WorkerBuffers
from mergepipe.tasks.registry import method as find_method
from mergepipe.tasks.sources import TensorSource


def stages_of(plan: Plan, workspace: Workspace) -> Iterator[tuple[Plan, Workspace]]:
    """The stages of a merge: a tensor is thinned in the first one that it goes through."""
    yield plan, workspace
    if plan.first_stage is not None:
        yield plan.first_stage, workspace.first_stage


def thinned(plan: Plan) -> dict[int, tuple[Job, InPlace]]:
    """By its number, how each tensor of which elements are dropped is thinned."""
    found = {}
    for number, tensor in enumerate(plan.tensors):
        if tensor.action == "merge":
            job = tensor.job(plan.seed)
            thin = kept_norms.thinning(job, find_method(tensor.method))
            if thin is not None:
                found[number] = job, thin
    return found


def cut(plan: Plan, ceiling: Ceiling) -> tuple[ScheduledTensor, ...]:
    """The plan in units, with room for a second tile in each worker, and for the sums.

    Raises
    ------
    MemoryBudgetError
        If they do not fit the ceiling; names the smallest one that would do.
    """
    jobs = [job for job, _ in thinned(plan).values()]
    tiles = [job.models * min(job.size, block_elements(job.shape)) * job.work.itemsize for job in jobs]
    sums = [16 * job.models * job.blocks for job in jobs]
    beside = ceiling.workers * max(tiles, default=0) + TENSORS_IN_FLIGHT * max(sums, default=0)
    gathered = (True,) * len(plan.models)
    return schedule(plan, replace(ceiling, reserved=ceiling.reserved + beside), gathered=gathered)


def add_to(record: dict[str, Any], found: Mapping[str, list[float]]) -> None:
    """Put what was found into a manifest."""
    tensors = record.setdefault("tensors", {})
    for name, norms in found.items():
        tensors[name] = {"device": "cpu", **tensors.get(name, {}), kept_norms.FOUND: norms}
    record["tensors"] = dict(sorted(tensors.items()))


class KeptSurvey:
    """What is kept of each tensor of one stage.

    Parameters
    ----------
    plan : Plan
    workspace : Workspace
        Locked by the caller; its journal is that of a run that has come to its end.
    ceiling : Ceiling
    stop : threading.Event
    announce : Announcer
    """

    def __init__(
        self, plan: Plan, workspace: Workspace, ceiling: Ceiling, stop: threading.Event, announce: Announcer
    ) -> None:
        self._plan = plan
        self._workspace = workspace
        self._ceiling = ceiling
        self._drivers = Drivers(stop, "`mergepipe run --diagnostics` on the same workspace goes on with it")
        self._announce = announce
        self._buffers = WorkerBuffers()

    def make(self) -> dict[str, list[float]]:
        """Find out what is not in the journal yet; what is known of each tensor, by its name.

        Raises
        ------
        Interrupted
            If it was stopped: what was found is kept.
        InputChangedError
            If an input is not what it was when the plan was made, or changes meanwhile: the same.
        """
        with closing(Journal(self._workspace.journal_file)) as journal:
            known = Progress.replay(journal.records)
            if known.plan != self._plan.id:
                self._announce(Note("norms of what was kept are not measured: the journal of the merge is gone"))
                return {}
            rounds = SharedStates(groups(self._plan), known.rounds)
            self._states = {
                number: state
                for number in thinned(self._plan)
                if not kept_norms.is_known(state := known.states.get(number) or rounds.state_of(number))
            }
            left = [number for number in self._states if number not in known.kept]
            if left:
                self._measure(left, journal, known)
            return {self._plan.tensors[number].name: known.kept[number] for number in self._states}

    def _measure(self, numbers: Sequence[int], journal: Journal, known: Progress) -> None:
        stores = [
            ChunkManifest.load(self._workspace.manifest_file(number, model.label))
            for number, model in enumerate(self._plan.models)
        ]
        self._manifests = gathered_manifests(self._workspace.vocabulary, self._plan.vocabulary, stores)
        self._afterwards = Afterwards(journal, known, Inputs.of(self._manifests), self._drivers)
        self._scheduled = cut(self._plan, self._ceiling)
        self._thinned = thinned(self._plan)
        nbytes = [self._plan.tensors[number].input_bytes() for number in numbers]
        self._announce(Note(f"measuring what is kept of {len(numbers)} tensors: {sum(nbytes):,} bytes to read"))
        files = CheckedFiles(root for manifest in self._manifests if (root := manifest.root) is not None)
        with closing(MmapReader(files=files)) as self._reader:
            self._afterwards.sweep(numbers, nbytes, self._work, self._ceiling.workers)

    def _work(self, number: int) -> TensorWork:
        tensor, (job, thin) = self._plan.tensors[number], self._thinned[number]
        return TensorWork(
            job,
            find_method(tensor.method),
            None if tensor.base is None else self._source(tensor.base, job),
            [self._source(source, job) for source in tensor.models],
            tensor.dtype,
            (),
            self._reader,
            Nowhere(),
            self._buffers,
            self._drivers.check_stop,
            lambda _stage, _nbytes: None,
            sweep_units=self._scheduled[number].units,
            on_state=partial(self._keep, number),
            shared=self._states[number],
            sweeps=(kept_norms.KeptNorms(thin),),
        )

    def _source(self, source: Source, job: Job) -> TensorSource:
        model = self._plan.models[source.model]
        found = TensorSource(model.reference or model.path, self._manifests[source.model], source.name, source.dtype)
        return found.adjusted(source.adjust, np.dtype(job.work), self._reader)

    def _keep(self, number: int, state: State) -> None:
        self._afterwards.keep({"type": "kept", "tensor": number, "found": state[kept_norms.FOUND].tolist()})
