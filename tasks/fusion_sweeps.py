"""The sweeps of coordinate fusion: row statistics, the exact threshold of the scores, ties, and what is taken.

See :mod:`mergepipe.tasks.fusion`; what ``scope: model`` asks of the whole model is in
:mod:`mergepipe.tasks.fusion_rounds`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fusion_torch, kernels, row_sums, rows, scores, stored_rows
from mergepipe.tasks.blocks import Blocks, block_elements
from mergepipe.tasks.fusion import (
    Settings,
    Stage,
    primary_of,
    score,
    score_rows,
    settled_score,
    stages,
    statistics_of,
)
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, StoredSweep, Tile
from mergepipe.tasks.rows_torch import Scorer
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

IQR_FACTOR = 1.5

UNIT_BITS = 52
"""Sums of squares inside a bin are counted in units of the whole sum over two to this."""


def reductions(settings: Settings, job: Job) -> tuple[Reduction, ...]:
    """The sweeps of all stages, in order."""
    if settings.never_takes(job):
        return ()
    return tuple(sweep for stage in stages(job, settings) for sweep in _sweeps(stage, job))


def row_sweeps(stage: Stage, job: Job) -> Iterator[Reduction]:
    """Those that measure the rows, and where that costs no further read count the scores."""
    if rows.is_wide(job):
        yield from (Extremes(stage), Sums(stage))
    else:
        yield Divergences(stage)


def _sweeps(stage: Stage, job: Job) -> Iterator[Reduction]:
    settings = stage.settings
    yield from row_sweeps(stage, job)
    if settings.scope == "tensor":
        if rows.is_wide(job):
            yield Coarse(stage)
        for level in range(1, levels(job.work)):
            yield Fine(stage, level)
    exact = settings.tie_rule == "index" and settings.scope == "tensor"
    if exact and settings.threshold == "quantile":
        yield Ties(stage)
    if exact or settings.threshold == "iqr" or settings.scope == "model":
        yield Kept(stage)


def _measured(stage: Stage, job: Job, state: State, found: Array, energy: Array) -> State:
    """What the row statistics add to the state, the threshold included where the whole model gives it."""
    means = np.array([math.fsum(one[:, 0]) / len(one) for one in found])
    new = {stage.rows: found, stage.energy: energy, **_published(stage, job, state, row_kl=means)}
    whole = state.get(f"_{stage.selection}_values")
    if whole is not None:
        new |= _published(stage, job, state, thresholds=_thresholds(stage, whole))
    return new


def _thresholds(stage: Stage, found: Array) -> Array:
    """The thresholds of a stage from the order statistics they are made of, shape (donors, ranks)."""
    if stage.settings.threshold == "quantile":
        return found[:, 0]
    with np.errstate(invalid="ignore"):
        spread: Array = found[:, 2] - found[:, 0]
        return found[:, 1] + IQR_FACTOR * spread


def _selection(stage: Stage, job: Job, counts: Array) -> State:
    ranks = np.array([stage.settings.wanted(job.size)] * len(stage.donors))
    return start_selection(stage.selection, ranks, counts)


def _published(stage: Stage, job: Job, state: State, **found: Array) -> State:
    """Statistics of the donors of a stage among those of all."""
    new: State = {}
    for name, values in found.items():
        whole = state.get(name, np.full(job.models, math.nan)).copy()
        whole[stage.first : stage.stop] = values
        new[name] = whole
    return new


@dataclass(frozen=True, slots=True)
class Divergences:
    """The statistics of rows that fit a block, and the coarse histogram of the scores that follow from them."""

    stage: Stage

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "row divergence" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and self.stage.rows not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A histogram per donor; per block and donor the statistics of its rows, and a sum of squares."""
        donors = len(self.stage.donors)
        length = block_elements(job.shape) // rows.row_width(job) * self.stage.settings.columns + 1
        return None if self.stage.settings.scope == "model" else (donors, TOP_BINS), (donors, length)

    def leaves(self, job: Job) -> int:
        """What is known of each row."""
        return _row_values(self.stage, job, self.stage.settings.columns)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        stage, primary = self.stage, primary_of(self.stage, job, state, tile)
        which, width = rows.rows_of(job, tile.start, primary.size)
        settings, count = stage.settings, which.stop - which.start
        every = accumulator.blocks[tile.index]
        for j, donor in enumerate(stage.donors):
            found = every[j, : count * settings.columns].reshape(count, settings.columns)
            every[j, -1] = rows.measure_rows(primary, tile.values[donor], width, *settings.directions, found)
            if accumulator.counts is not None:
                score_rows(settings, primary, tile.values[donor], width, found, tile.scratch[0])
                count_top(tile.scratch[0], accumulator.counts[j])

    def stored(self, job: Job, state: State) -> StoredSweep | None:
        """Measure and count stored bits, where the primary is as it is stored."""
        stage, settings = self.stage, self.stage.settings
        if stage.first or not settings.by_row:
            return None
        width, block = rows.row_width(job), block_elements(job.shape)

        def run(bits: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            assert mine.blocks is not None
            donors, own = tuple(bits[1:])[: stage.stop], mine.blocks[blocks[0] : blocks[1]]
            counts = np.empty((len(donors), 0), np.int64) if mine.counts is None else mine.counts
            directions = settings.directions
            return stored_rows.measure_and_count(
                bits[0], donors, width, block, *directions, settings.always, own, counts
            )

        return run

    def offload(self, job: Job, state: State, accumulator: Accumulator, tiles: Iterable[Tile], scorer: Scorer) -> None:
        """Add a run of tiles with the help of another device."""
        fusion_torch.measure(self.stage, job, state, accumulator, tiles, scorer)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_rows_*``, ``_energy_*`` and the selection."""
        assert accumulator.blocks is not None
        blocks, columns = accumulator.blocks, self.stage.settings.columns
        donors = len(self.stage.donors)
        found = np.swapaxes(blocks[:, :, :-1], 0, 1).reshape(donors, -1, columns)
        found = np.ascontiguousarray(found[:, : job.size // rows.row_width(job)])
        new = _measured(self.stage, job, state, found, kernels.fold(blocks[:, :, -1]))
        if accumulator.counts is not None:
            new |= _selection(self.stage, job, accumulator.counts)
        return new


@dataclass(frozen=True, slots=True)
class Extremes:
    """``_extremes_*``, float64, shape (donors, rows, 7), of rows wider than a block."""

    stage: Stage

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "row extremes" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and self.stage.rows not in state and f"_extremes_{self.stage.first}" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Seven numbers per block and donor."""
        return None, (len(self.stage.donors), rows.EXTREMES)

    def leaves(self, job: Job) -> int:
        """Seven numbers per row and donor."""
        return _row_values(self.stage, job, rows.EXTREMES)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Measure one piece."""
        assert accumulator.blocks is not None
        primary = primary_of(self.stage, job, state, tile)
        for j, donor in enumerate(self.stage.donors):
            rows.measure_extremes(primary, tile.values[donor], accumulator.blocks[tile.index, j])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_extremes_*``."""
        pieces = _by_row(job, accumulator)
        found = np.empty((len(pieces), pieces.shape[1], rows.EXTREMES))
        for j, own in enumerate(pieces):
            rows.fold_extremes(own, found[j])
        return {f"_extremes_{self.stage.first}": found}


@dataclass(frozen=True, slots=True)
class Sums:
    """The statistics of rows wider than a block, given their extremes."""

    stage: Stage

    @property
    def name(self) -> str:
        """For plans and graphs."""
        return "row sums" + self.stage.word

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and self.stage.rows not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Six numbers per block and donor."""
        return None, (len(self.stage.donors), row_sums.SUMS)

    def leaves(self, job: Job) -> int:
        """What is known of each row."""
        return _row_values(self.stage, job, self.stage.settings.columns)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add up one piece."""
        assert accumulator.blocks is not None
        primary, extremes = primary_of(self.stage, job, state, tile), state[f"_extremes_{self.stage.first}"]
        row, width = tile.start // rows.row_width(job), rows.row_width(job)
        for j, donor in enumerate(self.stage.donors):
            out = accumulator.blocks[tile.index, j]
            rows.measure_sums(primary, tile.values[donor], extremes[j, row], width, out)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_rows_*`` and ``_energy_*``."""
        pieces, extremes = _by_row(job, accumulator), state[f"_extremes_{self.stage.first}"]
        settings = self.stage.settings
        found = np.empty((len(pieces), pieces.shape[1], settings.columns))
        for j, own in enumerate(pieces):
            rows.finish_rows(extremes[j], own, rows.row_width(job), *settings.directions, found[j])
        return _measured(self.stage, job, state, found, kernels.fold(np.swapaxes(extremes[:, :, -1], 0, 1)))


def _row_values(stage: Stage, job: Job, columns: int) -> int:
    return len(stage.donors) * -(-job.size // rows.row_width(job)) * columns


def _by_row(job: Job, accumulator: Accumulator) -> Array:
    """The numbers of all pieces, shape (donors, rows, pieces per row, numbers)."""
    blocks = accumulator.blocks
    assert blocks is not None
    count = job.size // rows.row_width(job)
    return np.ascontiguousarray(np.moveaxis(blocks.reshape(count, -1, *blocks.shape[1:]), 2, 0))


@dataclass(frozen=True, slots=True)
class Coarse:
    """The coarse histogram of the scores, where it could not be taken along with the row statistics."""

    stage: Stage

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
        return _selection(self.stage, job, accumulator.counts)


@dataclass(frozen=True, slots=True)
class Fine:
    """The next 16 bits of the scores that a threshold is made of; the last such sweep settles it.

    Where the threshold is a score, and all elements equal to it are taken, the last sweep also finds the norm of what
    is taken: from the sums of squares above the bin of the threshold and at each score inside it.
    """

    stage: Stage
    level: int

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
        """A histogram per donor and rank; where norms are found one of sums of squares, and one such sum per block."""
        donors, weighs = len(self.stage.donors), self._weighs(job)
        return (donors, self.stage.settings.ranks + weighs, FINE_BINS), (donors,) if weighs else None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        primary, found = primary_of(self.stage, job, state, tile), state[f"_{self.stage.selection}_found"]
        for j, donor in enumerate(self.stage.donors):
            own, counts = score(self.stage, job, state, tile, primary, donor), accumulator.counts[j]
            if accumulator.blocks is None:
                for r in range(self.stage.settings.ranks):
                    count_fine(own, int(found[j, r]), self.level, counts[r])
                continue
            bounds = bin_bounds(int(found[j, 0]), self.level, job.work)
            unit, lanes = _unit(float(state[self.stage.energy][j])), np.zeros(kernels.LANES)
            with np.errstate(over="ignore"):
                deltas = np.subtract(tile.values[donor], primary, out=tile.scratch[2])
            scores.sort_energies(deltas, order_keys(own), *bounds, unit, counts, lanes)
            accumulator.blocks[tile.index, j] = scores.added(lanes)

    def stored(self, job: Job, state: State) -> StoredSweep | None:
        """Count and weigh stored bits, where the primary is as it is stored and rows fit a block."""
        stage, settings = self.stage, self.stage.settings
        if stage.first or not settings.by_row or rows.is_wide(job) or not self._weighs(job):
            return None
        width, block = rows.row_width(job), block_elements(job.shape)
        lows = state[f"_{stage.selection}_found"][:, 0] << 16
        units = np.array([_unit(energy) for energy in state[stage.energy].tolist()])

        def run(bits: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            assert mine.blocks is not None
            donors, own = tuple(bits[1:])[: stage.stop], mine.blocks[blocks[0] : blocks[1]]
            found, counts = statistics_of(stage, job, state, blocks), mine.counted
            return scores.sort_stored(bits[0], donors, width, block, found, settings.always, lows, units, own, counts)

        return run

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The selection one level on; in the end what :func:`_settle` makes of it."""
        assert accumulator.counts is not None
        stage, name = self.stage, self.stage.selection
        ranks = stage.settings.ranks
        new = descend(
            accumulator.counts[:, :ranks], state[f"_{name}_found"], state[f"_{name}_rank"], name, self.level + 1
        )
        if not self._last(job):
            return new
        new |= _settle(stage, job, state | new)
        if accumulator.blocks is not None:
            new |= self._norms(job, state | new, accumulator.counts[:, 1], kernels.fold(accumulator.blocks))
        return new

    def _norms(self, job: Job, state: State, inside: Array, above: Array) -> State:
        energy, found = state[self.stage.energy], state[f"_{self.stage.selection}_found"][:, 0]
        kept = np.zeros(len(energy))
        for j, whole in enumerate(energy):
            least = int(found[j] & (FINE_BINS - 1))
            # A score of 0 is never taken.
            taken = int(inside[j, least + (found[j] == 0) :].sum())
            kept[j] = _norm_ratio(above[j] + taken / _unit(float(whole)), float(whole))
        return _published(self.stage, job, state, kept_norms=kept)


def _unit(energy: float) -> float:
    """A power of two that takes a sum of squares to about 2**52; 1 where there is none, or none that is finite."""
    if not 0 < energy < math.inf:
        return 1.0
    return math.ldexp(1.0, min(UNIT_BITS - math.frexp(energy)[1], 1000))


def _norm_ratio(kept: float, whole: float) -> float:
    return math.sqrt(min(kept / whole, 1.0)) if 0 < whole < math.inf else 0.0


def _settle(stage: Stage, job: Job, state: State) -> State:
    """Thresholds, and for a threshold that is a score also how many elements are taken."""
    name, settings = stage.selection, stage.settings
    found = selected(job, state, name)
    if settings.threshold == "iqr":
        return _published(stage, job, state, thresholds=_thresholds(stage, found))
    rank, equal = state[f"_{name}_rank"][:, 0], state[f"_{name}_equal"][:, 0]
    wanted, least = settings.wanted(job.size)[0], found[:, 0]
    exact = (settings.tie_rule == "index") & (rank > 0) & (least > 0)
    dropped = np.where(least > 0, np.where(exact, wanted, wanted - rank), equal)
    return _published(
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
        return _published(self.stage, job, state, densities=found[:, 0] / job.size, kept_norms=norms)
