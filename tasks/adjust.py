"""What has to be done to a stored tensor before it is the model's weight: scales multiplied in, an adapter added.

Some inputs are not just bytes. The codes of an 8-bit weight mean nothing without their scales, and a model with a LoRA
adapter has weights that stand in no file: ``W + scaling * B @ A``. Such a tensor has *adjustments*, plain records that
the planner makes; an :class:`Adjuster` carries them out on every block, right after it has been decoded to the working
type and before anything else sees it. No method knows of it, and no tensor is ever held as a whole.

Every element is computed alone, from its row, its column and the small arrays (scales, factors) that the adjuster holds
while its tensor is worked on: products of a low-rank update are added up in the order of the rank, in the working type.
So neither the cut into blocks nor the number of workers changes a bit.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mergepipe.tasks.blocks import BLOCK_ELEMENTS, block_bounds, block_count
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array

COLUMNS = 1024
"""Columns of a low-rank update computed at once: all ranks of so many stay in the second-level cache."""

Read = Callable[[str, int, int, Array], None]
"""``read(name, start, stop, out)`` decodes elements `start` to `stop` of a tensor of the same model into `out`."""


@dataclass(frozen=True, slots=True)
class Factor:
    """A small tensor that an adjustment needs.

    Attributes
    ----------
    name : str
        In the model's hierarchy, where it stands beside the weights.
    dtype : str
        Its safetensors dtype.
    transposed : bool
        Whether its rows are the columns that are meant.
    """

    name: str
    dtype: str
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class BlockScales:
    """Multiply every block of a weight by a scale of its own, as 8-bit checkpoints are stored.

    Attributes
    ----------
    scales : Factor
    grid : (int, int)
        Scales along the rows and the columns of one matrix; a weight of more dimensions is a stack of matrices.
    block : (int, int)
        Rows and columns that one scale is for; the last ones may have fewer.
    """

    scales: Factor
    grid: tuple[int, int]
    block: tuple[int, int]
    kind: Literal["block-scales"] = "block-scales"


@dataclass(frozen=True, slots=True)
class LowRank:
    """Add ``scaling * left @ right``; then, for DoRA, bring each row or column to a length of its own.

    Attributes
    ----------
    left : Factor
        (rows, rank), where rows are the weight's first dimension.
    right : Factor
        (rank, width), where the width is all of its other dimensions.
    rank : int
    scaling : float
    magnitude : Factor or None
        Lengths of the rows or columns.
    along : {'rows', 'columns'}
        What those are the lengths of.
    """

    left: Factor
    right: Factor
    rank: int
    scaling: float
    magnitude: Factor | None = None
    along: Literal["rows", "columns"] = "rows"
    kind: Literal["low-rank"] = "low-rank"


Adjustment = BlockScales | LowRank


def held_bytes(adjustments: Sequence[Adjustment], shape: tuple[int, ...], itemsize: int) -> int:
    """Memory that an adjuster takes while its tensor is worked on.

    Parameters
    ----------
    adjustments : sequence of Adjustment
    shape : tuple of int
        Of the tensor.
    itemsize : int
        Bytes of the working type.

    Examples
    --------
    >>> factor = Factor("a", "F32")
    >>> held_bytes([LowRank(factor, factor, 8, 1.0)], (100, 50), 4) == 4 * 8 * 150 + 2 * 4 * BLOCK_ELEMENTS
    True
    """
    if not adjustments:
        return 0
    rows, width = _matrix(shape)
    held = 2 * itemsize * BLOCK_ELEMENTS  # a block that is looked at, or a piece of a factor that is turned round
    for one in adjustments:
        if isinstance(one, BlockScales):
            held += itemsize * _scales(one, shape)
        else:
            held += itemsize * one.rank * (rows + width)
            held += 0 if one.magnitude is None else 3 * 8 * (rows if one.along == "rows" else width)
    return held


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor as a low-rank update sees it: its first dimension, and the product of the others."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def _scales(adjustment: BlockScales, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-2]) * adjustment.grid[0] * adjustment.grid[1]


class Adjuster:
    """Carries out the adjustments of one tensor. Safe to use from several threads at once.

    Parameters
    ----------
    adjustments : sequence of Adjustment
        In the order in which they are done.
    name : str
        The tensor's own name in its model.
    shape : tuple of int
    work : numpy dtype
        Type of what is held.
    read : callable
        See :data:`Read`.
    """

    def __init__(
        self,
        adjustments: Sequence[Adjustment],
        name: str,
        shape: tuple[int, ...],
        work: np.dtype[np.generic],
        read: Read,
    ) -> None:
        self._adjustments = tuple(adjustments)
        self._name = name
        self._shape = shape
        self._work = work
        self._read = read
        self._lock = threading.Lock()
        self._steps: list[Callable[[int, Array], None]] | None = None

    def apply(self, start: int, values: Array) -> int:
        """Adjust the elements from `start` on, in place.

        Parameters
        ----------
        start : int
            Flat index of the first one.
        values : float32 or float64 ndarray, shape (n,)
            As stored; overwritten.

        Returns
        -------
        int
            Index of the first NaN or infinity among the results, -1 if there is none.
        """
        for step in self._ready():
            step(start, values)
        return int(first_non_finite(values))

    def release(self) -> None:
        """Let the memory go; what is needed again is read again."""
        with self._lock:
            self._steps = None

    def _ready(self) -> list[Callable[[int, Array], None]]:
        with self._lock:
            if self._steps is None:
                steps: list[Callable[[int, Array], None]] = []
                for one in self._adjustments:
                    if isinstance(one, BlockScales):
                        steps.append(self._scaling(one))
                    else:
                        steps.extend(self._updates(one, steps))
                self._steps = steps
            return self._steps

    def _scaling(self, one: BlockScales) -> Callable[[int, Array], None]:
        scales = self._flat(one.scales, _scales(one, self._shape), self._work)
        rows, width = self._shape[-2:]

        def step(start: int, values: Array) -> None:
            scale_blocks(values, start, rows, width, scales, *one.grid, *one.block)

        return step

    def _updates(
        self, one: LowRank, before: Sequence[Callable[[int, Array], None]]
    ) -> list[Callable[[int, Array], None]]:
        rows, width = _matrix(self._shape)
        left = self._turned(one.left, rows, one.rank)
        left *= self._work.type(one.scaling)
        right = self._turned(one.right, one.rank, width)

        def add(start: int, values: Array) -> None:
            add_low_rank(values, start, left, right)

        if one.magnitude is None:
            return [add]
        by_row = one.along == "rows"
        factors = self._flat(one.magnitude, rows if by_row else width, np.dtype(np.float64))
        factors /= self._lengths([*before, add], rows if by_row else width, by_row=by_row)

        def stretch(start: int, values: Array) -> None:
            scale_lines(values, start, width, factors, by_row)

        return [add, stretch]

    def _lengths(self, steps: Sequence[Callable[[int, Array], None]], count: int, *, by_row: bool) -> Array:
        """Euclidean length of every row or column of what the steps make of the tensor: one read of all of it."""
        squares = np.zeros(count)
        values = np.empty(BLOCK_ELEMENTS, self._work)
        for index in range(block_count(self._shape)):
            start, stop = block_bounds(self._shape, index)
            block = values[: stop - start]
            self._read(self._name, start, stop, block)
            for step in steps:
                step(start, block)
            add_squares(block, start, _matrix(self._shape)[1], squares, by_row)
        return np.sqrt(squares)

    def _flat(self, factor: Factor, size: int, dtype: np.dtype[np.generic]) -> Array:
        out: Array = np.empty(size, dtype)
        for start in range(0, size, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, size)
            self._read(factor.name, start, stop, out[start:stop])
        return out

    def _turned(self, factor: Factor, rows: int, columns: int) -> Array:
        """A factor as a matrix of this shape, contiguous."""
        if not factor.transposed:
            return self._flat(factor, rows * columns, self._work).reshape(rows, columns)
        out: Array = np.empty((rows, columns), self._work)
        piece: Array = np.empty(BLOCK_ELEMENTS, self._work)
        length = min(rows, BLOCK_ELEMENTS)
        together = max(1, BLOCK_ELEMENTS // max(1, rows))
        for column in range(0, columns, together):
            count = min(together, columns - column)
            for start in range(0, rows, length):
                stop = min(start + length, rows)
                part = piece[: count * (stop - start)]
                self._read(factor.name, column * rows + start, column * rows + start + part.size, part)
                out[start:stop, column : column + count] = part.reshape(count, stop - start).T
        return out


@kernel
def first_non_finite(values: Array) -> int:
    """Index of the first NaN or infinity, -1 if there is none."""
    finite = True
    for i in range(values.size):
        finite &= abs(values[i]) < np.inf
    if not finite:
        for i in range(values.size):
            if not abs(values[i]) < np.inf:
                return i
    return -1


@kernel
def scale_blocks(
    values: Array,
    start: int,
    rows: int,
    width: int,
    scales: Array,
    grid_rows: int,
    grid_columns: int,
    block_rows: int,
    block_columns: int,
) -> None:
    """Multiply each element by the scale of its block.

    Parameters
    ----------
    values : float ndarray, shape (n,)
        Elements from the flat index `start` on of a stack of matrices (rows, width). Overwritten.
    scales : float ndarray, shape (matrices * grid_rows * grid_columns,)
    grid_rows, grid_columns, block_rows, block_columns : int
        As in :class:`BlockScales`.
    """
    at = 0
    while at < values.size:
        line = (start + at) // width
        column = (start + at) % width
        first = ((line // rows) * grid_rows + (line % rows) // block_rows) * grid_columns
        # To the end of the block, of the row or of the values, whichever comes first.
        stop = min(at + min(width, (column // block_columns + 1) * block_columns) - column, values.size)
        scale = scales[first + column // block_columns]
        for i in range(at, stop):
            values[i] *= scale
        at = stop


@kernel
def add_low_rank(values: Array, start: int, left: Array, right: Array) -> None:
    """Add ``left @ right``, products added up in the order of the rank.

    Parameters
    ----------
    values : float ndarray, shape (n,)
        Elements from the flat index `start` on of a matrix as wide as `right`. Overwritten.
    left : float ndarray, shape (rows, rank)
    right : float ndarray, shape (rank, width)
    """
    rank, width = right.shape
    if values.size == 0:
        return
    end = start + values.size
    total = np.empty(COLUMNS, right.dtype)
    for low in range(0, width, COLUMNS):
        high = min(low + COLUMNS, width)
        for row in range(start // width, (end - 1) // width + 1):
            first, after = max(low, start - row * width), min(high, end - row * width)
            if first >= after:
                continue
            part = total[: after - first]
            part[:] = 0
            k = 0
            while k + 4 <= rank:
                a, b, c, d = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
                w, x = right[k, first:after], right[k + 1, first:after]
                y, z = right[k + 2, first:after], right[k + 3, first:after]
                for i in range(part.size):
                    part[i] = (((part[i] + a * w[i]) + b * x[i]) + c * y[i]) + d * z[i]
                k += 4
            while k < rank:
                a, w = left[row, k], right[k, first:after]
                for i in range(part.size):
                    part[i] = part[i] + a * w[i]
                k += 1
            out = values[row * width + first - start : row * width + after - start]
            for i in range(part.size):
                out[i] += part[i]


@kernel
def add_squares(values: Array, start: int, width: int, squares: Array, by_row: bool) -> None:
    """Add the squares of elements to the sum of their row, or of their column.

    Parameters
    ----------
    values : float ndarray, shape (n,)
        Elements from the flat index `start` on of a matrix of this width.
    squares : float64 ndarray, shape (rows,) or (width,)
        Added to, in the order of the elements.
    """
    at = 0
    while at < values.size:
        row, column = (start + at) // width, (start + at) % width
        stop = min(at + width - column, values.size)
        if by_row:
            total = squares[row]
            for i in range(at, stop):
                total += np.float64(values[i]) * np.float64(values[i])
            squares[row] = total
        else:
            for i in range(at, stop):
                squares[column + i - at] += np.float64(values[i]) * np.float64(values[i])
        at = stop


@kernel
def scale_lines(values: Array, start: int, width: int, factors: Array, by_row: bool) -> None:
    """Multiply each element by the factor of its row, or of its column.

    Parameters
    ----------
    values : float ndarray, shape (n,)
        Elements from the flat index `start` on of a matrix of this width. Overwritten.
    factors : float64 ndarray, shape (rows,) or (width,)
    """
    at = 0
    while at < values.size:
        row, column = (start + at) // width, (start + at) % width
        stop = min(at + width - column, values.size)
        for i in range(at, stop):
            values[i] = np.float64(values[i]) * (factors[row] if by_row else factors[column + i - at])
        at = stop
