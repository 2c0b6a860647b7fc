"""The sweeps of coordinate fusion that measure rows; what a block holds whole rows of is scored by the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import fusion_guess, fusion_torch, kernels, row_sums, rows, stored_rows
from mergepipe.tasks.blocks import Blocks, block_elements
from mergepipe.tasks.fusion import Stage, primary_of, score_rows
from mergepipe.tasks.fusion_scores import published, selection, settled, thresholds_of
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, StoredSweep, Tile
from mergepipe.tasks.rows_torch import Scorer
from mergepipe.tasks.select import TOP_BINS, count_top


def row_sweeps(stage: Stage, job: Job) -> Iterator[Reduction]:
    """Those that measure the rows, and where that costs no further read count the scores."""
    if rows.is_wide(job):
        yield from (Extremes(stage), Sums(stage))
    else:
        yield Divergences(stage)


def _measured(stage: Stage, job: Job, state: State, found: Array, energy: Array) -> State:
    """What the row statistics add to the state, the threshold included where the whole model gives it."""
    means = np.array([math.fsum(one[:, 0]) / len(one) for one in found])
    new = {stage.rows: found, stage.energy: energy, **published(stage, job, state, row_kl=means)}
    whole = state.get(f"_{stage.selection}_values")
    if whole is not None:
        new |= published(stage, job, state, thresholds=thresholds_of(stage, whole))
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
        """A histogram per donor; per block and donor the statistics of its rows, and a sum of squares.

        Where a guess is made also a tally per donor; and of each block how much of each row is listed, and where.
        """
        donors, guessed = len(self.stage.donors), fusion_guess.is_made(self.stage, job)
        length = self._columns(job) + 1 + (fusion_guess.row_places(job) if guessed else 0)
        counted = self.stage.settings.scope == "tensor"
        return (1 + guessed, donors, TOP_BINS) if counted else None, (donors, length)

    def _columns(self, job: Job) -> int:
        """Statistics of the rows of a block."""
        return block_elements(job.shape) // rows.row_width(job) * self.stage.settings.columns

    def lists(self, job: Job) -> int:
        """See :mod:`mergepipe.tasks.fusion_guess`."""
        return fusion_guess.most_listed(job) if fusion_guess.is_made(self.stage, job) else 0

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
            if fusion_guess.WINDOW in state:
                where = every[j, self._columns(job) : -1]
                fusion_guess.list_tile(stage, job, state, accumulator, tile, j, found, where)
            elif accumulator.counts is not None:
                score_rows(settings, primary, tile.values[donor], width, found, tile.scratch[0])
                count_top(tile.scratch[0], accumulator.counts[0, j])

    def stored(self, job: Job, state: State) -> StoredSweep | None:
        """Measure and count stored bits, where the primary is as it is stored."""
        stage, settings = self.stage, self.stage.settings
        if stage.first or not settings.by_row:
            return None
        width, block = rows.row_width(job), block_elements(job.shape)

        def run(bits: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            assert mine.blocks is not None
            if fusion_guess.WINDOW in state:
                return fusion_guess.list_stored(stage, job, state, mine, bits, blocks)
            donors, own = tuple(bits[1:])[: stage.stop], mine.blocks[blocks[0] : blocks[1]]
            counts = np.empty((len(donors), 0), np.int64) if mine.counts is None else mine.counts[0]
            directions = settings.directions
            return stored_rows.measure_and_count(
                bits[0], donors, width, block, *directions, settings.always, own, counts
            )

        return run

    def offload(self, job: Job, state: State, accumulator: Accumulator, tiles: Iterable[Tile], scorer: Scorer) -> None:
        """Add a run of tiles with the help of another device."""
        fusion_torch.measure(self.stage, job, state, accumulator, tiles, scorer)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_rows_*``, ``_energy_*`` and the selection; where a guess was right, all that follows from it."""
        assert accumulator.blocks is not None
        blocks, stage, columns = accumulator.blocks, self.stage, self._columns(job)
        found = np.swapaxes(blocks[:, :, :columns], 0, 1).reshape(len(stage.donors), -1, stage.settings.columns)
        found = np.ascontiguousarray(found[:, : job.size // rows.row_width(job)])
        new = _measured(stage, job, state, found, kernels.fold(blocks[:, :, -1]))
        if fusion_guess.WINDOW in state:
            where = blocks[:, :, columns:-1]
            hit = fusion_guess.settle(stage, job, state | new, accumulator, where)
            if hit is None:
                return new | fusion_guess.moved(stage, job, state, accumulator)
            return new | settled(stage, job, state | new, *hit)
        if accumulator.counts is not None:
            new |= selection(stage, job, accumulator.counts[0])
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
