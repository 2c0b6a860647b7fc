"""Exact thresholds of scores in one sweep: a sample says about where they lie, and what lies there is listed.

A score follows from its row's divergence, which is known once the row is read: so the sweep that measures rows could
count scores finely enough at once, if only it knew where. It gets a window for each donor, from the scores of some
blocks (:class:`Sample`): how far off that may be they say themselves, since groups of them have shares of their own
below a threshold. Scores have too many bit patterns to count each, so the differences inside a window are listed row by
row (:class:`mergepipe.tasks.listed.Listed`), and it is counted how many scores lie below: if the threshold lies inside,
it is found among what was listed, and with it the norm of what is taken. If not, it is known now how far off the sample
was, and one more sweep looks there (:class:`mergepipe.tasks.fusion_scores.Again`); else the sure way follows. A wrong
guess costs time, no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import rows, score_lists, scores, stored_rows
from mergepipe.tasks.blocks import Blocks, block_elements, sampled_every
from mergepipe.tasks.fusion import Stage, score_rows, stages
from mergepipe.tasks.method import Accumulator, Array, Job, State, StoredSweep, Tile
from mergepipe.tasks.select import FINE_BINS, TOP_BINS, count_top, locate
from mergepipe.tasks.squares import SQUARES

FEWEST_BLOCKS = 256
"""Blocks from which on a guess is made: fewer give too small a sample, and cost little."""

IN_WINDOWS = 1 / 8
"""Of the elements of a donor, what may be expected in its window."""

LISTED_SHARE, LISTED_ROW = 1 / 128, 64
"""Numbers that may be listed: this share of the elements, and so many of each row. Differences of bfloat16 numbers have
few significant bits: a row has few different ones in a window, and each is listed once."""

NARROWEST = 256
"""Elements of a row from which on a guess is made: of each it is kept how much is listed."""

GROUPS, COARSER = 16, 16
"""A group has a histogram of its own, of so many times fewer bins."""

ERRORS = 4
"""Half the width of a window, in standard errors of the share of scores below a threshold; plus this share, for rows
that are no sample of each other:"""
SPREAD = 1 / 1024

TOGETHER = 4
"""Blocks whose lists are put down at once."""

SAMPLE, WINDOW, MOVED = "_scores_sample", "_scores_window", "_scores_moved"
"""Entries of the state: the histograms of the sample; the smallest key inside and above, int64, (donors, 2); and that
these are for one more sweep."""


def is_made(stage: Stage, job: Job) -> bool:
    """Whether a guess is made at the thresholds of a stage."""
    settings = stage.settings
    plain = settings.by_row and settings.threshold == "quantile" and settings.scope == "tensor"
    alone = len(stages(job, settings)) == 1 and not rows.is_wide(job)
    large = job.halves and job.work == np.float32 and job.blocks >= FEWEST_BLOCKS and rows.row_width(job) >= NARROWEST
    return plain and alone and large and job.listed >= most_listed(job)


def most_listed(job: Job) -> int:
    """How many numbers a guess may list."""
    return math.ceil(job.models * job.size * (LISTED_SHARE + LISTED_ROW / rows.row_width(job)))


@dataclass(frozen=True, slots=True)
class Sample:
    """Histograms of the scores of some blocks, and the windows that follow: ``_scores_sample``, ``_scores_window``."""

    stage: Stage
    name: str = "sample"
    sampled: bool = True

    def needed(self, job: Job, state: State) -> bool:
        """Unless the rows are measured."""
        return self.stage.rows not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """For each donor a histogram, and those of the groups, one behind the other."""
        return (2, job.models, TOP_BINS), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Measure and count a tile."""
        if tile.index % sampled_every(job.blocks):
            return
        assert tile.base is not None
        settings, (which, width) = self.stage.settings, rows.rows_of(job, tile.start, tile.base.size)
        found, counts = np.empty((which.stop - which.start, settings.columns)), np.zeros(TOP_BINS, np.int64)
        for j in range(job.models):
            rows.measure_rows(tile.base, tile.values[j], width, *settings.directions, found)
            score_rows(settings, tile.base, tile.values[j], width, found, tile.scratch[0])
            counts[:] = 0
            count_top(tile.scratch[0], counts)
            _add(accumulator.counted[:, j], tile.index // sampled_every(job.blocks), counts)

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Measure and count the stored bits of some blocks."""
        settings, width, block = self.stage.settings, rows.row_width(job), block_elements(job.shape)
        every, how = sampled_every(job.blocks), (width, block, *settings.directions, settings.always)

        def run(bits: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            for index in range(-(-blocks[0] // every) * every, blocks[1], every):
                at = (index - blocks[0]) * block
                base, *donors = (row[at : at + block] for row in bits)
                found = np.empty((1, job.models, block // width + 1))
                counts = np.zeros((job.models, TOP_BINS), np.int64)
                if not stored_rows.measure_and_count(base, tuple(donors), *how, found, counts):
                    return False
                for j in range(job.models):
                    _add(mine.counted[:, j], index // every, counts[j])
            return True

        return run

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The windows, if what is expected in them can be listed."""
        share = _wanted(self.stage, job) / job.size
        whole, groups = accumulator.counted
        groups = groups.reshape(len(groups), GROUPS, -1)
        found = [_window(one, parts, share) for one, parts in zip(whole, groups, strict=True)]
        return _looking_into(job, whole, found)


def _wanted(stage: Stage, job: Job) -> int:
    return stage.settings.wanted(job.size)[0]


def _looking_into(job: Job, sample: Array, found: Sequence[tuple[int, int] | None]) -> State:
    """The windows of all donors, unless one has none, or more is expected in them than can be listed."""
    windows = [window for window in found if window is not None]
    pairs = zip(sample, windows, strict=False)
    expected = sum(whole[low >> 16 : high >> 16].sum() / whole.sum() for whole, (low, high) in pairs)
    if len(windows) < len(found) or expected > job.models * IN_WINDOWS:
        return {}
    return {SAMPLE: sample, WINDOW: np.array(windows)}


def _add(total: Array, number: int, counts: Array) -> None:
    """Add the histogram of a block to that of all and to that of its group: shape (2, 32768)."""
    total[0] += counts
    total[1].reshape(GROUPS, -1)[number % GROUPS] += counts.reshape(-1, COARSER).sum(axis=1)


def _window(whole: Array, groups: Array, share: float) -> tuple[int, int] | None:
    """Smallest key inside and smallest above of a window that should hold a quantile; None if the sample can't tell."""
    sizes = groups.sum(axis=1)
    if not sizes.all():
        return None
    taken, ends = int(whole.sum()), np.cumsum(whole)
    # Shares of the groups below an edge near the threshold: how unlike they are, they are at the threshold, too.
    at = int(np.searchsorted(ends, share * taken, side="right")) // COARSER
    error = max(
        (groups[:, :edge].sum(axis=1) / sizes).std(ddof=1) / math.sqrt(GROUPS) for edge in (at, at + 1)
    )  # fmt: skip
    return _around(whole, share * taken, (ERRORS * float(error) + SPREAD) * taken)


def _around(whole: Array, place: float, half: float) -> tuple[int, int] | None:
    """The window of the bins within `half` a width in ranks of a place; None if the smallest is that of 0."""
    ends = np.cumsum(whole)
    first, last = np.searchsorted(ends, np.clip([place - half, place + half], 0, ends[-1] - 1), side="right").tolist()
    return (first << 16, last + 1 << 16) if first else None


def row_places(job: Job) -> int:
    """Numbers that say what is listed of a block: two of each of its rows, and where that begins."""
    return 2 * (block_elements(job.shape) // rows.row_width(job)) + 1


def list_tile(
    stage: Stage, job: Job, state: State, accumulator: Accumulator, tile: Tile, j: int, found: Array, where: Array
) -> None:
    """List what lies in the window of a donor.

    Parameters
    ----------
    j : int
        Number of the donor.
    found : float64 ndarray, shape (rows, 1)
        The divergences of the rows of the tile.
    where : float64 ndarray, shape (row_places(job),)
        Gets what :func:`mergepipe.tasks.score_lists.list_row` says of each row and, in the last place, where the list
        begins; -1 if there is no room for it.
    """
    assert tile.base is not None
    assert accumulator.listed is not None
    low, high = (np.int32(key) for key in state[WINDOW][j])
    how, out = (rows.row_width(job), found, stage.settings.always, low, high), tile.scratch[0]
    tally, listed = tallies_of(accumulator)[j], where[:-1].reshape(2, -1)
    size = score_lists.list_tile(tile.base, tile.values[j], *how, tally, listed, out)
    where[-1] = accumulator.listed.put(out[:size])


def list_stored(
    stage: Stage, job: Job, state: State, accumulator: Accumulator, bits: Sequence[Array], blocks: Blocks
) -> bool:
    """Measure a unit of stored rows, and list what lies in the windows; False if a value is not finite."""
    assert accumulator.blocks is not None
    assert accumulator.listed is not None
    settings, width, block = stage.settings, rows.row_width(job), block_elements(job.shape)
    out = np.empty((job.models, min(TOGETHER * block, bits[0].size)), np.float32)
    sizes, tallies = np.zeros(job.models, np.int64), np.zeros((job.models, 2, SQUARES), np.int64)
    for first in range(blocks[0], blocks[1], TOGETHER):
        own = accumulator.blocks[first : min(first + TOGETHER, blocks[1])]
        start = (first - blocks[0]) * block
        base, *donors = (row[start : start + TOGETHER * block] for row in bits)
        how = (width, block, *settings.directions, settings.always, state[WINDOW])
        if not stored_rows.measure_and_list(base, tuple(donors), *how, own, tallies, out, sizes):
            return False
        for j, size in enumerate(sizes):
            put(accumulator, own[:, j, -2], out[j, :size])
    tallies_of(accumulator)[:] += tallies
    return True


def put(accumulator: Accumulator, starts: Array, run: Array) -> None:
    """List the differences of some blocks; `starts`, where each begins among them, becomes where it begins in all."""
    assert accumulator.listed is not None
    start = accumulator.listed.put(run)
    if start < 0:
        starts[:] = -1
    else:
        starts += start


def tallies_of(accumulator: Accumulator) -> Array:
    """Shape (donors, 2, SQUARES); see :func:`mergepipe.tasks.score_lists.list_row`."""
    tallies = accumulator.counted[-1]
    found: Array = tallies.reshape(len(tallies), -1, SQUARES)[:, :2]
    return found


def settle(stage: Stage, job: Job, state: State, accumulator: Accumulator, where: Array) -> tuple[State, Array] | None:
    """The selection, one level done, and what a fine histogram of the scores would count.

    None if some threshold lies outside its window, or if there was no room to list all that lies inside. `where`, shape
    (blocks, donors, row_places(job)), is what :func:`list_tile` leaves.
    """
    assert accumulator.listed is not None
    values, always, tallies = accumulator.listed.values, stage.settings.always, tallies_of(accumulator)
    found = np.empty((3, job.models, 1), np.int64)
    counts = np.zeros((job.models, 2, FINE_BINS + SQUARES), np.int64)
    for j, tally in enumerate(tallies):
        starts, listed = where[:, j, -1].astype(np.int64), where[:, j, :-1].astype(np.int64)
        listed = listed.reshape(len(where), 2, -1)
        below, inside = tally[0, :2].tolist()
        rank = _wanted(stage, job) - below
        if starts.min() < 0 or not 0 <= rank < inside:
            return None
        divergences, top = state[stage.rows][j, :, 0], np.zeros(TOP_BINS, np.int64)
        score_lists.count_listed(values, starts, listed, divergences, always, top)
        found[:, j, 0] = bin_of_rank = locate(top, rank)
        unit = scores.unit_of(float(state[stage.energy][j]))
        score_lists.sort_listed(values, starts, listed, divergences, always, bin_of_rank[0] << 16, unit, counts[j])
        counts[j, 0, FINE_BINS:] += tally[1]
    name = stage.selection
    names = (f"_{name}_found", f"_{name}_rank", f"_{name}_equal")
    return dict(zip(names, found, strict=True)) | {f"_{name}_level": np.array(1)}, counts


def moved(stage: Stage, job: Job, state: State, accumulator: Accumulator) -> State:
    """Windows that should hold the thresholds that were missed, and all of what lies in them."""
    windows: list[tuple[int, int] | None] = []
    for j, (tally, (low, high)) in enumerate(zip(tallies_of(accumulator), state[WINDOW].tolist(), strict=True)):
        sample, (below, inside) = state[SAMPLE][j], tally[0, :2].tolist()
        rank, taken = _wanted(stage, job), int(sample.sum())
        # What lies between an edge and the rank is as the sample has it, which is off by the same below and above.
        edge, counted = (low, below) if rank < below + inside else (high, below + inside)
        place = int(sample[: edge >> 16].sum()) + (rank - counted) * taken / job.size
        windows.append(_around(sample, place, 2 * SPREAD * taken) if 0 <= place < taken else None)
    new = _looking_into(job, state[SAMPLE], windows)
    return new and {**new, MOVED: np.array(True)}
