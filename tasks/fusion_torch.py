"""Coordinate fusion on a GPU: the sweep that measures rows and counts or lists scores, a batch of blocks at a time.

It is the one sweep whose arithmetic, two exponentials per element in float64, outweighs its reading. What it leaves is
what :class:`mergepipe.tasks.fusion_rows.Divergences` leaves, bit for bit, so all later sweeps are the CPU's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from mergepipe.tasks import rows
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.fusion import Settings, Stage, primary_of
from mergepipe.tasks.fusion_guess import WINDOW, put, tallies_of
from mergepipe.tasks.method import Accumulator, Array, Job, State, Tile
from mergepipe.tasks.rows_torch import (
    Lane,
    Scorer,
    batch_blocks,
    block_energies,
    count_top,
    list_scores,
    measure_rows,
    score_delta,
    score_points,
)

if TYPE_CHECKING:
    import torch


def measure(
    stage: Stage, job: Job, state: State, accumulator: Accumulator, tiles: Iterable[Tile], scorer: Scorer
) -> None:
    """What ``Divergences.update`` does with each tile, for a run of tiles in ascending order.

    The lane is kept until the last of them: whoever asked for one with windows of the reader in hand would keep them
    from those who have all the lanes and wait for windows.
    """
    left = iter(tiles)
    length, work = block_elements(job.shape), job.work
    at_once = batch_blocks(len(stage.donors) + 1, length, work.itemsize)
    with scorer.lane() as lane:
        staged = lane.stage(len(stage.donors) + 1, at_once * length, work)
        while filled := list(_stage_tiles(stage, job, state, islice(left, at_once), staged)):
            values = staged[:, : sum(n for _, n in filled)]
            _measure_batch(stage, job, state, accumulator, filled[0][0], values, lane)


def _stage_tiles(
    stage: Stage, job: Job, state: State, tiles: Iterable[Tile], staged: Array
) -> Iterator[tuple[int, int]]:
    """Copy primary and donors of some tiles; number and size of each."""
    at = 0
    for tile in tiles:
        n = tile.values.shape[1]
        staged[0, at : at + n] = primary_of(stage, job, state, tile)
        staged[1:, at : at + n] = tile.values[stage.first : stage.stop]
        at += n
        yield tile.index, n


def _measure_batch(
    stage: Stage, job: Job, state: State, accumulator: Accumulator, first: int, staged: Array, lane: Lane
) -> None:
    """Measure some blocks, the first of which is number `first`; shape (1 + donors, n)."""
    assert accumulator.blocks is not None
    settings, width = stage.settings, rows.row_width(job)
    per_block = block_elements(job.shape) // width
    primary = lane.send(staged[0]).reshape(-1, width)
    for j in range(len(stage.donors)):
        donor = lane.send(staged[j + 1]).reshape(-1, width)
        found, squares = measure_rows(primary, donor, *settings.directions)
        energies = block_energies(squares, per_block)
        for number, energy in enumerate(energies.tolist()):
            part = found[number * per_block : (number + 1) * per_block, : settings.columns]
            own = accumulator.blocks[first + number, j]
            own[: part.size] = part.reshape(-1)
            own[-1] = energy
        if accumulator.counts is None:
            continue
        own_scores = _scores(settings, primary, donor, found)
        if WINDOW in state:
            last = first + len(energies)
            where = accumulator.blocks[first:last, j, per_block * settings.columns : -1]
            tally, (low, high) = tallies_of(accumulator)[j], state[WINDOW][j].tolist()
            run = list_scores(primary, donor, own_scores, found[:, 0], low, high, tally, where)
            put(accumulator, where[:, -1], run)
        else:
            count_top(own_scores, accumulator.counts[0, j])


def _scores(settings: Settings, primary: torch.Tensor, donor: torch.Tensor, found: Array) -> torch.Tensor:
    import torch

    statistics = torch.from_numpy(found).to(primary.device)
    always = settings.zero_kl == "abs"
    if settings.importance == "delta_kl":
        return score_delta(primary, donor, statistics[:, 0], always)
    return score_points(primary, donor, statistics, *settings.directions, always)
