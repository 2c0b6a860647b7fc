"""Dot products of two models along the first axis: of matrices, column by column.

A tile holds a few elements of every column, and partial sums per block would be as large as the tensor. So products
are added as fixed-point integers, three limbs of 40 bits: sums of integers are exact in any order, and the error is
that of dropping what lies 120 bits below the largest product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, State, Tile

LIMBS = 3
LIMB = 2.0**40


def column_count(job: Job) -> int:
    """How many columns the tensor has: its size without the first axis."""
    return math.prod(job.shape[1:])


@dataclass(frozen=True, slots=True)
class Peaks:
    """``_peaks``: float64, shape (2,), a power of two above the magnitudes of each model."""

    name: str = "largest magnitudes"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "_peaks" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """One maximum per block and model."""
        return None, (job.models,)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Look at one tile."""
        assert accumulator.blocks is not None
        thin(job, state, tile)
        accumulator.blocks[tile.index] = np.abs(tile.values).max(axis=1)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_peaks``; 1 for a model that is zero."""
        assert accumulator.blocks is not None
        return {
            "_peaks": np.array([2.0 ** math.frexp(top)[1] if top else 1.0 for top in accumulator.blocks.max(axis=0)])
        }


@kernel
def _count(left: Array, right: Array, first: int, a: float, b: float, pair: int, counts: Array) -> None:
    column = first
    for i in range(left.size):
        rest = (np.float64(left[i]) / a) * (np.float64(right[i]) / b)
        for limb in range(LIMBS):
            rest *= LIMB
            whole = np.trunc(rest)
            counts[column, pair, limb] += np.int64(whole)
            rest -= whole
        column = column + 1 if column + 1 < counts.shape[0] else 0


@dataclass(frozen=True, slots=True)
class ColumnDots:
    """``_columns``: float64, shape (columns, 3): left, right squared, left times right; after :class:`Peaks`."""

    name: str = "dot products of columns"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "_columns" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The limbs of three sums per column."""
        return (column_count(job), 3, LIMBS), None

    def leaves(self, job: Job) -> int:
        """Three sums per column."""
        return 3 * column_count(job)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.counts is not None
        thin(job, state, tile)
        first = tile.start % column_count(job)
        (left, right), (a, b) = tile.values, state["_peaks"].tolist()
        _count(left, left, first, a, a, 0, accumulator.counts)
        _count(right, right, first, b, b, 1, accumulator.counts)
        _count(left, right, first, a, b, 2, accumulator.counts)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_columns``."""
        assert accumulator.counts is not None
        a, b = state["_peaks"]
        sums = (accumulator.counts / LIMB ** np.arange(1, LIMBS + 1)).sum(axis=-1)
        return {"_columns": sums * np.array([a * a, b * b, a * b])}


@kernel
def blend_columns(left: Array, right: Array, first: int, factors: Array, out: Array) -> None:
    """``out = factors[c, 0] * left + factors[c, 1] * right``, with `first` the column c of the first element."""
    column = first
    for i in range(out.size):
        out[i] = out.dtype.type(factors[column, 0]) * left[i] + out.dtype.type(factors[column, 1]) * right[i]
        column = column + 1 if column + 1 < factors.shape[0] else 0
