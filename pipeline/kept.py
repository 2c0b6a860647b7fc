"""What a run keeps in its workspace, in bytes of disk at the most: the journal, and the statistics.

Both hold the states of tensors (see :mod:`mergepipe.tasks.method`), the journal as text. A state is a few numbers per
model and sweep, and what a sweep says that it leaves besides; histograms pass through it and are kept nowhere. So this
follows from the shapes, the method and the number of units, and no input can make it more. The log of events is not
counted: it promises nothing, and goes without what the disk has no room for.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from mergepipe.pipeline.kinds import kind_of
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.rounds import sweeps_ahead
from mergepipe.pipeline.schedule import ScheduledTensor
from mergepipe.storage.digest import GRAIN_BYTES
from mergepipe.storage.statistics import ROW_BYTES_KEPT, ROWS_PER_CHUNK
from mergepipe.tasks.method import Reduction, values_left
from mergepipe.tasks.registry import method as find_method

BLOCK_BYTES = 4096
"""What a small file takes on disk, and a folder."""

FOLDERS = 4
"""Above a chunk of a large statistic."""

UNIT_BYTES = 112
"""A unit in the journal, and the record of a commit that holds no other."""

STATE_BYTES, SWEEP_BYTES = 640, 128
"""The text around the numbers of a state, and what every sweep adds to it: names, types and shapes."""

MODEL_VALUES, SWEEP_VALUES = 8, 4
"""Numbers per model in a state, and how many every sweep adds."""

VALUE_BYTES = 11
"""Eight bytes in base 64."""

SHARD_BYTES, CHECKSUM_BYTES = 512, 12
"""The record of a sealed shard, and of each of its checksums."""

ROUND_BYTES = 64 * 1024
"""What rounds find that is the same for all tensors."""

MOST_ARRAYS = 16
"""Names of statistics that one merge may have."""

STATISTICS_VALUES = 12
"""Of the numbers per model in a state those that are statistics."""


@dataclass(frozen=True, slots=True)
class _State:
    """One tensor's part: text in the journal, a row of the small statistics, and files of its own for large ones."""

    text: int = 0
    row: int = 0
    files: int = 0


def kept_bytes(plan: Plan, scheduled: Sequence[ScheduledTensor]) -> int:
    """What the journal and the statistics of a plan, without those of its first stage, take when all is done.

    Parameters
    ----------
    plan : Plan
    scheduled : sequence of ScheduledTensor
        The plan as it is cut for the run: of more units there are more records.
    """
    ahead = sweeps_ahead(plan)
    jobs = {tensor.name: tensor.job(plan.seed) for tensor in plan.tensors if tensor.name in ahead}
    # A round gives every tensor of a group as much as the largest of them needs.
    padded = max((values_left(ahead[name], job) for name, job in jobs.items()), default=0)
    found: dict[Hashable, _State] = {}
    states = []
    for item in scheduled:
        sweeps = ahead.get(item.tensor.name, ())
        key = kind_of(item.tensor), len(sweeps)
        if key not in found:
            found[key] = _state(item, plan.seed, sweeps, padded)
        states.append(found[key])
    units = sum(len(item.units) for item in scheduled)
    journal = BLOCK_BYTES + UNIT_BYTES * units + sum(state.text for state in states)
    journal += sum(SHARD_BYTES + CHECKSUM_BYTES * -(-shard.size // GRAIN_BYTES) for shard in plan.layout().shards)
    journal += ROUND_BYTES if ahead else 0
    return _whole_blocks(journal) + _statistics_bytes(plan, states)


def _state(item: ScheduledTensor, seed: int, ahead: Sequence[Reduction], padded: int) -> _State:
    if item.tensor.action == "copy":
        return _State()
    job = item.tensor.job(seed)
    own = find_method(item.tensor.method).reductions(job)
    sweeps = len(own) + len(item.steps) + len(ahead)
    if not sweeps:
        return _State()
    left = values_left(own, job) + (2 * padded if ahead else 0)  # what a round gives is in its own record, too
    values = (MODEL_VALUES + SWEEP_VALUES * sweeps) * max(1, job.models) + left
    text = STATE_BYTES + SWEEP_BYTES * sweeps + VALUE_BYTES * values
    row = 8 * STATISTICS_VALUES * max(1, job.models)
    if 8 * left <= ROW_BYTES_KEPT:
        return _State(text, row + 8 * left)
    return _State(text, row, _whole_blocks(8 * left) + FOLDERS * BLOCK_BYTES)


def _statistics_bytes(plan: Plan, states: Sequence[_State]) -> int:
    names = sum(len(json.dumps(tensor.name)) + len("      ,\n") for tensor in plan.tensors)
    group = _whole_blocks(names + 1024) + BLOCK_BYTES
    if not any(state.row for state in states):
        return group
    chunks = -(-len(states) // ROWS_PER_CHUNK)
    # An array is two folders and its description; a chunk is a folder and a file, which is filled up.
    files = MOST_ARRAYS * (3 + 2 * chunks) * BLOCK_BYTES
    rows = len(states) * max(state.row for state in states)
    return group + files + rows + sum(state.files for state in states)


def _whole_blocks(nbytes: int) -> int:
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
