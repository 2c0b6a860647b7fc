"""Exact thresholds in little more than one sweep: a sample says about where they lie, one sweep counts what is there.

The sweeps of :mod:`mergepipe.tasks.select` need no luck, but take two looks at everything. Here the histogram of a
sample (:class:`Sample`) gives each wanted rank of each model a window that should hold it; the next sweep
(:class:`Near`) counts how many magnitudes lie below each window, and inside it one by one. If all ranks lie inside
theirs, the thresholds are found, and they are the exact ones; else nothing is believed and the sure way follows. A
wrong guess costs time, no bit. Windows know nothing of each other, so those of one model may overlap.

A window has several patterns on one counter. Differences of bfloat16 numbers have few significant bits, so all but the
first pattern of a counter stay empty there; a counter that has seen another one says so, and is not believed either.
That is why a guess is made only where all inputs are stored as bfloat16 (:attr:`mergepipe.tasks.method.Job.halves`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fused_counts
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, StoredSweep, Tile
from mergepipe.tasks.select import TOP_BINS, After, count_top, magnitudes, order_keys

BITS = 14
COUNTERS = 1 << BITS
"""Counters of a window: few enough that those of three models stay in the second-level cache."""
WIDTH = 1 << BITS // 2

SMALLEST = 1 << 20
"""Elements from which on a guess is made: smaller tensors have too small a sample, and cost little."""

WIDEST = 8
"""A window covers at most two to this power bins of 16 bits: the more it covers, the more patterns share a counter.
Where the sample asks for more, no guess is made."""

DEVIATIONS = 6
"""Half the width of a window, in standard deviations of the rank of a quantile of the sample; plus this share of it,
for rows and columns that are unlike each other:"""
SPREAD = 1 / 512

HIGHEST = 0x7F7FFFFF
"""Bits of the largest float32."""

_LOW, _SHIFT = "_near_low", "_near_shift"

Ranks = Callable[[Job], Array]
"""The wanted ranks of each model: 0-based, ascending by magnitude, negative for one that is not wanted; int64, (models,
ranks)."""


def guesses(job: Job, stage: str, ranks: Ranks, after: After, then: Then | None = None) -> tuple[Reduction, ...]:
    """The two sweeps of a guess; none where it is not worth while.

    Parameters
    ----------
    job : Job
    stage : str
        Name of the selection (:mod:`mergepipe.tasks.select`) that is left finished where the guess was right.
    ranks : callable
        The ranks it follows.
    after : callable
        Called with the state once the selection is finished.
    then : Then, optional
        One more rank that follows from these.
    """
    if not job.halves or job.work != np.float32 or job.size < SMALLEST or (ranks(job) < 0).all():
        return ()
    return Sample(ranks, then), Near(stage, ranks, after, then)


@dataclass(frozen=True, slots=True)
class Then:
    """One more rank of each model, which follows from what stands at the others.

    Attributes
    ----------
    stage : str
        Name of the selection that it is the only rank of.
    around : callable
        Given the job and the smallest and the largest value that each of the others may have, float64, (models, ranks,
        2): about where the rank will be, float64, (models, 2), smallest and largest; NaN where none will be wanted.
    ranks : callable
        Given the state once the others are known: the ranks as of :data:`Ranks`, (models,).
    after : callable
        Called with the state once this selection is finished, too.
    """

    stage: str
    around: Callable[[Job, Array], Array]
    ranks: Callable[[Job, State], Array]
    after: After


@dataclass(frozen=True, slots=True)
class Sample:
    """Histogram of a sample; leaves the windows: ``_near_low`` and ``_near_shift``, int64, (models, ranks).

    Which elements are taken depends on how the tensor is cut. The threshold does not.
    """

    ranks: Ranks
    then: Then | None = None
    name: str = "sample"
    reads: float = 1 / 16
    sampled: bool = True

    def needed(self, job: Job, state: State) -> bool:
        """Unless the thresholds are known."""
        return "thresholds" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per model."""
        return (job.models, TOP_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        for k in range(job.models):
            count_top(tile.values[k], accumulator.counts[k])

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count a part of the stored bits."""
        return lambda rows, mine, _: fused_counts.sample_top(rows[0], tuple(rows[1:]), mine.counted)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The windows, if all ranks that are wanted get one."""
        assert accumulator.counts is not None
        wanted = self.ranks(job).astype(np.float64)
        spans = np.repeat(np.where(wanted < 0, math.nan, wanted)[:, :, None], 2, axis=2)
        found = _windows(accumulator.counts, spans, job.size)
        if found is None or self.then is None:
            return {} if found is None else {_LOW: found[0], _SHIFT: found[1]}
        lows, shifts = found
        ends = np.stack([lows, lows + (COUNTERS << shifts) - 1], axis=2)
        values = np.where(lows[:, :, None] < 0, math.nan, magnitudes(np.clip(ends, 0, HIGHEST), job.work))
        more = _windows(accumulator.counts, self.then.around(job, values)[:, None], job.size)
        if more is None:
            return {}
        return {_LOW: np.hstack([lows, more[0]]), _SHIFT: np.hstack([shifts, more[1]])}


def _windows(counts: Array, spans: Array, size: int) -> tuple[Array, Array] | None:
    """Smallest keys and shifts of windows for spans of ranks, (models, ranks, 2); None if not all that are wanted."""
    lows, shifts = np.full(spans.shape[:2], -1), np.zeros(spans.shape[:2], np.int64)
    for k, r in np.argwhere(~np.isnan(spans[:, :, 0])):
        window = _window(counts[k], float(spans[k, r, 0]), float(spans[k, r, 1]), size)
        if window is None:
            return None
        lows[k, r], shifts[k, r] = window
    return lows, shifts


def _window(counts: Array, lowest: float, highest: float, size: int) -> tuple[int, int] | None:
    """Smallest key and shift of a window that should hold ranks; None if the sample does not say."""
    taken = int(counts.sum())
    if taken == 0:
        return None
    around = [_place(lowest / size, taken, -1), _place(highest / size, taken, 1)]
    ends = np.cumsum(counts)
    first, last = (int(place) for place in np.searchsorted(ends, np.clip(around, 0, taken - 1), side="right"))
    shift = (last - first).bit_length()
    return (first << 16, shift + 16 - BITS) if shift <= WIDEST else None


def _place(share: float, taken: int, side: int) -> float:
    """Rank in the sample that a quantile surely does not lie beyond, on one side."""
    half = DEVIATIONS * math.sqrt(max(1.0, share * (1 - share) * taken)) + SPREAD * taken
    return share * taken + side * half


@dataclass(frozen=True, slots=True)
class Near:
    """Counts what lies in the windows, and how much lies below."""

    stage: str
    ranks: Ranks
    after: After
    then: Then | None = None
    name: str = "counts near thresholds"

    def needed(self, job: Job, state: State) -> bool:
        """Where there are windows to look into."""
        return _LOW in state and "thresholds" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """For each model and rank the counters of its window, and one for what lies below."""
        models, ranks = self.ranks(job).shape
        return (models, ranks + (self.then is not None), COUNTERS + 1), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        lows, shifts = state[_LOW], state[_SHIFT]
        for k, r in np.argwhere(lows >= 0):
            _count(tile.values[k], int(lows[k, r]), int(shifts[k, r]), accumulator.counts[k, r])

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count from the stored bits."""
        lows, shifts = state[_LOW], state[_SHIFT]
        return lambda rows, mine, _: fused_counts.count_near(rows[0], tuple(rows[1:]), lows, shifts, mine.counted)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The finished selection and what `after` makes of it, or nothing if a rank was missed."""
        assert accumulator.counts is not None
        wanted = self.ranks(job)
        new = self._selection(self.stage, wanted, state, accumulator.counts)
        if new is None:
            return {}
        new |= self.after(job, state | new)
        if self.then is None:
            return new
        last = slice(wanted.shape[1], None)
        windows = {name: state[name][:, last] for name in (_LOW, _SHIFT)}
        ranks = self.then.ranks(job, state | new)[:, None]
        more = self._selection(self.then.stage, ranks, windows, accumulator.counts[:, last])
        return {} if more is None else new | more | self.then.after(job, state | new | more)

    def _selection(self, stage: str, wanted: Array, windows: State, counts: Array) -> State | None:
        """A finished selection; None if a rank was missed."""
        found, ranks, equal = np.full_like(wanted, -1), np.zeros_like(wanted), np.zeros_like(wanted)
        for k, r in np.argwhere(wanted >= 0):
            low, shift = int(windows[_LOW][k, r]), int(windows[_SHIFT][k, r])
            hit = None if low < 0 else _locate(counts[k, r], int(wanted[k, r]))
            if hit is None:
                return None
            place, ranks[k, r], equal[k, r] = hit
            found[k, r] = low + (place << shift)
        return {f"_{stage}_found": found, f"_{stage}_rank": ranks, f"_{stage}_equal": equal}


def _count(values: Array, low: int, shift: int, counts: Array) -> None:
    keys = (order_keys(values) & 0x7FFFFFFF).astype(np.int64) - low
    counts[COUNTERS] += int((keys < 0).sum())
    inside = keys[(keys >= 0) & (keys < COUNTERS << shift)]
    counts[:COUNTERS] += np.bincount(inside >> shift, minlength=COUNTERS)
    odd = np.unique(inside[inside & ((1 << shift) - 1) != 0] >> shift)
    counts[odd[counts[odd] < fused_counts.ODD]] += fused_counts.ODD


def _locate(counts: Array, rank: int) -> tuple[int, int, int] | None:
    """Counter that holds an element of 0-based ascending `rank`, the rank among its equals and their number.

    None if the rank lies outside the window, or the elements of its counter are not all equal.
    """
    below = int(counts[COUNTERS])
    rows = counts[:COUNTERS].reshape(-1, WIDTH)  # one is looked at closely, of the others only the sums
    ends = np.cumsum(rows.sum(axis=1) & (fused_counts.ODD - 1)) + below
    if not below <= rank < int(ends[-1]):
        return None
    row = int(np.searchsorted(ends, rank, side="right"))
    inside = rows[row] & (fused_counts.ODD - 1)
    last = int(ends[row]) - int(inside.sum()) + np.cumsum(inside)
    column = int(np.searchsorted(last, rank, side="right"))
    if rows[row, column] >= fused_counts.ODD:
        return None
    size = int(inside[column])
    return row * WIDTH + column, rank - (int(last[column]) - size), size
