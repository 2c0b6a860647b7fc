"""How a plan is cut into units under a memory ceiling: pure arithmetic, decided anew for every run.

A unit is a run of whole blocks, about `chunk_bytes` of output; it shrinks until all workers fit under the ceiling. The
cut changes no byte of the result, only how much memory and how many tasks it takes.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.graph import MAX_BUNDLE_BYTES, count_tasks
from mergepipe.pipeline.kinds import kind_of
from mergepipe.pipeline.machine import cpu_count
from mergepipe.pipeline.memory import (
    MIB,
    RESERVED_BYTES,
    TORCH_BYTES,
    Ceiling,
    MatrixShape,
    TensorShape,
    UnitShape,
    accumulator_bytes,
    blocks_in,
    matrix_bytes,
    most_workers,
    parse_bytes,
    projected_bytes,
)
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.pipeline.rounds import sweeps_ahead
from mergepipe.storage.direct import IO_THREADS, SLACK_BYTES
from mergepipe.storage.dtypes import DTYPES
from mergepipe.tasks.blocks import SAMPLED_AHEAD, block_elements
from mergepipe.tasks.method import Job, Reduction, expected_reads, values_listed
from mergepipe.tasks.registry import method as find_method
from mergepipe.tasks.subspace.panels import UNIT_ELEMENTS, blocks_of, panel_floats, spans

Ahead = Mapping[str, tuple[Reduction, ...]]
"""The sweeps of rounds, by name of the tensor."""

RESIDENT_SHARE = 2
"""How many tensor sets of its size a pool has to hold for one to be kept: one is computed while the next is read."""

SETS_KEPT = 3
"""How many such sets a pool has use for: two are at work, and the next is read. With fewer, some are read twice."""

TURNED = 2
"""How many times as much as streams at once a pool has use for where passes turn more than once: with one turn, less
reading does not pay for the first touch of more memory."""

MANY_TURNS = 8
"""Turns of all tensors together from which on it has use for all the room there is: each saves one read of what stays,
which takes about a fifth of the time of its first touch."""

COPIED_ELEMENTS = 4096
"""Units of copied tensors are multiples of this."""


@dataclass(frozen=True, slots=True)
class ScheduledTensor:
    """One tensor, cut into units.

    Attributes
    ----------
    tensor : PlannedTensor
    units : tuple of (int, int)
        First and one past the last block of each unit; elements instead of blocks for a tensor that is copied.
    sweeps : tuple of str
        Names of its reductions.
    projected : int
        Memory of the whole process while its units run.
    pool : int
        What is left for a direct reader's pool while its units run; 0 where inputs are mapped.
    steps : tuple of str
        What is done between reductions and output, for a method that looks at the whole matrix.
    held : int
        Bytes that a whole matrix has to be admitted for; 0 for all other tensors.
    rounds : tuple of str
        Names of the sweeps over it that come first, for what has to be known of the whole model.
    sweep_reads : float
        How often its own sweeps are expected to read it.
    streamed : int
        What a direct reader has use for while its units run one after another: one per worker, and one read ahead.
    listed : int
        Numbers that its sweeps may list, of which there is room for the most that any tensor has.
    """

    tensor: PlannedTensor
    units: tuple[tuple[int, int], ...]
    sweeps: tuple[str, ...]
    projected: int
    pool: int = 0
    steps: tuple[str, ...] = ()
    held: int = 0
    rounds: tuple[str, ...] = ()
    sweep_reads: float = 0.0
    streamed: int = 0
    listed: int = 0

    def of(self, tensor: PlannedTensor) -> ScheduledTensor:
        """Another tensor of the same kind, cut alike."""
        return ScheduledTensor(
            tensor,
            self.units,
            self.sweeps,
            self.projected,
            self.pool,
            self.steps,
            self.held,
            self.rounds,
            self.sweep_reads,
            self.streamed,
            self.listed,
        )

    @property
    def tasks(self) -> int:
        """Nodes of its graph."""
        own = count_tasks(len(self.sweeps), len(self.units), len(self.steps))
        return own + (count_tasks(len(self.rounds), len(self.units)) if self.rounds else 0)

    @property
    def bytes_read(self) -> int:
        """Bytes its sweeps and its kernel ask for; a repeated read may come from the page cache."""
        return int(self.tensor.input_bytes() * (len(self.rounds) + self.sweep_reads + 1 + bool(self.steps)))


def ceiling_of(plan: Plan, memory: str | int | None, workers: int | None) -> Ceiling:
    """The ceiling of a run, and the workers under it.

    Parameters
    ----------
    plan : Plan
    memory : size or None
        As it is asked for; else that of the plan.
    workers : int or None
        As many as are asked for; else one per processor, or as many as there is room for if those are fewer. All stages
        have the same number, and it depends on the plan alone: inputs count as gathered, which only a run can tell.
    """
    allowed = plan.allowed if memory is None else parse_bytes(memory)
    if workers:
        return Ceiling(allowed, workers)
    return Ceiling(allowed, most_workers(cpu_count(), lambda count: _has_room(plan, Ceiling(allowed, count))))


def _has_room(plan: Plan, ceiling: Ceiling) -> bool:
    """Whether every tensor of every stage fits, however inputs are read."""
    try:
        for stage in plan.stages:
            schedule(stage, ceiling, gathered=[True] * len(stage.models))
    except MemoryBudgetError:
        return False
    return True


def schedule(plan: Plan, ceiling: Ceiling, *, gathered: Sequence[bool] = ()) -> tuple[ScheduledTensor, ...]:
    """Cut every tensor of a plan into units.

    Parameters
    ----------
    plan : Plan
    ceiling : Ceiling
    gathered : sequence of bool
        For each model whether its units are gathered into buffers: a copy store whose chunks are separate files, or
        anything that a direct reader reads.

    Raises
    ------
    MemoryBudgetError
        If a unit of one block, or a whole matrix, does not fit; names it and the smallest ceiling that would do.
    """
    ahead = sweeps_ahead(plan)
    keys = [_key(tensor, plan, gathered, ahead.get(tensor.name, ())) for tensor in plan.tensors]
    first: dict[Hashable, PlannedTensor] = {}
    for key, tensor in zip(keys, plan.tensors, strict=True):
        first.setdefault(key, tensor)
    kinds = list(first.values())
    items = dict(zip(first, _beside_lists(kinds, plan, ceiling, gathered, ahead), strict=True))
    return tuple(items[key].of(tensor) for key, tensor in zip(keys, plan.tensors, strict=True))


def _beside_lists(
    tensors: Sequence[PlannedTensor], plan: Plan, ceiling: Ceiling, gathered: Sequence[bool], ahead: Ahead
) -> list[ScheduledTensor]:
    """The first tensor of each kind, cut so that each leaves room for what another one may list meanwhile.

    Where one does not, none lists anything.
    """
    items = _schedule(tensors, plan, ceiling, gathered, ahead)
    most = max((item.listed for item in items), default=0)
    found = []
    for item in items:
        more = 4 * (most - item.listed)
        if item.pool - more < min(item.pool, item.streamed):
            return _schedule(tensors, plan, ceiling, gathered, ahead, lists=False)
        found.append(replace(item, projected=item.projected + more, pool=item.pool - more))
    return found


def _key(tensor: PlannedTensor, plan: Plan, gathered: Sequence[bool], ahead: Sequence[Reduction]) -> Hashable:
    """Equal for tensors that are cut alike."""
    rounds: tuple[Hashable, ...] = ()
    if ahead:
        job = tensor.job(plan.seed)
        rounds = tuple((sweep.name, sweep.shapes(job)) for sweep in ahead)
    return kind_of(tensor), _gathers(tensor, plan, gathered), rounds


def _schedule(
    tensors: Sequence[PlannedTensor],
    plan: Plan,
    ceiling: Ceiling,
    gathered: Sequence[bool],
    ahead: Ahead,
    *,
    lists: bool = True,
) -> list[ScheduledTensor]:
    """The first tensor of each kind, cut into units."""
    if plan.vocabulary is not None:
        beside = plan.vocabulary.reserved_bytes(max(ceiling.workers, IO_THREADS))
        ceiling = replace(ceiling, reserved=ceiling.reserved + beside)
    found = {tensor.name: _matrix(tensor, plan, gathered, ceiling.workers, ahead) for tensor in tensors}
    whole = {name: shape for name, shape in found.items() if shape is not None}
    if not whole:
        try:
            return [_cut(tensor, plan, ceiling, gathered, ahead, lists) for tensor in tensors]
        except MemoryBudgetError:
            worst = max(tensors, key=lambda tensor: _smallest(tensor, plan, ceiling, gathered, ahead))
            _cut(worst, plan, ceiling, gathered, ahead)  # names the ceiling that would do for all
            raise
    # The largest matrix is set apart first: element-wise tensors, whose units can shrink, share the rest.
    needs = {name: matrix_bytes(shape, ceiling.workers) for name, shape in whole.items()}
    largest = max(needs, key=lambda name: needs[name])
    rest = replace(ceiling, reserved=ceiling.reserved + TORCH_BYTES + needs[largest])
    all_gathered = [True] * len(plan.models)  # how they are read is known only when the plan is run
    others = [tensor for tensor in tensors if tensor.name not in whole]
    smallest = rest.reserved + max(
        (_smallest(tensor, plan, ceiling, all_gathered, ahead) for tensor in others), default=0
    )
    if smallest > ceiling.allowed:
        raise MemoryBudgetError(
            f"'{largest}' is worked on as a whole matrix and does not fit the memory ceiling: it takes "
            f"{needs[largest] / MIB:,.0f} MiB, {ceiling.allowed / MIB:,.0f} MiB are allowed for everything; the "
            f"smallest ceiling that would do is --memory {-(-smallest // MIB)}MiB; or lower the rank, or exclude it"
        )
    return [
        _whole(tensor, plan, ceiling, whole[tensor.name], ahead)
        if tensor.name in whole
        else _cut(tensor, plan, rest, gathered, ahead, lists)
        for tensor in tensors
    ]


def held_for_matrices(scheduled: Sequence[ScheduledTensor], allowed: int) -> int:
    """Bytes that matrices in flight may take together: what is left beside the program and element-wise tensors."""
    largest = max((item.held for item in scheduled), default=0)
    beside = max(
        (item.projected - largest for item in scheduled if not item.held), default=RESERVED_BYTES + TORCH_BYTES
    )
    return max(largest, allowed - beside)


def _whole(tensor: PlannedTensor, plan: Plan, ceiling: Ceiling, shape: MatrixShape, ahead: Ahead) -> ScheduledTensor:
    """A whole matrix: its units are panels of its own shape, whatever the chunk size and the ceiling."""
    job = tensor.job(plan.seed)
    method = find_method(tensor.method)
    matrix = method.whole(job)
    assert matrix is not None, "looked at before"
    rows = (tensor.shape[0], tensor.shape[1])
    units = tuple(blocks_of(rows, span) for span in spans(rows, UNIT_ELEMENTS))
    held = matrix_bytes(shape, ceiling.workers)
    projected = ceiling.reserved + TORCH_BYTES + held
    sweeps = method.reductions(job)
    return ScheduledTensor(
        tensor,
        units,
        tuple(sweep.name for sweep in sweeps),
        projected,
        ceiling.allowed - projected,
        steps=matrix.steps(job),
        held=held,
        rounds=tuple(sweep.name for sweep in ahead.get(tensor.name, ())),
        sweep_reads=expected_reads(sweeps, job),
    )


def _matrix(
    tensor: PlannedTensor, plan: Plan, gathered: Sequence[bool], workers: int, ahead: Ahead
) -> MatrixShape | None:
    """What a tensor's memory depends on if its method looks at it whole, else None."""
    if tensor.action == "copy":
        return None
    job = tensor.job(plan.seed)
    matrix = find_method(tensor.method).whole(job)
    if matrix is None:
        return None
    rows = (tensor.shape[0], tensor.shape[1])
    unit, kept, _ = _unit(tensor, plan, gathered, ahead)
    # With nothing to thin or merge, a panel is made from the base and one model, and rows of the output from the base.
    thins = job.sparsify != "none" or matrix.merges
    # Whether windows are gathered is known only when the plan is run, and units can't shrink: they count as gathered.
    unit = replace(unit, elements=panel_floats(rows, UNIT_ELEMENTS), gathered=True)
    return MatrixShape(
        held=matrix.peak(job),
        unit_elements=unit.elements,
        output_itemsize=unit.output_itemsize,
        unit_bytes=projected_bytes(replace(unit, output_itemsize=0, inputs=unit.inputs if thins else 1)),
        panel_bytes=panel_floats(rows) * (unit.inputs if thins else 2) * unit.input_itemsize,
        kept=accumulator_bytes(kept, workers) + kept.held,
    )


def _smallest(tensor: PlannedTensor, plan: Plan, ceiling: Ceiling, gathered: Sequence[bool], ahead: Ahead) -> int:
    """Bytes that an element-wise tensor takes at the least."""
    if tensor.action == "copy":
        unit = _copied_unit(tensor, plan, gathered)
        return ceiling.smallest(unit, TensorShape(0, 0), unit.elements)
    unit, kept, block = _unit(tensor, plan, gathered, ahead)
    return ceiling.smallest(unit, kept, block)


def pool_bytes(scheduled: Sequence[ScheduledTensor]) -> int:
    """Memory for a direct reader's pool: what it has use for, of what every tensor leaves for it.

    The first touch of a page costs more than reading into it does, so a large ceiling is no reason for a large pool.
    """
    room = min((item.pool for item in scheduled), default=0)
    inputs = sum(_resident_bytes(item.tensor, len(item.units)) for item in scheduled)
    turns = sum(_turns(item) for item in scheduled if not is_resident(item, room))
    use = room if turns >= MANY_TURNS else max((_useful_bytes(item, room) for item in scheduled), default=0)
    return max(0, min(room, inputs, max(use, SETS_KEPT * MAX_BUNDLE_BYTES)))


def _useful_bytes(item: ScheduledTensor, room: int) -> int:
    """What a pool of at most `room` bytes has use for; a solver's panels are read again and again."""
    if item.held:
        return room
    if is_resident(item, room):
        return SETS_KEPT * _resident_bytes(item.tensor, len(item.units))
    return item.streamed * (TURNED if _turns(item) > 1 else 1)


def _turns(item: ScheduledTensor) -> int:
    """How often one pass turns into the next, or the last into the output: what is still there is not read again.

    A solver's panels are read in an order of their own.
    """
    return 0 if item.steps else int(item.sweep_reads)


def is_resident(item: ScheduledTensor, pool: int) -> bool:
    """Whether a direct reader can keep all of a tensor's inputs, and those of others beside, until the last use."""
    return _fits(_resident_bytes(item.tensor, len(item.units)), pool)


def _fits(nbytes: int, pool: int) -> bool:
    return RESIDENT_SHARE * nbytes <= pool


def disk_bytes_read(item: ScheduledTensor, pool: int) -> int:
    """Bytes that a direct reader reads for a tensor, if it is not disturbed.

    Once for each round, and once for all else if that is kept; if not, once for each pass, less what the pool still
    holds where one pass turns into the next.
    """
    once = item.tensor.input_bytes() * (len(item.rounds) + 1)
    return once if is_resident(item, pool) else item.bytes_read - _turns(item) * _kept_bytes(item, pool)


def _kept_bytes(item: ScheduledTensor, pool: int) -> int:
    """What the pool holds of a tensor when a pass turns: as many units as fit beside what the next tensor has there."""
    first, last = item.units[0], item.units[-1]
    nbytes = item.tensor.input_bytes() * (first[1] - first[0]) // last[1]
    if not nbytes:
        return 0
    sampled = int(SAMPLED_AHEAD * nbytes * (item.sweep_reads % 1))
    kept = max(0, pool - sampled) // (nbytes + len(item.tensor.sources) * SLACK_BYTES) * nbytes
    return min(kept, item.tensor.input_bytes())


def _resident_bytes(tensor: PlannedTensor, units: int) -> int:
    """What all inputs of a tensor take in a pool."""
    windows = units * max(1, len(tensor.sources))
    return tensor.input_bytes() + windows * SLACK_BYTES


def _cut(
    tensor: PlannedTensor,
    plan: Plan,
    ceiling: Ceiling,
    gathered: Sequence[bool],
    ahead: Ahead,
    lists: bool = True,
) -> ScheduledTensor:
    size = int(np.prod(tensor.shape, dtype=np.int64))
    itemsize = DTYPES[tensor.dtype].itemsize
    if tensor.action == "copy":
        unit, none = _copied_unit(tensor, plan, gathered), TensorShape(0, 0)
        wanted = plan.chunk_bytes // itemsize // unit.elements
        step = unit.elements * ceiling.blocks_per_unit(unit, none, wanted, unit.elements, tensor.name)
        units = tuple((start, min(start + step, size)) for start in range(0, size, step))
        unit = replace(unit, elements=min(step, size))
        projected, pool = ceiling.projected(unit, none), ceiling.pool_bytes(unit, none)
        return ScheduledTensor(tensor, units, (), projected, pool, streamed=ceiling.streamed_bytes(unit))
    job = tensor.job(plan.seed)
    unit, kept, block = _unit(tensor, plan, gathered, ahead, job)
    step = ceiling.blocks_per_unit(unit, kept, blocks_in(plan.chunk_bytes, itemsize, block), block, tensor.name)
    step = min(step, max(1, job.blocks))
    units = tuple((first, min(first + step, job.blocks)) for first in range(0, job.blocks, step))
    full = replace(unit, elements=min(step * block, max(1, size)))
    streamed = ceiling.streamed_bytes(full)
    # Lists save a read of what can't be kept, wherever the pool can do without the room they take.
    listing = replace(job, listed=_listed(job, tensor))
    _, wider, _ = _unit(tensor, plan, gathered, ahead, listing)
    kept_whole = _fits(_resident_bytes(tensor, len(units)), ceiling.pool_bytes(full, kept))
    if lists and wider.listed and not kept_whole and ceiling.pool_bytes(full, wider) >= streamed:
        job, kept = listing, wider
    sweeps = find_method(tensor.method).reductions(job)
    names = tuple(sweep.name for sweep in sweeps)
    rounds = tuple(sweep.name for sweep in ahead.get(tensor.name, ()))
    projected, pool = ceiling.projected(full, kept), ceiling.pool_bytes(full, kept)
    return ScheduledTensor(
        tensor,
        units,
        names,
        projected,
        pool,
        rounds=rounds,
        sweep_reads=expected_reads(sweeps, job),
        streamed=streamed,
        listed=job.listed,
    )


def _listed(job: Job, tensor: PlannedTensor) -> int:
    """What the sweeps of a tensor would list if there were room for everything."""
    unbounded = replace(job, listed=sys.maxsize)
    return values_listed(find_method(tensor.method).reductions(unbounded), unbounded)


def _copied_unit(tensor: PlannedTensor, plan: Plan, gathered: Sequence[bool]) -> UnitShape:
    """The smallest unit of a copied tensor, which needs no tiles."""
    itemsize = DTYPES[tensor.dtype].itemsize
    return UnitShape(COPIED_ELEMENTS, 1, itemsize, itemsize, 0, 0, _gathers(tensor, plan, gathered))


def _unit(
    tensor: PlannedTensor, plan: Plan, gathered: Sequence[bool], ahead: Ahead, job: Job | None = None
) -> tuple[UnitShape, TensorShape, int]:
    """A unit of one block, what the reductions keep, and the elements of a block."""
    itemsize = DTYPES[tensor.dtype].itemsize
    job = tensor.job(plan.seed) if job is None else job
    method = find_method(tensor.method)
    sweeps = (*ahead.get(tensor.name, ()), *method.reductions(job))
    shapes = [sweep.shapes(job) for sweep in sweeps]
    kept = TensorShape(
        counts=max((_length(counts) for counts, _ in shapes), default=0),
        blocks=job.blocks * max((_length(row) for _, row in shapes), default=0),
        held=tensor.held_bytes(),
        listed=values_listed(sweeps, job),
    )
    block = block_elements(tensor.shape)
    unit = UnitShape(
        elements=block,
        inputs=len(tensor.sources),
        input_itemsize=max(DTYPES[source.dtype].itemsize for source in tensor.sources),
        output_itemsize=itemsize,
        work_itemsize=job.work.itemsize,
        scratch_rows=method.scratch_rows,
        gathered=_gathers(tensor, plan, gathered),
    )
    return unit, kept, block


def _gathers(tensor: PlannedTensor, plan: Plan, gathered: Sequence[bool]) -> bool:
    """Whether any input of a tensor is gathered into buffers."""
    if plan.vocabulary is None and not any(gathered):
        return False
    return any(plan.is_gathered(source) or (bool(gathered) and gathered[source.model]) for source in tensor.sources)


def _length(shape: tuple[int, ...] | None) -> int:
    return 0 if shape is None else int(np.prod(shape, dtype=np.int64))
