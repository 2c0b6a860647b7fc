"""How a merge has changed a tensor: norm, row divergence and row entropy of the output against the base or primary.

With ``p`` and ``q`` the softmaxed rows of the base A and of the output W, and ``r = log(q / p)``, the entropy of q less
that of p is ``-KL(q || p) - sum(p * expm1(r) * log p)``. Since ``p * expm1(r) = q - p`` adds up to zero, any constant
may be added to ``log p``: with the logarithm of the row's width it is small, and little cancels. The rows are measured
as SCF-RKL measures them (:mod:`mergepipe.tasks.rows`), W standing for the donor; one more sweep adds up the entropies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import kernels, row_sums, rows
from mergepipe.tasks.fusion import Settings, Stage
from mergepipe.tasks.fusion_rows import row_sweeps
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, Tile

# Elementwise scores need all statistics of a row; the scope of the whole model leaves the histogram out.
STAGE = Stage(Settings(importance="pointwise", scope="model"), 0, 1)

FOUND = ("norm", "relative_norm", "row_kl", "entropy")
"""Entries of ``change``: norm of W - A, the same over that of A, and the means over the rows."""


def reductions(job: Job) -> tuple[Reduction, ...]:
    """The sweeps over a tensor whose base is A, and whose only model is W; they leave ``change`` in the state."""
    return (*row_sweeps(STAGE, job), Entropy())


@kernel
def entropy_terms(a: Array, b: Array, width: int, found: Array, out: Array) -> None:
    """Sums of ``(q - p) * (log p + log n)``, and of the squares of `a`, over whole rows or a piece of one.

    Parameters
    ----------
    a, b : ndarray, shape (rows * width,)
    width : int
    found : float64 ndarray, shape (rows, 3)
        Their :data:`mergepipe.tasks.rows.STATISTICS`, the second less the logarithm of the whole row's width.
    out : float64 ndarray, shape (2,)
    """
    total, squares = 0.0, 0.0
    for row in range(found.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        kl, normaliser, moved = found[row, 0], found[row, 1], found[row, 2]
        for i in range(x.size):
            squares += np.float64(x[i]) * np.float64(x[i])
        if kl == 0.0:
            continue
        for i in range(x.size):
            level = np.float64(x[i]) - normaliser
            r = np.float64(y[i] - x[i]) - moved
            p = math.exp(level)
            grown = p * math.expm1(r) if abs(r) <= row_sums.NEAR_DELTA else math.exp(level + r) - p
            total += grown * level
    out[0], out[1] = total, squares


@dataclass(frozen=True, slots=True)
class Entropy:
    """``change``, float64, in the order of :data:`FOUND`."""

    name: str = "row entropy"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "change" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block."""
        return None, (2,)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        assert tile.base is not None
        which, width = rows.rows_of(job, tile.start, tile.base.size)
        found = state[STAGE.rows][0, which].copy()
        # From here on p stands for width * p: the sums are divided by the width in the end.
        found[:, 1] -= math.log(rows.row_width(job))
        entropy_terms(tile.base, tile.values[0], width, found, accumulator.blocks[tile.index])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The means over the rows."""
        assert accumulator.blocks is not None
        total, squares = kernels.fold(accumulator.blocks).tolist()
        count, norm = job.size // rows.row_width(job), math.sqrt(float(state[STAGE.energy][0]))
        divergence = float(state["row_kl"][0])
        entropy = -divergence - total / rows.row_width(job) / count
        relative = norm / math.sqrt(squares) if squares > 0 else math.nan
        return {"change": np.array([norm, relative, divergence, entropy])}
