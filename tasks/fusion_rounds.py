"""Coordinate fusion with one threshold for the whole model.

A round counts the scores of all tensors of the group, and measures the rows of each of them anew to do so: nothing but
counts outlives a tensor's turn. Where donors are folded in, the thresholds of one come before the rounds of the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks.fusion import Settings, Stage, primary_of, score, stages
from mergepipe.tasks.fusion_rows import row_sweeps
from mergepipe.tasks.method import Array, Job, Reduction, Round, State, Tile
from mergepipe.tasks.whole_select import Scores, selection


def rounds(settings: Settings, jobs: Sequence[Job], excluded: Callable[[Job], bool]) -> tuple[Round, ...]:
    """The rounds that find the thresholds of the whole model, stage by stage; none for ``scope: tensor``.

    Parameters
    ----------
    settings : Settings
    jobs : sequence of Job
        The group.
    excluded : callable
        Tensors whose elements do not count.

    Raises
    ------
    RecipeError
        For ``tie_rule: index``: the exact count of a whole model is not made.
    """
    if settings.scope == "tensor":
        return ()
    if settings.tie_rule == "index" and settings.threshold == "quantile":
        message = (
            "makes the exact count in each tensor, `scope: model` has one threshold for all: leave one of them out"
        )
        raise RecipeError([Fault("$.parameters.tie_rule", message)])
    size = sum(job.size for job in jobs if not excluded(job))
    if size == 0:
        return ()
    every = stages(jobs[0], settings)
    found: list[Round] = []
    for number, stage in enumerate(every):
        wanted = np.array([settings.wanted(size)] * len(stage.donors))
        before = _measure_before(every[: number + 1], excluded)
        found += selection(jobs, stage.selection, wanted, _scores_of(stage, excluded), before)
    return tuple(found)


def _measure_before(done: Sequence[Stage], excluded: Callable[[Job], bool]) -> Callable[[Job], tuple[Reduction, ...]]:
    def before(job: Job) -> tuple[Reduction, ...]:
        if excluded(job) or done[0].settings.never_takes(job):
            return ()
        return tuple(sweep for stage in done for sweep in row_sweeps(stage, job))

    return before


def _scores_of(stage: Stage, excluded: Callable[[Job], bool]) -> Scores:
    def scores(job: Job, state: State, tile: Tile) -> Array:
        found = tile.values[: len(stage.donors)]
        if excluded(job):
            return found[:, :0]
        if stage.settings.never_takes(job):
            found[:] = 0
            return found
        primary = primary_of(stage, job, state, tile)
        for j, donor in enumerate(stage.donors):
            # A donor's values make room for its scores, or those of one that is not looked at again.
            found[j] = score(stage, job, state, tile, primary, donor)
        return found

    return scores
