"""The sweeps of coordinate fusion over scores: the exact threshold, ties, and what is taken."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fusion_guess, kernels, rows, scores
from mergepipe.tasks.blocks import Blocks
from mergepipe.tasks.fusion import Stage, primary_of, score, settled_score, statistics_of
from mergepipe.tasks.method import Accumulator, Array, Job, State, StoredSweep, Tile
from mergepipe.tasks.select import (
    FINE_BINS,
    TOP_BINS,
    bin_bounds,
    count_fine,
    count_top,
    descend,
    levels,
    order_keys,
    selected,
    start_selection,
)
from mergepipe.tasks.squares import SQUARES, sum_squares

IQR_FACTOR = 1.5


def thresholds_of(stage: Stage, found: Array) -> Array:
    """The thresholds of a stage from the order statistics they are made of, shape (donors, ranks)."""
    if stage.settings.threshold == "quantile":
        return found[:, 0]
    with np.errstate(invalid="ignore"):
        spread: Array = found[:, 2] - found[:, 0]
        return found[:, 1] + IQR_FACTOR * spread


def selection(stage: Stage, job: Job, counts: Array) -> State:
    """The selection, one level done, from the coarse histograms of all donors."""
    ranks = np.array([stage.settings.wanted(job.size)] * len(stage.donors))
    return start_selection(stage.selection, ranks, counts)


def published(stage: Stage, job: Job, state: State, **found: Array) -> State:
    """Statistics of the donors of a stage among those of all."""
    new: State = {}
    for name, values in found.items():
        whole = state.get(name, np.full(job.models, math.nan)).copy()
        whole[stage.first : stage.stop] = values
        new[name] = whole
    return new


@dataclass(frozen=True, slots=True)
class Coarse:
    """The coarse histogram of the scores, where it could not be taken along with the row statistics."""

    stage: Stage
    reads: float = 1.0

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "coarse histogram of scores" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and f"_{self.stage.selection}_level" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per donor."""
        return (len(self.stage.donors), TOP_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        primary = primary_of(self.stage, job, state, tile)
        for j, donor in enumerate(self.stage.donors):
            count_top(score(self.stage, job, state, tile, primary, donor), accumulator.counts[j])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The selection, one level done."""
        assert accumulator.counts is not None
        return selection(self.stage, job, accumulator.counts)


@dataclass(frozen=True, slots=True)
class Again:
    """Lists what lies in other windows, where a guess has missed by a little: :mod:`mergepipe.tasks.fusion_guess`."""

    stage: Stage
    reads: float = 0.0

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "scores where thresholds were missed" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Where it is known where to look."""
        return fusion_guess.MOVED in state and f"_{self.stage.selection}_level" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A tally per donor; per block and donor how much of each row is listed, and where."""
        return (1, job.models, TOP_BINS), (job.models, fusion_guess.row_places(job))

    def lists(self, job: Job) -> int:
        """As of the first look."""
        return fusion_guess.most_listed(job)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """List of one tile."""
        assert accumulator.blocks is not None
        found = statistics_of(self.stage, job, state, (tile.index, tile.index + 1))
        for j in range(job.models):
            where = accumulator.blocks[tile.index, j]
            fusion_guess.list_tile(self.stage, job, state, accumulator, tile, j, found[j], where)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """What :func:`settled` makes of it, if the windows hold the thresholds."""
        assert accumulator.blocks is not None
        found = fusion_guess.settle(self.stage, job, state, accumulator, accumulator.blocks)
        return {} if found is None else settled(self.stage, job, state, *found)


@dataclass(frozen=True, slots=True)
class Fine:
    """The next 16 bits of the scores that a threshold is made of; the last such sweep settles it.

    Where the threshold is a score, and all elements equal to it are taken, the last sweep also finds the norm of what
    is taken: from the sums of squares above the bin of the threshold and at each score inside it.
    """

    stage: Stage
    level: int
    reads: float = 1.0

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return f"fine histogram {self.level} of scores" + self.stage.word

    def _last(self, job: Job) -> bool:
        return self.level + 1 == levels(job.work)

    def _weighs(self, job: Job) -> bool:
        settings = self.stage.settings
        return self._last(job) and settings.threshold == "quantile" and settings.tie_rule == "keep"

    def needed(self, job: Job, state: State) -> bool:
        """Whether the selection stands at this level."""
        return job.size > 0 and int(state[f"_{self.stage.selection}_level"]) == self.level

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per donor and rank; where norms are found, squares inside the bin, and above it."""
        donors, ranks = len(self.stage.donors), self.stage.settings.ranks
        return (donors, 2, FINE_BINS + SQUARES) if self._weighs(job) else (donors, ranks, FINE_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        primary, found = primary_of(self.stage, job, state, tile), state[f"_{self.stage.selection}_found"]
        for j, donor in enumerate(self.stage.donors):
            own, counts = score(self.stage, job, state, tile, primary, donor), accumulator.counts[j]
            if not self._weighs(job):
                for r in range(self.stage.settings.ranks):
                    count_fine(own, int(found[j, r]), self.level, counts[r])
                continue
            bounds = bin_bounds(int(found[j, 0]), self.level, job.work)
            with np.errstate(over="ignore"):
                deltas = np.subtract(tile.values[donor], primary, out=tile.scratch[2])
            unit = scores.unit_of(float(state[self.stage.energy][j]))
            which, width = rows.rows_of(job, tile.start, primary.size)
            keys, found_rows = order_keys(own), state[self.stage.rows][j, which]
            mask = keys.dtype.type(np.iinfo(keys.dtype).max)
            scores.sort_tile(deltas, keys, width, found_rows, *bounds, mask, unit, counts)

    def stored(self, job: Job, state: State) -> StoredSweep | None:
        """Count and weigh stored bits, where the primary is as it is stored and rows fit a block."""
        stage, settings = self.stage, self.stage.settings
        if stage.first or not settings.by_row or rows.is_wide(job) or not self._weighs(job):
            return None
        width = rows.row_width(job)
        lows = state[f"_{stage.selection}_found"][:, 0] << 16
        units = np.array([scores.unit_of(energy) for energy in state[stage.energy].tolist()])

        def run(bits: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            donors, found = tuple(bits[1:])[: stage.stop], statistics_of(stage, job, state, blocks)
            return scores.sort_stored(bits[0], donors, width, found, settings.always, lows, units, mine.counted)

        return run

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The selection one level on; in the end what :func:`_settle` makes of it."""
        counts, stage, name = accumulator.counted, self.stage, self.stage.selection
        ranks = stage.settings.ranks
        new = descend(
            counts[:, :ranks, :FINE_BINS], state[f"_{name}_found"], state[f"_{name}_rank"], name, self.level + 1
        )
        if not self._last(job):
            return new
        new |= _settle(stage, job, state | new)
        return new | _norms(stage, job, state | new, counts) if self._weighs(job) else new


def settled(stage: Stage, job: Job, state: State, begun: State, counts: Array) -> State:
    """What follows from a selection of float32 scores, one level done, and what the last sweep of it would count."""
    return begun | Fine(stage, 1).combine(job, state | begun, Accumulator(counts))


def _norms(stage: Stage, job: Job, state: State, counts: Array) -> State:
    """``kept_norms``, from the squares inside the bin of each threshold, and above it: see :func:`scores.sort_tile`."""
    energy, found = state[stage.energy], state[f"_{stage.selection}_found"][:, 0]
    kept = np.zeros(len(energy))
    for j, whole in enumerate(energy.tolist()):
        least = int(found[j] & (FINE_BINS - 1))
        # A score of 0 is never taken.
        taken = int(counts[j, 1, least + (found[j] == 0) : FINE_BINS].sum())
        above = sum_squares(counts[j, 0, FINE_BINS:])
        kept[j] = _norm_ratio(above + taken / scores.unit_of(whole), whole)
    return published(stage, job, state, kept_norms=kept)


def _norm_ratio(kept: float, whole: float) -> float:
    return math.sqrt(min(kept / whole, 1.0)) if 0 < whole < math.inf else 0.0


def _settle(stage: Stage, job: Job, state: State) -> State:
    """Thresholds, and for a threshold that is a score also how many elements are taken."""
    name, settings = stage.selection, stage.settings
    found = selected(job, state, name)
    if settings.threshold == "iqr":
        return published(stage, job, state, thresholds=thresholds_of(stage, found))
    rank, equal = state[f"_{name}_rank"][:, 0], state[f"_{name}_equal"][:, 0]
    wanted, least = settings.wanted(job.size)[0], found[:, 0]
    exact = (settings.tie_rule == "index") & (rank > 0) & (least > 0)
    dropped = np.where(least > 0, np.where(exact, wanted, wanted - rank), equal)
    return published(
        stage, job, state, thresholds=least, densities=(job.size - dropped) / job.size,
        _stay=np.where(exact, equal - rank, -1),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ties:
    """``_ties_*``: int64, shape (blocks + 1, donors): elements equal to a threshold that lie before each block."""

    stage: Stage

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "ties" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether some donor loses some of its ties."""
        stay = state["_stay"][self.stage.first : self.stage.stop]
        return job.size > 0 and f"_ties_{self.stage.first}" not in state and bool((stay >= 0).any())

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """One count per block and donor."""
        return None, (len(self.stage.donors),)

    def leaves(self, job: Job) -> int:
        """One count per block and donor."""
        return (job.blocks + 1) * len(self.stage.donors)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.blocks is not None
        primary = primary_of(self.stage, job, state, tile)
        for j, donor in enumerate(self.stage.donors):
            own = score(self.stage, job, state, tile, primary, donor)
            accumulator.blocks[tile.index, j] = kernels.count_ties(own, float(state["thresholds"][donor]))

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_ties_*``."""
        assert accumulator.blocks is not None
        before = np.zeros((job.blocks + 1, len(self.stage.donors)), np.int64)
        np.cumsum(accumulator.blocks.astype(np.int64), axis=0, out=before[1:])
        return {f"_ties_{self.stage.first}": before}


@dataclass(frozen=True, slots=True)
class Kept:
    """How many elements are taken, and their norm, where the threshold alone does not tell."""

    stage: Stage

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "what is taken" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        found = state.get("kept_norms")
        return job.size > 0 and (found is None or bool(np.isnan(found[self.stage.first])))

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A count and a sum of squares per block and donor."""
        return None, (len(self.stage.donors), 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        primary = primary_of(self.stage, job, state, tile)
        for j, donor in enumerate(self.stage.donors):
            own = settled_score(self.stage, job, state, tile, primary, donor)
            least, values = float(state["thresholds"][donor]), tile.values[donor]
            scores.kept_energy(primary, values, own, least, accumulator.blocks[tile.index, j])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``densities`` and ``kept_norms``."""
        assert accumulator.blocks is not None
        energy, found = state[self.stage.energy], kernels.fold(accumulator.blocks)
        norms = np.array([_norm_ratio(kept, whole) for kept, whole in zip(found[:, 1], energy.tolist(), strict=True)])
        return published(self.stage, job, state, densities=found[:, 0] / job.size, kept_norms=norms)
