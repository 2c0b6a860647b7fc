"""Windows: a part of the range of magnitudes, counted finely, to find exact order statistics that lie in it.

A window has several patterns on one counter. Differences of bfloat16 numbers have few significant bits, so hardly any
have another pattern there than the counter's first; those are put aside one by one. Where there is no room for them
they are counted with the others, and a counter that has such a one is not believed: one more sweep looks at it alone.
That is why a guess is made only where all inputs are stored as bfloat16 (:attr:`mergepipe.tasks.method.Job.halves`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fused_counts
from mergepipe.tasks.fused_counts import ASIDE
from mergepipe.tasks.method import Accumulator, Array, State
from mergepipe.tasks.select import order_keys

BITS = 14
COUNTERS = 1 << BITS
"""Counters of a window: few enough that those of three models stay in the second-level cache."""

WIDEST = 8
"""A window covers at most two to this power bins of 16 bits: the more it covers, the more patterns share a counter.
Where the sample asks for more, no guess is made."""

LOW, SHIFT = "_near_low", "_near_shift"
"""Entries of the state: smallest keys and shifts of windows, int64, (models, ranks)."""


def count_window(values: Array, low: int, shift: int, counts: Array, aside: Array) -> None:
    """As :func:`mergepipe.tasks.fused_counts.count_near` of one model and window: `aside` is a row with room for it.

    Parameters
    ----------
    values : float32 ndarray, shape (n,)
    low, shift : int
        The bits of the smallest magnitude inside; a counter stands for ``2**shift`` patterns.
    counts : int64 ndarray, shape (COUNTERS + 1,)
        Added to.
    aside : float64 ndarray
        Overwritten; zeros.
    """
    keys = (order_keys(values) & 0x7FFFFFFF).astype(np.int64) - low
    counts[COUNTERS] += int((keys < 0).sum())
    inside = keys[(keys >= 0) & (keys < COUNTERS << shift)]
    first = inside & ((1 << shift) - 1) == 0
    counts[:COUNTERS] += np.bincount(inside[first] >> shift, minlength=COUNTERS)
    odd = inside[~first]
    aside[: odd.size] = low + odd[: aside.size]
    odd, many = np.unique(odd[aside.size :] >> shift, return_counts=True)
    counts[odd] += many + np.where(counts[odd] < fused_counts.ODD, fused_counts.ODD, 0)


@dataclass(frozen=True, slots=True)
class Window:
    """What was counted in one window, and what was put aside there: distances from its smallest key, ascending."""

    low: int
    shift: int
    counts: Array
    aside: Array

    @property
    def below(self) -> int:
        """Elements below it."""
        return int(self.counts[COUNTERS])

    def sizes(self) -> Array:
        """Elements of each counter's patterns."""
        counted = self.counts[:COUNTERS] & (fused_counts.ODD - 1)
        return counted + np.bincount(self.aside >> self.shift, minlength=COUNTERS)

    def locate(self, rank: int) -> tuple[int, int, int] | None:
        """The key of 0-based ascending `rank`, the rank among its equals and their number.

        None if the rank lies outside the window, or in a counter with patterns that nobody has told apart.
        """
        key = self.counter_of(rank)
        if key is None:
            return None
        place = (key - self.low) >> self.shift
        rank -= self.below + int(self.sizes()[:place].sum())
        equal = int(self.counts[place])
        if equal >= fused_counts.ODD:
            return None
        if rank < equal:
            return key, rank, equal
        rank -= equal
        others = self.aside[self.aside >> self.shift == place]
        other = int(others[rank])
        return self.low + other, rank - int(np.searchsorted(others, other)), int((others == other).sum())

    def counter_of(self, rank: int) -> int | None:
        """The key that the counter with a rank begins with; None if the rank lies outside the window."""
        ends = np.cumsum(self.sizes()) + self.below
        if self.low < 0 or not self.below <= rank < int(ends[-1]):
            return None
        return self.low + (int(np.searchsorted(ends, rank, side="right")) << self.shift)

    def edge(self, rank: int) -> tuple[int, int]:
        """The end of the window that is nearer to a rank outside: its key, and how many elements lie below it."""
        if rank < self.below:
            return self.low, self.below
        return self.low + (COUNTERS << self.shift), self.below + int(self.sizes().sum())


def windows_of(state: State, accumulator: Accumulator) -> list[list[Window]]:
    """What was found in the windows, by model and rank."""
    counts, rows = accumulator.counted, accumulator.blocks
    found = []
    for k, r in np.ndindex(counts.shape[:2]):
        low, shift = int(state[LOW][k, r]), int(state[SHIFT][k, r])
        aside = np.empty(0) if rows is None else rows[:, k, r * ASIDE : (r + 1) * ASIDE]
        keys = np.sort(aside[aside > 0].astype(np.int64))
        found.append(Window(low, shift, counts[k, r], keys - low))
    ranks = counts.shape[1]
    return [found[first : first + ranks] for first in range(0, len(found), ranks)]


def selection(stage: str, wanted: Array, windows: list[list[Window]]) -> State | None:
    """A finished selection; None if a rank was missed."""
    found, ranks, equal = np.full_like(wanted, -1), np.zeros_like(wanted), np.zeros_like(wanted)
    for k, r in np.argwhere(wanted >= 0):
        hit = windows[k][r].locate(int(wanted[k, r]))
        if hit is None:
            return None
        found[k, r], ranks[k, r], equal[k, r] = hit
    return {f"_{stage}_found": found, f"_{stage}_rank": ranks, f"_{stage}_equal": equal}
