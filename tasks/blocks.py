"""Blocks: the grain in which a tensor is worked on and summed up, a function of its shape alone."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Blocks = tuple[int, int]
"""First block and one past the last of a unit."""

SAMPLED_BLOCKS = 16
"""One block in so many is read for a sample, however blocks are shared out among units,"""
LARGEST_SAMPLE = 256
"""or one in more, to be no more than these."""

SAMPLED_AHEAD = 8
"""Units of a sample that are announced with the tensor before: enough for workers that have to wait there. The sample
of a large tensor would fill the memory that reads of the tensor at work need."""

BLOCK_ELEMENTS = 65_536
"""Elements of a block: the grain of float64 partial sums, and the size of a tile."""


def block_elements(shape: tuple[int, ...]) -> int:
    """Length in elements of the blocks that a tensor of this shape is folded in.

    Whole rows (along the last axis) while a row has at most 65,536 elements, else 65,536-element pieces; a wider row is
    cut into pieces of its own, so that no block spans two rows of it (see :func:`block_bounds`).

    Examples
    --------
    >>> block_elements((4096, 4096)), block_elements((7,)), block_elements((3, 100_000))
    (65536, 7, 65536)
    """
    width = shape[-1] if shape else 1
    if width == 0 or math.prod(shape) == 0:
        return BLOCK_ELEMENTS
    if width <= BLOCK_ELEMENTS:
        return (BLOCK_ELEMENTS // width) * width if len(shape) > 1 else width
    return BLOCK_ELEMENTS


def block_count(shape: tuple[int, ...]) -> int:
    """How many blocks a tensor of this shape has; 0 if it is empty.

    Examples
    --------
    >>> block_count((4096, 4096)), block_count((3, 100_000)), block_count(()), block_count((0, 5))
    (256, 6, 1, 0)
    """
    size = math.prod(shape)
    if size == 0:
        return 0
    width = shape[-1] if shape else 1
    if width > BLOCK_ELEMENTS:
        return (size // width) * -(-width // BLOCK_ELEMENTS)
    return -(-size // block_elements(shape))


def block_bounds(shape: tuple[int, ...], index: int) -> tuple[int, int]:
    """First element and one past the last (flat, row-major) of block `index` of a tensor of this shape.

    Examples
    --------
    >>> block_bounds((3, 100_000), 1), block_bounds((3, 100_000), 2), block_bounds((5, 30_000), 2)
    ((65536, 100000), (100000, 165536), (120000, 150000))
    """
    size = math.prod(shape)
    width = shape[-1] if shape else 1
    if width > BLOCK_ELEMENTS:
        per_row = -(-width // BLOCK_ELEMENTS)
        row, piece = divmod(index, per_row)
        start = row * width + piece * BLOCK_ELEMENTS
        return start, min(start + BLOCK_ELEMENTS, (row + 1) * width)
    step = block_elements(shape)
    return index * step, min((index + 1) * step, size)


def block_edges(shape: tuple[int, ...], blocks: Blocks) -> npt.NDArray[np.int64]:
    """Where each of a run of blocks begins, and the end of the last one: int64, shape (blocks + 1,).

    Examples
    --------
    >>> block_edges((3, 100_000), (1, 3)).tolist()
    [65536, 100000, 165536]
    """
    starts = [block_bounds(shape, index)[0] for index in range(*blocks)]
    return np.array([*starts, block_bounds(shape, blocks[1] - 1)[1]])


def sampled_every(blocks: int) -> int:
    """Of a tensor that can't be held, the first of how many blocks is its sample.

    Examples
    --------
    >>> sampled_every(100), sampled_every(16_032)
    (16, 63)
    """
    return max(SAMPLED_BLOCKS, -(-blocks // LARGEST_SAMPLE))
