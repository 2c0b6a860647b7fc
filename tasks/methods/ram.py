"""Reinforced Agent Merging: what only one model changed is added, what several changed is averaged over these.

A model takes part in an element where its task vector exceeds `epsilon` in magnitude.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, State, Tile
from mergepipe.tasks.parameter import Parameter

EPSILON = Parameter("epsilon", "number", "magnitude above which an element counts as changed", default=1e-5, minimum=0)
PAPER = Paper("Reinforced Agent Merging", "https://arxiv.org/abs/2601.13572")


@kernel
def _merge(base: Array, values: Array, factors: Array, epsilon: float, out: Array) -> None:
    """In float64, rounded once; `factors`, shape (models,), go on what only one model changed."""
    least = out.dtype.type(epsilon)
    count, alone, total = np.empty(kernels.STRIP), np.empty(kernels.STRIP), np.empty(kernels.STRIP)
    for start in range(0, out.size, kernels.STRIP):
        merged, below = out[start : start + kernels.STRIP], base[start : start + kernels.STRIP]
        count[:] = 0
        alone[:] = 0
        total[:] = 0
        for k in range(values.shape[0]):
            factor, row = factors[k], values[k][start : start + kernels.STRIP]
            for i in range(merged.size):
                changed = abs(row[i]) > least
                value = np.float64(row[i]) if changed else 0.0
                count[i] += 1.0 if changed else 0.0
                total[i] += value
                alone[i] += factor * value
        for i in range(merged.size):
            merged[i] = np.float64(below[i]) + (total[i] / count[i] if count[i] > 1.0 else alone[i])


def merge_changes(job: Job, tile: Tile, factors: Array, out: Array) -> None:
    """The kernel of both variants, for values that are thinned already."""
    assert tile.base is not None
    _merge(tile.base, tile.values, factors, job.params["epsilon"], out)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    thin(job, state, tile)
    merge_changes(job, tile, np.ones(job.models), out)


METHOD = MergeMethod(
    name="ram",
    title="Reinforced Agent Merging",
    summary="adds what only one model changed and averages what several changed",
    base="required",
    space="deltas",
    parameters=(EPSILON,),
    kernel=_apply,
    reductions=family.reductions,
    paper=PAPER,
)
