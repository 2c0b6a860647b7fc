"""The chunk grid: how a tensor is cut, from its shape alone.

Every chunk is one contiguous run of the tensor's bytes (in C order): full-width blocks of rows where a row fits the
target, and runs within a row where it does not. Contiguous runs are what a byte range can address and what a disk reads
fastest. The grid depends on shape, item size and target alone, so it is the same for every model and the output.
"""

from __future__ import annotations

import math
from functools import lru_cache

MIB = 2**20
DEFAULT_CHUNK_BYTES = 8 * MIB


@lru_cache(4096)
def chunk_shape(shape: tuple[int, ...], itemsize: int, target: int = DEFAULT_CHUNK_BYTES) -> tuple[int, ...]:
    """Shape of the chunks of a tensor.

    Parameters
    ----------
    shape : tuple of int
    itemsize : int
        Bytes per element.
    target : int, default 8 MiB
        Bytes per chunk, not to be exceeded (except by a single element).

    Returns
    -------
    tuple of int
        As long as `shape`, each at least 1, as zarr demands, and at most the dimension (or 1). Of the form
        ``(1, ..., 1, rows, *rest)`` with `rest` full, so that a chunk is contiguous.

    Notes
    -----
    `rows` is the largest divisor of its dimension that fits the target, so that all chunks are alike. Only if that
    divisor would make chunks of less than a quarter of the target (a prime dimension) is it the largest number that
    fits, and the last chunk is padded.

    Examples
    --------
    >>> chunk_shape((4096, 14336), 2)
    (256, 14336)
    >>> chunk_shape((32003, 4096), 2)
    (1024, 4096)
    >>> chunk_shape((8, 14336, 4096), 2)
    (1, 1024, 4096)
    >>> chunk_shape((), 4)
    ()
    """
    sizes = [max(dimension, 1) for dimension in shape]
    if 0 in shape:
        return tuple(sizes)  # nothing to cut, and a hostile header may put 2^60 beside the zero
    for axis, dimension in enumerate(sizes):
        row = math.prod(sizes[axis + 1 :]) * itemsize
        if row <= target or axis == len(sizes) - 1:
            return (1,) * axis + (_rows(dimension, row, target), *sizes[axis + 1 :])
    return ()


def _rows(dimension: int, row: int, target: int) -> int:
    fits = max(1, min(dimension, target // row))
    best = 1
    for small in range(1, min(math.isqrt(dimension), fits) + 1):
        if dimension % small == 0:
            large = dimension // small
            best = max(best, large if large <= fits else small)
    return best if best == dimension or best * row * 4 >= target else fits


def chunk_lengths(shape: tuple[int, ...], chunks: tuple[int, ...]) -> list[int]:
    """Elements inside the tensor of every chunk, in C order of the grid; their sum is the tensor's size.

    Parameters
    ----------
    shape, chunks : tuple of int
        `chunks` as :func:`chunk_shape` gives them.

    Examples
    --------
    >>> chunk_lengths((5, 3), (2, 3))
    [6, 6, 3]
    >>> chunk_lengths((2, 5), (1, 4))
    [4, 1, 4, 1]
    """
    if 0 in shape:
        return []
    if not shape:
        return [1]
    # Leading dimensions are cut to single indices, so that the first dimension cut otherwise decides.
    axis = next((i for i, (size, chunk) in enumerate(zip(shape, chunks, strict=True)) if chunk > 1), len(shape) - 1)
    inner = math.prod(shape[axis + 1 :])
    rows = [min(chunks[axis], shape[axis] - start) for start in range(0, shape[axis], chunks[axis])]
    return [count * inner for count in rows] * math.prod(shape[:axis])


def grid_shape(shape: tuple[int, ...], chunks: tuple[int, ...]) -> tuple[int, ...]:
    """Number of chunks along every dimension.

    Examples
    --------
    >>> grid_shape((5, 3), (2, 3))
    (3, 1)
    """
    return tuple(-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True))
