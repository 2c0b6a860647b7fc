"""SLERP: spherical interpolation from the base to one other model, each tensor taken as one vector.

The angle is that between the two vectors; the weights ``sin((1 - t) * angle) / sin(angle)`` and ``sin(t * angle) /
sin(angle)`` go on the vectors as they are, not on their directions, and nearly parallel vectors are interpolated
linearly: all of it as in mergekit. A vector whose norm does not exceed 1e-8 counts as at right angles to everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergepipe.tasks import fused, fused_sums, kernels
from mergepipe.tasks.blocks import Blocks, block_edges
from mergepipe.tasks.method import (
    Accumulator,
    Array,
    Job,
    MergeMethod,
    Paper,
    Reduction,
    State,
    StoredKernel,
    StoredSweep,
    Tile,
)
from mergepipe.tasks.parameter import Parameter

PARALLEL = 0.9995
"""Cosine, in magnitude, above which the interpolation is linear."""

SMALLEST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class Dots:
    """``dots``: float64, shape (3,): primary squared, other squared, primary times other."""

    name: str = "dot products"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "dots" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Three sums per block."""
        return None, (3,)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        assert tile.base is not None
        kernels.dots(tile.base, tile.values[0], accumulator.blocks[tile.index])

    def stored(self, job: Job, state: State) -> StoredSweep:
        """Add up stored bits."""

        def run(rows: Sequence[Array], mine: Accumulator, blocks: Blocks) -> bool:
            assert mine.blocks is not None
            edges = block_edges(job.shape, blocks)
            return fused_sums.dots(rows[0], rows[1], edges - edges[0], mine.blocks[blocks[0] : blocks[1]])

        return run

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``dots``."""
        assert accumulator.blocks is not None
        return {"dots": kernels.fold(accumulator.blocks)}


def coefficients(t: float, dots: Array) -> tuple[float, float]:
    """The factors on the primary and on the other model.

    Examples
    --------
    >>> import numpy as np
    >>> coefficients(0.25, np.array([4.0, 9.0, 6.0]))
    (0.75, 0.25)
    >>> [round(c, 6) for c in coefficients(0.5, np.array([4.0, 9.0, 0.0]))]
    [0.707107, 0.707107]
    """
    left, right = math.sqrt(dots[0]), math.sqrt(dots[1])
    degenerate = left <= SMALLEST_NORM or right <= SMALLEST_NORM
    cosine = 0.0 if degenerate else min(1.0, max(-1.0, float(dots[2]) / left / right))
    if abs(cosine) > PARALLEL:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return (Dots(),)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    a, b = coefficients(job.params["t"], state["dots"])
    kernels.blend(tile.base, tile.values[0], a, b, out)


def _stored(job: Job, state: State) -> StoredKernel:
    factors = coefficients(job.params["t"], state["dots"])
    return lambda rows, out, _: fused.weigh(tuple(rows), factors, 1.0, out)


METHOD = MergeMethod(
    name="slerp",
    title="SLERP",
    summary="interpolates along the arc between the base and one other model",
    base="primary",
    space="weights",
    parameters=(Parameter("t", "number", "0 gives the base, 1 the other model"),),
    kernel=_apply,
    stored=_stored,
    reductions=_reductions,
    min_models=1,
    max_models=1,
    paper=Paper("Animating rotation with quaternion curves", "https://doi.org/10.1145/325165.325242"),
)
