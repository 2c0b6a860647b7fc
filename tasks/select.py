"""Exact order statistics of a tensor that is never held: counting the bits of magnitudes, 16 at a time.

Non-negative floats order as their bit patterns do. One sweep counts how often each pattern of the top 15 bits occurs
(:class:`Coarse`); the counts say which of these bins holds a wanted rank; the next sweep counts the following 16 bits
inside that bin (:class:`Refine`), and so on until no bit is left: two sweeps for float32, four for float64. Counts are
integers, so how the tensor was cut and who counted which piece makes no difference. Several ranks per model are
followed in the same sweeps.

A *selection* lives in the state under its stage name, one row per model, one column per rank: ``_<stage>_found`` is the
pattern found so far (-1 for a rank that is not wanted), ``_<stage>_rank`` the rank among the elements of that pattern,
``_<stage>_equal`` how many there are, ``_<stage>_level`` how many levels are done. Entries with a leading underscore
are for the reductions that follow; the others are results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergepipe.tasks import fused_counts, kernels
from mergepipe.tasks.blocks import Blocks, block_edges
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, State, StoredSweep, Tile

TOP_BINS = 1 << 15
"""Patterns of the top 15 bits of a magnitude; the sign bit is masked."""

FINE_BINS = 1 << 16

LOOK = 64
"""Elements looked at together for a match: where none matches, which is the rule, one vector test has told so."""

MANY = 24
"""Matches among these from which on a branch per element is foretold too badly, and they are gathered without one."""

After = Callable[[Job, State], State]
"""What a reduction's owner makes of the state once it is in: more entries."""


def nothing_after(job: Job, state: State) -> State:
    """The :data:`After` that adds nothing."""
    return {}


def levels(work: np.dtype[Any]) -> int:
    """How many levels of 16 bits a magnitude of the working type has: 2 for float32, 4 for float64."""
    return work.itemsize // 2


def order_keys(values: Array) -> Array:
    """The same memory as signed integers of the same width; without the sign bit they order as magnitudes do."""
    return values.view(np.int32 if values.dtype.itemsize == 4 else np.int64)


def magnitudes(keys: Array, work: np.dtype[Any]) -> Array:
    """The magnitudes whose bit patterns `keys` (int64) are, as float64.

    Examples
    --------
    >>> magnitudes(np.array([0x3F800000, 0x40000000]), np.dtype("float32")).tolist()
    [1.0, 2.0]
    """
    return keys.astype(np.int32 if work.itemsize == 4 else np.int64).view(work).astype(np.float64)


@kernel
def _count_top(keys: Array, mask: Any, shift: int, counts: Array) -> None:
    for i in range(keys.size):
        counts[np.uintp((keys[i] & mask) >> shift)] += 1


@kernel
def count_between(keys: Array, mask: Any, low: Any, high: Any, shift: int, counts: Array) -> None:
    """Count 16 bits, `shift` from the right, of those `keys` that lie from `low` to `high` once `mask` is applied."""
    matches = np.empty(LOOK, np.int32)
    for start in range(0, keys.size, LOOK):
        piece = keys[start : start + LOOK]
        found = np.int32(0)
        for i in range(piece.size):
            key = piece[i] & mask
            found += np.int32((key >= low) & (key <= high))
        if found > MANY:
            next_match = np.int64(0)
            for i in range(piece.size):
                key = piece[i] & mask
                matches[next_match] = (key >> shift) & 0xFFFF
                next_match += np.int64((key >= low) & (key <= high))
            for i in range(found):
                counts[np.uintp(matches[i])] += 1
        elif found:
            for i in range(piece.size):
                key = piece[i] & mask
                if (key >= low) & (key <= high):
                    counts[np.uintp((key >> shift) & 0xFFFF)] += 1


def locate(counts: Array, rank: int) -> tuple[int, int, int]:
    """Bin that holds the element of 0-based ascending `rank`, its rank inside the bin, and the size of the bin."""
    ends = np.cumsum(counts)
    where = int(np.searchsorted(ends, rank, side="right"))
    size = int(counts[where])
    return where, rank - (int(ends[where]) - size), size


def count_top(values: Array, counts: Array) -> None:
    """Count the top 15 bits of each magnitude of `values`, shape (n,), into `counts`, shape (32768,)."""
    keys = order_keys(values)
    _count_top(keys, keys.dtype.type(np.iinfo(keys.dtype).max), keys.dtype.itemsize * 8 - 16, counts)


def bin_bounds(found: int, level: int, work: np.dtype[Any]) -> tuple[int, int, int]:
    """Smallest and largest key of the bin `found` after `level` levels, and the shift of the next 16 bits."""
    shift = 16 * (levels(work) - 1 - level)
    low = found << (shift + 16)
    return low, low + (1 << (shift + 16)) - 1, shift


def count_fine(values: Array, found: int, level: int, counts: Array) -> None:
    """Count the 16 bits that follow the bin `found`, of those of `values`, shape (n,), inside it; `level` are done."""
    keys = order_keys(values)
    kind = keys.dtype.type
    low, high, shift = bin_bounds(found, level, values.dtype)
    count_between(keys, kind(np.iinfo(kind).max), kind(low), kind(high), shift, counts)


def descend(counts: Array, found: Array, ranks: Array, stage: str, level: int) -> State:
    """The selection one level on, given counts of shape (models, ranks, bins)."""
    found, ranks, equal = found.copy(), ranks.copy(), np.zeros_like(ranks)
    for k, r in np.argwhere(found >= 0):
        where, ranks[k, r], equal[k, r] = locate(counts[k, r], int(ranks[k, r]))
        found[k, r] = found[k, r] << 16 | where
    return {
        f"_{stage}_found": found,
        f"_{stage}_rank": ranks,
        f"_{stage}_equal": equal,
        f"_{stage}_level": np.array(level),
    }


def start_selection(stage: str, ranks: Array, histogram: Array) -> State:
    """Begin to follow ranks, from the coarse histogram on.

    Parameters
    ----------
    stage : str
        Name of the selection.
    ranks : int64 ndarray, shape (models, ranks)
        0-based, ascending by magnitude; negative where none is wanted.
    histogram : int64 ndarray, shape (models, 32768)

    Returns
    -------
    dict
        The selection's entries of the state, one level done.
    """
    spread = np.broadcast_to(histogram[:, None, :], (*ranks.shape, TOP_BINS))
    return descend(spread, np.where(ranks < 0, -1, 0), ranks, stage, 1)


def selected(job: Job, state: State, stage: str) -> Array:
    """The values found by a finished selection: float64, shape (models, ranks); NaN where none was wanted."""
    found = state[f"_{stage}_found"]
    return np.where(found < 0, np.nan, magnitudes(np.maximum(found, 0), job.work))


@dataclass(frozen=True, slots=True)
class Coarse:
    """First sweep: per model, how often each pattern of the top 15 bits occurs, and on request the moments.

    Leaves ``histogram`` (int64, (models, 32768)) and with `moments` ``moments`` (float64, (models, 2): sum of
    magnitudes, sum of squares) in the state. Not needed once ``thresholds`` are known.
    """

    moments: bool = False
    after: After = nothing_after
    reads: float = 1.0
    name: str = "coarse histogram"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "thresholds" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per model, and two sums per block and model."""
        return (job.models, TOP_BINS), (job.models, 2) if self.moments else None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        for k in range(job.models):
            count_top(tile.values[k], accumulator.counts[k])
            if accumulator.blocks is not None:
                kernels.norms(tile.values[k], accumulator.blocks[tile.index, k])

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count, and add, from the stored bits."""

        def sweep(rows: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            edges = block_edges(job.shape, blocks)
            count = blocks[1] - blocks[0]
            sums = np.empty((count, job.models, 0)) if mine.blocks is None else mine.blocks[blocks[0] : blocks[1]]
            return fused_counts.count_top(rows[0], tuple(rows[1:]), edges - edges[0], sums, mine.counted)

        return sweep

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``histogram``, ``moments`` and what `after` makes of them."""
        assert accumulator.counts is not None
        new: State = {"histogram": accumulator.counts}
        if accumulator.blocks is not None:
            new["moments"] = kernels.fold(accumulator.blocks)
        return new | self.after(job, state | new)


@dataclass(frozen=True, slots=True)
class Refine:
    """A later sweep: the next 16 bits inside the bins that a selection has found.

    Parameters
    ----------
    stage : str
        The selection to follow.
    ranks : int
        How many ranks per model it has.
    level : int
        1 for the sweep after the coarse one.
    after : callable
        Called with the state after the last level.
    reads : float
        As for :func:`mergepipe.tasks.method.expected_reads`.
    """

    stage: str
    ranks: int
    level: int
    after: After = nothing_after
    reads: float = 1.0

    @property
    def name(self) -> str:
        """The level and the selection."""
        return f"fine histogram {self.level} ({self.stage})"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run: the selection stands at this level and wants a rank of some model."""
        at = state.get(f"_{self.stage}_level")
        if at is None or int(at) != self.level or "thresholds" in state:
            return False
        return bool((state[f"_{self.stage}_found"] >= 0).any())

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per model and rank."""
        return (job.models, self.ranks, FINE_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        found = state[f"_{self.stage}_found"]
        for k in range(job.models):
            for r in range(self.ranks):
                if found[k, r] >= 0:
                    count_fine(tile.values[k], int(found[k, r]), self.level, accumulator.counts[k, r])

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count from the stored bits; the one level there is for float32."""
        found = state[f"_{self.stage}_found"]
        lows, shifts = np.where(found < 0, -1, found << 16), np.zeros_like(found)
        none = np.empty((0, job.models, 0))  # each pattern has its own counter
        return lambda rows, mine, _: fused_counts.count_near(rows[0], tuple(rows[1:]), lows, shifts, mine.counted, none)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The selection one level on; after the last level also what `after` makes of it."""
        found, ranks = state[f"_{self.stage}_found"], state[f"_{self.stage}_rank"]
        new = descend(accumulator.counts, found, ranks, self.stage, self.level + 1)  # type: ignore[arg-type]
        last = self.level + 1 == levels(job.work)
        return new | self.after(job, state | new) if last else new


def refinements(job: Job, stage: str, ranks: int, after: After, reads: float = 1.0) -> tuple[Refine, ...]:
    """The sweeps that take a selection from the coarse histogram to exact values."""
    return tuple(Refine(stage, ranks, level, after, reads) for level in range(1, levels(job.work)))
