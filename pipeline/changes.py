"""``run --diagnostics``: what a merge has done to each tensor, from the finished output and the base or primary.

Two further reads of both, three where rows are wider than a block, and for every matrix the singular values of the
base. The output's bytes are final by then, so nothing of this can change one; it is asked of a run rather than of a
plan, and may be asked of a merge that is finished. Each tensor's findings go to the journal: a run that goes on makes
the rest.

The manifest's record of a tensor then has ``change``: ``norm`` and ``relative_norm`` of the difference, ``row_kl``, the
mean reverse divergence of the rows, ``entropy``, the mean change of their entropy, and for matrices ``rotation``, by
number of leading directions: the norm over the gap of singular values (:mod:`mergepipe.tasks.subspace.rotation`).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergepipe.errors import MemoryBudgetError, UsageError
from mergepipe.pipeline import devices
from mergepipe.pipeline.admission import Admission
from mergepipe.pipeline.afterwards import Afterwards
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.events import Announcer, Note
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.memory import MIB, TORCH_BYTES, Ceiling, TensorShape, UnitShape, blocks_in, most_workers
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.pipeline.resume import Progress
from mergepipe.storage.checkpoint import file_info
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.journal import Journal
from mergepipe.storage.manifest import ChunkManifest, ManifestArray
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks import change
from mergepipe.tasks.adjust import held_bytes
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.method import Job, State
from mergepipe.tasks.nodes import Nowhere, TensorWork, WorkerBuffers
from mergepipe.tasks.registry import method as find_method
from mergepipe.tasks.sources import TensorSource
from mergepipe.tasks.subspace.panels import Made, Span, blocks_of
from mergepipe.tasks.subspace.rotation import LEADING, gap_floats, gaps

if TYPE_CHECKING:
    import torch

CARRIER = "scf_rkl"
"""A method that sees two tensors as they are; its reductions and its kernel are not used."""


def compared(plan: Plan) -> list[int]:
    """Numbers of the tensors that can be compared with a base or primary."""
    return [
        number
        for number, tensor in enumerate(plan.tensors)
        if tensor.action == "merge" and tensor.base is not None and math.prod(tensor.shape) > 0
    ]


def check(plan: Plan, ceiling: Ceiling, on_shard: str | None) -> None:
    """Refuse what can't end well, before anything runs.

    Raises
    ------
    UsageError
        If files are handed over before they can be read again, or nothing was merged onto a base.
    MemoryBudgetError
        If a matrix does not fit the ceiling; names it and the smallest one that would do.
    """
    if on_shard is not None:
        raise UsageError("--diagnostics reads the output again, and --on-shard gives it away: leave one of them out")
    numbers = compared(plan)
    if not numbers:
        raise UsageError(
            f"--diagnostics compares the output with a base or primary, and '{plan.recipe['merge_method']}' was given "
            f"none here: leave it out"
        )
    matrices = [plan.tensors[number] for number in numbers if len(plan.tensors[number].shape) == 2]
    largest = max(matrices, key=_matrix_bytes, default=None)
    if largest is None:
        return
    needed = ceiling.reserved + TORCH_BYTES + _matrix_bytes(largest)
    if needed > ceiling.allowed:
        raise MemoryBudgetError(
            f"the singular values of '{largest.name}', which --diagnostics asks for, do not fit the memory ceiling of "
            f"{ceiling.allowed / MIB:,.0f} MiB; the smallest that would do is --memory {-(-needed // MIB)}MiB"
        )


def _work(tensor: PlannedTensor) -> np.dtype[Any]:
    """The type that output and base are compared in."""
    assert tensor.base is not None, "it is compared with one"
    return np.dtype("f8" if "F64" in (tensor.base.dtype, tensor.dtype) else "f4")


def _held(tensor: PlannedTensor) -> int:
    """What the adjustments of the base take."""
    assert tensor.base is not None, "it is compared with one"
    return held_bytes(tensor.base.adjust, tensor.shape, _work(tensor).itemsize)


def _job(tensor: PlannedTensor) -> Job:
    return Job(tensor.name, tensor.shape, 1, _work(tensor), {}, ({},))


def _shapes(tensor: PlannedTensor) -> tuple[UnitShape, TensorShape]:
    """A unit of one block, and what the reductions keep."""
    job, block = _job(tensor), block_elements(tensor.shape)
    shapes = [one.shapes(job)[1] for one in change.reductions(job)]
    kept = TensorShape(0, job.blocks * max(math.prod(row) for row in shapes if row is not None), _held(tensor))
    unit = UnitShape(block, 2, job.work.itemsize, 0, job.work.itemsize, find_method(CARRIER).scratch_rows, True)
    return unit, kept


def _has_room(plan: Plan, ceiling: Ceiling, workers: int) -> bool:
    """Whether so many workers can compare tensors under the ceiling: a merge may have taken more than that."""
    free, under = ceiling.allowed - ceiling.reserved, replace(ceiling, workers=workers)
    units = [_shapes(plan.tensors[number]) for number in compared(plan)]
    return all(under.smallest(unit, kept, unit.elements) <= free for unit, kept in units)


def _matrix_bytes(tensor: PlannedTensor) -> int:
    """What finding singular values takes."""
    return 8 * gap_floats(_matrix(tensor)) + _held(tensor)


def add_to(record: dict[str, Any], found: Mapping[str, dict[str, Any]]) -> None:
    """Put what was found into a manifest."""
    tensors = record.setdefault("tensors", {})
    for name, own in found.items():
        tensors[name] = {**tensors.get(name, {}), "change": own}
    record["tensors"] = dict(sorted(tensors.items()))


def are_in(record: Mapping[str, Any]) -> bool:
    """Whether a manifest has them already."""
    return any("change" in own for own in record.get("tensors", {}).values())


class Survey:
    """The comparison of one output with its base.

    Parameters
    ----------
    plan : Plan
    workspace : Workspace
        Locked by the caller.
    ceiling : Ceiling
    device : str
        Where singular values are found, as torch names it.
    stop : threading.Event
    announce : Announcer
    """

    def __init__(
        self,
        plan: Plan,
        workspace: Workspace,
        ceiling: Ceiling,
        device: str,
        stop: threading.Event,
        announce: Announcer,
    ) -> None:
        self._plan = plan
        self._workspace = workspace
        self._ceiling = replace(ceiling, workers=most_workers(ceiling.workers, partial(_has_room, plan, ceiling)))
        self._device = device
        self._drivers = Drivers(stop, f"`mergepipe run --diagnostics --work {workspace.root}` goes on with it")
        self._announce = announce
        self._reader = MmapReader()
        self._buffers = WorkerBuffers()
        self._output = _output_manifest(plan)
        self._bases = {
            number: ChunkManifest.load(workspace.manifest_file(number, plan.models[number].label))
            for number in {tensor.base.model for tensor in plan.tensors if tensor.base is not None}
        }
        self._inputs = Inputs.of(list(self._bases.values()))

    def make(self) -> dict[str, dict[str, Any]]:
        """Find out what is not in the journal yet; what is known of each tensor, by its name.

        Raises
        ------
        Interrupted
            If it was stopped: what was found is kept.
        InputChangedError
            If the base is not what it was when the plan was made, or changes meanwhile: the same.
        """
        with closing(self._reader), closing(Journal(self._workspace.journal_file)) as journal:
            self._known = Progress.replay(journal.records)
            self._afterwards = Afterwards(journal, self._known, self._inputs, self._drivers)
            numbers = compared(self._plan)
            left = [number for number in numbers if number not in self._known.changes]
            nbytes = sum(self._sweep_bytes(number) for number in left)
            self._announce(Note(f"comparing {len(left)} tensors with what they were: {nbytes:,} bytes to read"))
            self._afterwards.sweep(
                left,
                [self._plan.tensors[number].input_bytes() for number in left],
                self._comparison,
                self._ceiling.workers,
            )
            self._find_gaps([number for number in numbers if len(self._plan.tensors[number].shape) == 2])
            return {self._plan.tensors[number].name: self._found(number) for number in numbers}

    def _find_gaps(self, numbers: Sequence[int]) -> None:
        left = [number for number in numbers if number not in self._known.gaps]
        room = self._ceiling.allowed - self._ceiling.reserved - TORCH_BYTES
        admission = Admission(room, self._drivers.check_stop)
        with devices.one_thread(bool(left)):
            work = partial(self._decompose, admission)
            self._drivers.drive(([number] for number in left), work, min(self._ceiling.workers, max(1, len(left))))

    def _comparison(self, number: int) -> TensorWork:
        tensor = self._plan.tensors[number]
        return self._work(number, [self._base(tensor), self._merged(tensor)], partial(self._keep_change, number))

    def _work(self, number: int, sources: Sequence[TensorSource], on_state: Any = None) -> TensorWork:
        job = _job(self._plan.tensors[number])
        return TensorWork(
            job,
            find_method(CARRIER),
            sources[0] if len(sources) == 2 else None,
            sources[-1:],
            self._plan.tensors[number].dtype,
            (),
            self._reader,
            Nowhere(),
            self._buffers,
            self._drivers.check_stop,
            lambda _stage, _nbytes: None,
            sweep_units=self._units(number),
            on_state=on_state,
            sweeps=change.reductions(job) if on_state is not None else (),
        )

    def _units(self, number: int) -> tuple[tuple[int, int], ...]:
        tensor, job = self._plan.tensors[number], _job(self._plan.tensors[number])
        unit, kept = _shapes(tensor)
        wanted = blocks_in(self._plan.chunk_bytes, DTYPES[tensor.dtype].itemsize, unit.elements)
        step = self._ceiling.blocks_per_unit(unit, kept, wanted, unit.elements, tensor.name)
        return tuple((first, min(first + step, job.blocks)) for first in range(0, job.blocks, step))

    def _sweep_bytes(self, number: int) -> int:
        tensor = self._plan.tensors[number]
        assert tensor.base is not None, "it is compared with one"
        once = math.prod(tensor.shape) * (DTYPES[tensor.base.dtype].itemsize + DTYPES[tensor.dtype].itemsize)
        return once * len(change.reductions(_job(self._plan.tensors[number])))

    def _base(self, tensor: PlannedTensor) -> TensorSource:
        source = tensor.base
        assert source is not None, "it is compared with one"
        model = self._plan.models[source.model]
        found = TensorSource(model.reference or model.path, self._bases[source.model], source.name, source.dtype)
        return found.adjusted(source.adjust, _work(tensor), self._reader)

    def _merged(self, tensor: PlannedTensor) -> TensorSource:
        return TensorSource(self._plan.output, self._output, tensor.name, tensor.dtype)

    def _decompose(self, admission: Admission, bundle: Sequence[int]) -> None:
        import torch

        tensor = self._plan.tensors[bundle[0]]
        shape = _matrix(tensor)
        work = self._work(bundle[0], [self._base(tensor)])

        def panel(span: Span) -> torch.Tensor:
            self._drivers.check_stop()
            rows = work.decoded(blocks_of(shape, span))
            return torch.from_numpy(rows.reshape(-1, shape[1])).to(self._device)

        with admission.holding(_matrix_bytes(tensor)):
            like = torch.empty(0, dtype=torch.float64, device=self._device)
            self._afterwards.keep({"type": "gaps", "tensor": bundle[0], "found": gaps(Made(shape, panel), like)})

    def _keep_change(self, number: int, state: State) -> None:
        self._afterwards.keep({"type": "change", "tensor": number, "found": state["change"].tolist()})

    def _found(self, number: int) -> dict[str, Any]:
        """What the manifest says of a tensor."""
        values = dict(zip(change.FOUND, self._known.changes[number], strict=True))
        found: dict[str, Any] = {name: _finite(value) for name, value in values.items()}
        if number in self._known.gaps:
            pairs = zip(LEADING, self._known.gaps[number], strict=False)
            found["rotation"] = {str(k): _finite(values["norm"] / gap) if gap > 0 else None for k, gap in pairs}
        return found


def _matrix(tensor: PlannedTensor) -> tuple[int, int]:
    return tensor.shape[0], tensor.shape[1]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _output_manifest(plan: Plan) -> ChunkManifest:
    """Where the tensors of the output are; its only file has its final name last of all."""
    layout, folder = plan.layout(), Path(plan.output)
    files = []
    for shard in layout.shards:
        final = folder / shard.file
        files.append(file_info(final if final.exists() else final.with_name(f"{final.name}.part")))
    arrays = {
        place.name: ManifestArray(
            place.dtype, place.shape, place.shape,
            np.array([place.shard]), np.array([place.offset]), np.array([place.nbytes]),
        )
        for place in layout.places.values()
    }  # fmt: skip
    return ChunkManifest("virtual", tuple(files), arrays)
