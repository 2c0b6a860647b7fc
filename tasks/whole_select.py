"""Exact order statistics over a whole model: a selection of :mod:`mergepipe.tasks.select`, one level a round.

Every value is read as an integer that orders as the value does. A round counts, over all tensors of its group, the next
16 bits of those that lie in the bins found so far; when the last bits are in, the wanted ranks are known exactly. For
float32 that takes two rounds, for a group that has a float64 tensor four, on float64 keys of all its tensors. Counts
are integers, so neither the order of the tensors nor their cut into chunks matters.

A selection lives in the shared state under its stage name: ``_<stage>_found`` (the leading bits found, as a signed
integer), ``_<stage>_rank`` (rank among the elements with these bits; negative where none is wanted), ``_<stage>_equal``
(how many these are), each int64 of shape (models, ranks); at the end also ``_<stage>_values``, float64, NaN where no
rank is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, Round, Shared, State, Tile, no_reductions
from mergepipe.tasks.select import FINE_BINS, count_between, levels, locate

Scores = Callable[[Job, State, Tile], Array]
"""What is ranked: an array of shape (models, n), which may be the tile's own values."""


def widest(jobs: Sequence[Job]) -> np.dtype[Any]:
    """The type in which the values of a group are compared."""
    return max((job.work for job in jobs), key=lambda work: work.itemsize)


def ordered_keys(values: Array) -> Array:
    """Signed integers that order as the values do, -0 just below +0; a new array.

    Examples
    --------
    >>> keys = ordered_keys(np.array([-2.0, -1.0, 0.0, 1.0, 2.0], np.float32))
    >>> bool((np.diff(keys.astype(np.int64)) > 0).all()), values_of(keys.astype(np.int64), np.dtype("f4")).tolist()
    (True, [-2.0, -1.0, 0.0, 1.0, 2.0])
    """
    return _turned(values.view(np.int32 if values.dtype.itemsize == 4 else np.int64))


def values_of(keys: Array, work: np.dtype[Any]) -> Array:
    """The reverse of :func:`ordered_keys`, from int64, as float64."""
    bits = keys.astype(np.int32 if work.itemsize == 4 else np.int64)
    return _turned(bits).view(work).astype(np.float64)


def _turned(bits: Any) -> Array:
    """Bit patterns of floats as ordered integers, and back: all but the sign turned round where that is set."""
    turned: Array = bits ^ ((bits >> (bits.dtype.itemsize * 8 - 1)) & np.iinfo(bits.dtype).max)
    return turned


@dataclass(frozen=True, slots=True)
class CountLevel:
    """``_<stage>_counts`` (int64, (models, ranks, 65536)): 16 bits of the values that lie in the bins found so far."""

    stage: str
    level: int
    wanted: Array
    work: np.dtype[Any]
    scores: Scores

    @property
    def name(self) -> str:
        """The level and the selection."""
        return f"whole-model histogram {self.level} ({self.stage})"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to count."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per model and rank."""
        return (*self.wanted.shape, FINE_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        keys = ordered_keys(np.ascontiguousarray(self.scores(job, state, tile), self.work))
        kind, limits = keys.dtype.type, np.iinfo(keys.dtype)
        shift = 16 * (levels(self.work) - 1 - self.level)
        for k, r in np.argwhere(self.wanted >= 0):
            low, high = int(limits.min), int(limits.max)
            if self.level:
                low = int(state[f"_{self.stage}_found"][k, r]) << (shift + 16)
                high = low + (1 << (shift + 16)) - 1
            count_between(keys[k], kind(-1), kind(low), kind(high), shift, accumulator.counts[k, r])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The counts as they are: only the whole model's sum says what they mean."""
        assert accumulator.counts is not None
        return {f"_{self.stage}_counts": accumulator.counts}


@dataclass(frozen=True, slots=True)
class Level:
    """One round of a selection."""

    stage: str
    level: int
    wanted: Array
    work: np.dtype[Any]
    scores: Scores
    before: Callable[[Job], tuple[Reduction, ...]]

    @property
    def name(self) -> str:
        """The level and the selection."""
        return f"level {self.level} of {self.stage}"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """What the scores need, then the count."""
        return (*self.before(job), CountLevel(self.stage, self.level, self.wanted, self.work, self.scores))

    def counts(self, job: Job, state: State) -> Array | None:
        """The histograms."""
        return state.get(f"_{self.stage}_counts")

    def values(self, job: Job, state: State) -> Array | None:
        """Nothing but counts is needed."""
        return None

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """The selection one level on."""
        nothing = np.zeros(self.wanted.shape, np.int64)
        found = shared.common.get(f"_{self.stage}_found", nothing).copy()
        rank = shared.common.get(f"_{self.stage}_rank", self.wanted).copy()
        equal = nothing
        for k, r in np.argwhere(self.wanted >= 0):
            assert counts is not None, "a rank is wanted only where there are elements"
            bins = counts[k, r] if self.level else np.roll(counts[k, r], FINE_BINS // 2)
            where, rank[k, r], equal[k, r] = locate(bins, int(rank[k, r]))
            found[k, r] = where - FINE_BINS // 2 if self.level == 0 else found[k, r] << 16 | where
        names = {"found": found, "rank": rank, "equal": equal}
        if self.level == levels(self.work) - 1:
            names["values"] = np.where(self.wanted >= 0, values_of(found, self.work), np.nan)
        return Shared({f"_{self.stage}_{name}": value for name, value in names.items()})


def selection(
    jobs: Sequence[Job],
    stage: str,
    wanted: Array,
    scores: Scores,
    before: Callable[[Job], tuple[Reduction, ...]] = no_reductions,
) -> tuple[Round, ...]:
    """The rounds of a selection.

    Parameters
    ----------
    jobs : sequence of Job
        The group.
    stage : str
        Name of the selection.
    wanted : int64 ndarray, shape (models, ranks)
        0-based ranks, ascending by value; negative where none is wanted.
    scores : callable
        What is ranked.
    before : callable
        Sweeps over a tensor whose state the scores need.
    """
    work = widest(jobs)
    if (wanted < 0).all():
        return ()
    return tuple(Level(stage, level, wanted, work, scores, before) for level in range(levels(work)))


def magnitude_scores(job: Job, state: State, tile: Tile) -> Array:
    """The magnitudes of the tile's values, in place."""
    return np.abs(tile.values, out=tile.values)
