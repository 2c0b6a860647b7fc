"""Exact thresholds in little more than one sweep: a sample says about where they lie, one sweep counts what is there.

The sweeps of :mod:`mergepipe.tasks.select` need no luck, but take two looks at everything. Here the histogram of a
sample (:class:`Sample`) gives each wanted rank of each model a window that should hold it; the next sweep
(:class:`Near`) counts how many magnitudes lie below each window, and inside it one by one (see
:mod:`mergepipe.tasks.windows`). If all ranks lie inside theirs, the thresholds are found, and they are the exact ones.
If one lies beside its window, it is known now how far off the sample is there, and one more sweep looks again; else
nothing is believed and the sure way follows. A wrong guess costs time, no bit. Windows know nothing of each other, so
those of one model may overlap.

Where a tensor can't be held, blocks are the sample, and these may be unlike each other, as the rows of a fine-tune are:
some have moved more than others. How unlike they are in their mean magnitudes says how much wider windows have to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fused_counts
from mergepipe.tasks.blocks import Blocks
from mergepipe.tasks.fused_counts import ASIDE
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, StoredSweep, Tile
from mergepipe.tasks.select import TOP_BINS, After, count_top, magnitudes
from mergepipe.tasks.windows import (
    BITS,
    COUNTERS,
    LOW,
    SHIFT,
    WIDEST,
    Window,
    count_window,
    selection,
    windows_of,
)

SMALLEST = 1 << 20
"""Elements from which on a guess is made: smaller tensors have too small a sample, and cost little."""

DEVIATIONS = 6
"""Half the width of a window, in standard deviations of the rank of a quantile of the sample; plus this share of it,
for rows and columns that are unlike each other:"""
SPREAD = 1 / 512

UNLIKE = 5
"""The same in standard errors of the mean magnitude of the blocks of a sample, where they are unlike each other: times
:func:`leverage`."""

HIGHEST = 0x7F7FFFFF
"""Bits of the largest float32."""

SAMPLE, _MOVED = "_near_sample", "_near_moved"

Ranks = Callable[[Job], Array]
"""The wanted ranks of each model: 0-based, ascending by magnitude, negative for one that is not wanted; int64, (models,
ranks)."""


def guesses(job: Job, stage: str, ranks: Ranks, after: After, then: Then | None = None) -> tuple[Reduction, ...]:
    """The sweeps of a guess, of which the last is hardly ever made; none where it is not worth while.

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
    return Sample(ranks, then), Near(stage, ranks, after, then), Near(stage, ranks, after, then, reads=0.0)


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
    """Histogram of a sample: ``_near_sample``; the windows: ``_near_low`` and ``_near_shift``, int64, (models, ranks).

    Which elements are taken depends on how the tensor is cut. The threshold does not.
    """

    ranks: Ranks
    then: Then | None = None
    name: str = "sample"
    sampled: bool = True

    def needed(self, job: Job, state: State) -> bool:
        """Unless the thresholds are known."""
        return "thresholds" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per model; of a block looked at by itself how much was taken, and the mean magnitude of each."""
        return (job.models, TOP_BINS), (1 + job.models,)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        for k in range(job.models):
            count_top(tile.values[k], accumulator.counts[k])
        if accumulator.blocks is not None:
            means = np.abs(tile.values).mean(axis=1, dtype=np.float64)
            accumulator.blocks[tile.index] = tile.values.shape[1], *means

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count a part of the stored bits."""

        def sweep(rows: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            alone = mine.blocks is not None and blocks[1] - blocks[0] == 1
            means = np.empty(job.models if alone else 0)
            finite = fused_counts.sample_top(rows[0], tuple(rows[1:]), mine.counted, means)
            if mine.blocks is not None and alone:
                mine.blocks[blocks[0]] = fused_counts.sampled(rows[0].size), *means
            return finite

        return sweep

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The windows, if all ranks that are wanted get one."""
        assert accumulator.counts is not None
        wanted = self.ranks(job).astype(np.float64)
        spans = np.repeat(np.where(wanted < 0, math.nan, wanted)[:, :, None], 2, axis=2)
        wider = UNLIKE * _errors(accumulator, job.size)
        found = _windows(accumulator.counts, spans, job.size, wider)
        if found is None or self.then is None:
            return {} if found is None else {SAMPLE: accumulator.counts, LOW: found[0], SHIFT: found[1]}
        lows, shifts = found
        ends = np.stack([lows, lows + (COUNTERS << shifts) - 1], axis=2)
        values = np.where(lows[:, :, None] < 0, math.nan, magnitudes(np.clip(ends, 0, HIGHEST), job.work))
        more = _windows(accumulator.counts, self.then.around(job, values)[:, None], job.size, wider)
        if more is None:
            return {}
        new: State = {LOW: np.hstack([lows, more[0]]), SHIFT: np.hstack([shifts, more[1]])}
        return {SAMPLE: accumulator.counts, **new}


def _errors(sample: Accumulator, size: int) -> Array:
    """Standard errors of the mean magnitude of each delta, as shares of it, if some of the blocks are the sample.

    Zero where each block gave a part of it, or all it has; 1 where nothing can be said.

    Examples
    --------
    >>> blocks = np.array([[8, 2.0, 5.0], [0, 0, 0], [8, 4.0, 5.0], [0, 0, 0]])
    >>> _errors(Accumulator(np.array([[10, 6], [0, 16]]), blocks), 32).round(3).tolist()
    [0.236, 0.0]
    """
    none = np.zeros(len(sample.counted))
    if sample.blocks is None:
        return none
    seen = sample.blocks[sample.blocks[:, 0] > 0]
    taken = sample.counted[0].sum()
    if len(seen) == len(sample.blocks) or seen[:, 0].sum() < taken or taken == size:
        return none
    if len(seen) == 1 or not np.isfinite(seen).all():
        return none + 1.0
    means, spread = seen[:, 1:].mean(axis=0), seen[:, 1:].std(axis=0, ddof=1)
    shares = np.divide(spread, means, out=none, where=means > 0)
    errors: Array = shares * math.sqrt((1 - len(seen) / len(sample.blocks)) / len(seen))
    return errors


def _windows(counts: Array, spans: Array, size: int, wider: Array) -> tuple[Array, Array] | None:
    """Smallest keys and shifts of windows for spans of ranks, (models, ranks, 2); None if not all that are wanted.

    `wider`, shape (models,), says by what share magnitudes may be off.
    """
    lows, shifts = np.full(spans.shape[:2], -1), np.zeros(spans.shape[:2], np.int64)
    for k, r in np.argwhere(~np.isnan(spans[:, :, 0])):
        window = _window(counts[k], float(spans[k, r, 0]), float(spans[k, r, 1]), size, float(wider[k]))
        if window is None:
            return None
        lows[k, r], shifts[k, r] = window
    return lows, shifts


def _window(counts: Array, lowest: float, highest: float, size: int, wider: float) -> tuple[int, int] | None:
    """Smallest key and shift of a window that should hold ranks; None if the sample does not say."""
    taken = int(counts.sum())
    if taken == 0:
        return None
    around = [_place(lowest / size, taken, -1, wider), _place(highest / size, taken, 1, wider)]
    ends = np.cumsum(counts)
    first, last = (int(place) for place in np.searchsorted(ends, np.clip(around, 0, taken - 1), side="right"))
    shift = (last - first).bit_length()
    return (first << 16, shift + 16 - BITS) if shift <= WIDEST else None


def _place(share: float, taken: int, side: int, wider: float) -> float:
    """Rank in the sample that a quantile surely does not lie beyond, on one side."""
    half = DEVIATIONS * math.sqrt(max(1.0, share * (1 - share) * taken)) + (SPREAD + wider * leverage(share)) * taken
    return share * taken + side * half


def leverage(share: float) -> float:
    """How much of the elements moves past the magnitude of a quantile if all are off by a small share: a bound for it.

    Of normal numbers it is ``2 * z * pdf(z)`` where so many lie within z deviations, 0.484 at the most, and less in the
    tails; of Laplace's it is less than this, too.

    Examples
    --------
    >>> [round(leverage(share), 3) for share in (0.0, 0.1, 0.8, 0.99, 1.0)]
    [0.0, 0.1, 0.5, 0.102, 0.0]
    """
    rest = 1.0 - share
    return min(0.5, share, rest - 2 * rest * math.log(rest)) if 0 < share < 1 else 0.0


@dataclass(frozen=True, slots=True)
class Near:
    """Counts what lies in the windows, and how much lies below.

    With `reads` 0 it is the one more sweep, where a rank was missed by a little.
    """

    stage: str
    ranks: Ranks
    after: After
    then: Then | None = None
    reads: float = 1.0

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "counts near thresholds" if self.reads else "counts where they were missed"

    def needed(self, job: Job, state: State) -> bool:
        """Where there are windows to look into."""
        return (LOW if self.reads else _MOVED) in state and "thresholds" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """For each model and rank the counters of its window, and one for what lies below; what is put aside."""
        models, ranks = self.ranks(job).shape
        ranks += self.then is not None
        return (models, ranks, COUNTERS + 1), (models, ranks * ASIDE)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        lows, shifts = state[LOW], state[SHIFT]
        for k, r in np.argwhere(lows >= 0):
            aside = np.empty(0)
            if accumulator.blocks is not None:
                aside = accumulator.blocks[tile.index, k, r * ASIDE : (r + 1) * ASIDE]
            count_window(tile.values[k], int(lows[k, r]), int(shifts[k, r]), accumulator.counts[k, r], aside)

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Count from the stored bits."""
        lows, shifts = state[LOW], state[SHIFT]

        def sweep(rows: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            assert mine.blocks is not None
            aside = mine.blocks[blocks[0] : blocks[1]]
            return fused_counts.count_near(rows[0], tuple(rows[1:]), lows, shifts, mine.counted, aside)

        return sweep

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The finished selection and what `after` makes of it; if a rank was missed, windows beside, or nothing."""
        wanted, windows = self.ranks(job), windows_of(state, accumulator)
        new = selection(self.stage, wanted, windows)
        if new is None:
            return _moved(job, wanted, state, windows)
        new |= self.after(job, state | new)
        if self.then is None:
            return new
        ranks = self.then.ranks(job, state | new)[:, None]
        more = selection(self.then.stage, ranks, [row[wanted.shape[1] :] for row in windows])
        if more is None:
            return _moved(job, np.hstack([wanted, ranks]), state, windows)
        return new | more | self.then.after(job, state | new | more)


def _moved(job: Job, wanted: Array, state: State, windows: list[list[Window]]) -> State:
    """Windows that should hold the ranks that were missed, if that can be said of all of them."""
    if SAMPLE not in state:
        return {}
    lows, shifts = state[LOW].copy(), state[SHIFT].copy()
    for k, r in np.argwhere(wanted >= 0):
        rank, window = int(wanted[k, r]), windows[k][r]
        if window.low < 0:
            return {}
        if window.locate(rank) is None:
            again = _again(state[SAMPLE][k], window, rank, job.size)
            if again is None:
                return {}
            lows[k, r], shifts[k, r] = again
    return {LOW: lows, SHIFT: shifts, _MOVED: np.array(True)}


def _again(sample: Array, window: Window, rank: int, size: int) -> tuple[int, int] | None:
    """Smallest key and shift of a window for a rank that another one missed; None if that can't be said."""
    among = window.counter_of(rank)
    if among is not None:  # several patterns on one counter: each gets its own
        return among, 0
    edge, below = window.edge(rank)
    seen = int(sample[: edge >> 16].sum())
    # What lies between the edge and the rank is as the sample has it, which is off by the same below and above.
    place = seen * size / int(sample.sum()) + rank - below
    return _window(sample, place, place, size, 0.0) if 0 <= place < size else None
