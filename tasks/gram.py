"""Dot products of all pairs of models, of whole tensors or of their rows; and sums weighted by what follows from them.

Spherical methods need no more: whatever they do happens in the space that the models span, where a vector is its
coefficients, and the Gram matrix holds all lengths and angles. So one sweep and one weighted sum do for all of them,
and everything in between is float64 on a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.blocks import BLOCK_ELEMENTS
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Accumulator, Array, Job, State, Tile
from mergepipe.tasks.sparsify import SPARSIFIERS


@kernel
def grams(values: Array, width: int, out: Array) -> None:
    """Gram matrices of `values`, shape (models, rows * width), row by row.

    Parameters
    ----------
    out : float64 ndarray, shape (rows, models, models)
    """
    lanes = np.zeros(LANES)
    for row in range(out.shape[0]):
        for i in range(values.shape[0]):
            left = values[i][row * width : (row + 1) * width]
            for j in range(i, values.shape[0]):
                right = values[j][row * width : (row + 1) * width]
                lanes[:] = 0
                for start in range(0, width, LANES):
                    a, b = left[start : start + LANES], right[start : start + LANES]
                    for lane in range(a.size):
                        lanes[lane] += np.float64(a[lane]) * np.float64(b[lane])
                out[row, i, j] = out[row, j, i] = lanes.sum()


@kernel
def _sum_rows(values: Array, width: int, factors: Array, out: Array) -> None:
    for row in range(factors.shape[0]):
        total = out[row * width : (row + 1) * width]
        total[:] = 0
        for k in range(values.shape[0]):
            factor = out.dtype.type(factors[row, k])
            part = values[k][row * width : (row + 1) * width]
            for i in range(total.size):
                total[i] += factor * part[i]


def thin(job: Job, state: State, tile: Tile) -> None:
    """What the recipe's sparsifier does, in place; nothing where there is none."""
    SPARSIFIERS[job.sparsify].mask(job, state, tile)


@dataclass(frozen=True, slots=True)
class Gram:
    """``gram``: float64, shape (models, models), of the whole tensor; by row ``_row_grams``, (rows, models, models)."""

    by_row: bool = False

    @property
    def name(self) -> str:
        """A word for it."""
        return "dot products of rows" if self.by_row else "dot products"

    @property
    def _key(self) -> str:
        return "_row_grams" if self.by_row else "gram"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run; rows that lie within a tile are looked at when they are needed."""
        return job.size > 0 and self._key not in state and not (self.by_row and job.shape[-1] <= BLOCK_ELEMENTS)

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """A matrix per block."""
        return None, (job.models, job.models)

    def leaves(self, job: Job) -> int:
        """A matrix; by row one for each row that is wider than a tile."""
        if not self.by_row:
            return job.models**2
        return job.models**2 * job.size // job.shape[-1] if job.shape and job.shape[-1] > BLOCK_ELEMENTS else 0

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        thin(job, state, tile)
        grams(tile.values, tile.values.shape[1], accumulator.blocks[tile.index : tile.index + 1])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The matrices."""
        assert accumulator.blocks is not None
        if not self.by_row:
            return {self._key: kernels.fold(accumulator.blocks)}
        pieces = -(-job.shape[-1] // BLOCK_ELEMENTS)
        rows = accumulator.blocks.reshape(-1, pieces, job.models, job.models)
        return {self._key: np.stack([kernels.fold(row) for row in rows])}


def row_width(job: Job, tile: Tile) -> int:
    """Elements of a row that lie in a tile: all of them, or, of a row that is wider than a tile, the tile."""
    return min(job.shape[-1], int(tile.values.shape[1]))


def row_grams(job: Job, state: State, tile: Tile) -> Array:
    """Gram matrix of each row in a tile: float64, shape (rows in the tile, models, models)."""
    if "_row_grams" in state:
        row = tile.start // job.shape[-1]
        found: Array = state["_row_grams"][row : row + 1]
        return found
    width = row_width(job, tile)
    out = np.empty((tile.values.shape[1] // width, job.models, job.models))
    grams(tile.values, width, out)
    return out


def add_up(job: Job, tile: Tile, factors: Array, out: Array) -> None:
    """``out = sum_k factors[k] * values[k]``, on the base if there is one; `factors` of shape (models,)."""
    if job.models <= kernels.FEW:
        kernels.sum_few(tuple(tile.values), tuple(factors.tolist()), 1.0, out)
    else:
        kernels.sum_many(tile.values, factors.astype(job.work), 1.0, out)
    if tile.base is not None:
        kernels.put_on_base(tile.base, 1.0, out)


def add_up_rows(job: Job, tile: Tile, factors: Array, out: Array) -> None:
    """As :func:`add_up`, with factors of each row in the tile: shape (rows in the tile, models)."""
    _sum_rows(tile.values, row_width(job, tile), factors, out)
    if tile.base is not None:
        kernels.put_on_base(tile.base, 1.0, out)
