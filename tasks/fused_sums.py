"""Sums in float64 from stored bfloat16, block by block: norms around random drops, and dot products.

As :mod:`mergepipe.tasks.fused`, which see, these loops need no tile. They add as :mod:`mergepipe.tasks.kernels` does.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array

Rows = tuple[Array, ...]

LANES = 64
"""As of :mod:`mergepipe.tasks.kernels`: partial sums are part of the result."""


@kernel
def norms_around(base: Array, rows: Rows, marks: Array, edges: Array, sums: Array) -> bool:
    """Norms of the deltas and of those that stay, block by block, as :func:`mergepipe.tasks.kernels.norms` adds them.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    marks : uint8 ndarray, shape (n,)
        As for :func:`agree`.
    edges : int64 ndarray, shape (blocks + 1,)
        Where each block begins, and the end of the last one.
    sums : float64 ndarray, shape (blocks, 2, models, 2)
        Overwritten: of all deltas and of those that stay the sum of magnitudes and the sum of squares.

    Returns
    -------
    bool
        False if a stored value, or a delta, is not finite; `sums` are of no use then.
    """
    fine = True
    for block in range(edges.size - 1):
        part = slice(edges[block], edges[block + 1])
        for k in range(len(rows)):
            _norms(base[part], rows[k][part], marks[part], 1 << k, sums[block, :, k])
            fine &= bool(np.isfinite(sums[block, 0, k, 0]))
    return fine


@kernel
def _norms(base: Array, row: Array, marks: Array, bit: int, sums: Array) -> None:
    """The same for one model and block."""
    lanes = np.zeros((4, LANES))
    ones, twos, ones_left, twos_left = lanes[0], lanes[1], lanes[2], lanes[3]
    for start in range(0, base.size, LANES):
        below, own, stays = base[start : start + LANES], row[start : start + LANES], marks[start : start + LANES]
        for i in range(below.size):
            value = np.int32(np.int32(own[i]) << 16).view(np.float32)
            delta = np.float32(value - np.int32(np.int32(below[i]) << 16).view(np.float32))
            magnitude = abs(np.float64(delta))
            square = magnitude * magnitude
            ones[i] += magnitude
            twos[i] += square
            ones_left[i] += magnitude if stays[i] & bit else 0.0
            twos_left[i] += square if stays[i] & bit else 0.0
    for power in range(2):
        sums[0, power] = lanes[power].sum()
        sums[1, power] = lanes[2 + power].sum()


@kernel
def dots(base: Array, row: Array, edges: Array, sums: Array) -> bool:
    """Dot products block by block, as :func:`mergepipe.tasks.kernels.dots` adds them.

    Parameters
    ----------
    base, row : uint16 ndarray, shape (n,)
    edges : int64 ndarray, shape (blocks + 1,)
        Where each block begins, and the end of the last one.
    sums : float64 ndarray, shape (blocks, 3)
        Overwritten: ``base . base``, ``row . row`` and ``base . row``.

    Returns
    -------
    bool
        False if a stored value is not finite; `sums` are of no use then.
    """
    fine = True
    for block in range(edges.size - 1):
        part = slice(edges[block], edges[block + 1])
        _dots(base[part], row[part], sums[block])
        fine &= bool(np.isfinite(sums[block, 0])) & bool(np.isfinite(sums[block, 1]))
    return fine


@kernel
def _dots(base: Array, row: Array, sums: Array) -> None:
    """The same for one block."""
    lanes = np.zeros((3, LANES))
    first, second, both = lanes[0], lanes[1], lanes[2]
    for start in range(0, base.size, LANES):
        left, right = base[start : start + LANES], row[start : start + LANES]
        for i in range(left.size):
            x = np.float64(np.int32(np.int32(left[i]) << 16).view(np.float32))
            y = np.float64(np.int32(np.int32(right[i]) << 16).view(np.float32))
            first[i] += x * x
            second[i] += y * y
            both[i] += x * y
    for which in range(3):
        sums[which] = lanes[which].sum()
