"""Reinforced Agent Merging Plus, tensor-local: as `ram`, with what only one model changed scaled up.

The factor of a model is ``1 + r * clip(shared / unique, 0, alpha)``: of the elements of this tensor that it changed,
those that others changed, too, over those that it alone changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, MergeMethod, Reduction, State, Tile
from mergepipe.tasks.methods.ram import EPSILON, PAPER, merge_changes
from mergepipe.tasks.parameter import Parameter


@kernel
def _count(values: Array, epsilon: float, changers: Array, counts: Array) -> None:
    """Per model, elements that it changed with others, and alone; `changers` is working memory, shape (n,)."""
    work = values.dtype.type
    zero, one, least = work(0), work(1), work(epsilon)
    changers[:] = zero
    for k in range(values.shape[0]):
        row = values[k]
        for i in range(row.size):
            changers[i] += one if abs(row[i]) > least else zero
    for k in range(values.shape[0]):
        row = values[k]
        shared, alone = np.int32(0), np.int32(0)
        for i in range(row.size):
            changed = abs(row[i]) > least
            shared += np.int32(changed & (changers[i] > one))
            alone += np.int32(changed & (changers[i] == one))
        counts[k, 0] += shared
        counts[k, 1] += alone


@dataclass(frozen=True, slots=True)
class Overlap:
    """``overlap``: int64, shape (models, 2): elements that a model changed with others, and alone."""

    name: str = "overlap"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "overlap" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two counts per model."""
        return (job.models, 2), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        thin(job, state, tile)
        _count(tile.values, job.params["epsilon"], tile.scratch[0], accumulator.counts)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``overlap``."""
        assert accumulator.counts is not None
        return {"overlap": accumulator.counts}


def _factors(job: Job, overlap: Array) -> Array:
    shared, alone = overlap[:, 0], overlap[:, 1]
    # Where nothing is unique the ratio is without bound, unless nothing is shared either.
    ratio = np.where(alone > 0, shared / np.maximum(alone, 1), np.where(shared > 0, np.inf, 0.0))
    found: Array = 1 + job.params["r"] * np.clip(ratio, 0, job.params["alpha"])
    return found


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return (*family.reductions(job), Overlap())


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    thin(job, state, tile)
    merge_changes(job, tile, _factors(job, state["overlap"]), out)


METHOD = MergeMethod(
    name="ramplus_tl",
    title="Reinforced Agent Merging Plus (tensor-local)",
    summary="adds what only one model changed, scaled by its overlap with others, and averages what several changed",
    base="required",
    space="deltas",
    parameters=(
        EPSILON,
        Parameter("r", "number", "how much the overlap counts", default=0.1),
        Parameter("alpha", "number", "largest overlap ratio that counts", default=0.2, minimum=0),
    ),
    kernel=_apply,
    reductions=_reductions,
    scratch_rows=1,
    paper=PAPER,
)
