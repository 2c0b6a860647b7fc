"""Sums of squares of differences in integers: exact in any order, and whichever way elements come together.

A norm of what is taken is the same number whether elements are counted where they are, or listed first and sorted out
later; sums of floats would differ in their last bits. The squares of a row are rounded to a grid that follows from its
divergence, to some 30 bits below their mean; those that are far too large for it, by themselves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, uncounted
from mergepipe.tasks.method import Array

SQUARES = 2048
"""Exponents of float64."""


@inlined
def add_square(delta: Any, times: Any, squares: Array) -> None:
    """Add ``delta**2``, rounded to 31 bits, so many times to the sum of those of its exponent: see :func:`sum_squares`.

    Parameters
    ----------
    delta : float
    times : int
    squares : int64 ndarray, shape (>= SQUARES,)
    """
    value = np.float64(np.float64(delta) * np.float64(delta))
    bits = (value.view(np.int64) + (1 << 21)) >> 22
    exponent = bits >> 30
    squares[np.uintp(exponent)] += times * ((bits & 0x3FFFFFFF) | (np.int64(exponent > 0) << 30))


@inlined
def grid_of(divergence: Any) -> Any:
    """How squares of the differences of a row are rounded: to 2**-30 of about their mean, twice its divergence.

    The exponent of what they are counted by, a number that rounds them when it is added, its bits, and from which
    magnitude of a difference on they are not counted that way, since they do not fit: a thousand times the root of the
    mean, where the divergence is that of an ordinary row.
    """
    exponent = (np.float64(divergence).view(np.int64) >> 52) & 0x7FF
    if exponent < 64 or exponent > 1960:
        return np.int64(0), 1.0, np.int64(0), 0.0
    bits = ((exponent + 23) << 52) | (1 << 51)
    most = np.int64(((exponent + 1044) >> 1) << 52).view(np.float64)
    return exponent + 1, np.int64(bits).view(np.float64), bits, most


@inlined
def _add_multiples(total: Any, times: Any, place: Any, squares: Array) -> None:
    """Add so many times a number of multiples of 2**-30 of the power of two that stands for an exponent above 0.

    What is large goes to a larger exponent: sums of millions of rows fit.
    """
    squares[np.uintp(place)] += times * (total & 0x3FFFFFFF)
    squares[np.uintp(place + 30)] += times * (total >> 30)


@inlined
def add_square_of_row(delta: Any, times: Any, divergence: Any, squares: Array) -> None:
    """Add ``delta**2`` of an element of a row so many times, to the same sums as :func:`squares_above`."""
    place, rounding, bits, most = grid_of(divergence)
    if abs(delta) < most:
        value = np.float64(np.float64(delta) * np.float64(delta)) + rounding
        _add_multiples(np.float64(value).view(np.int64) - bits, times, place, squares)
    else:
        add_square(delta, times, squares)


@uncounted
def squares_above(deltas: Array, keys: Array, high: Any, divergence: float, reach: Any, squares: Array) -> None:
    """Add up the squares of differences whose keys are above `high`, in integers, so in any order.

    Parameters
    ----------
    deltas, keys : ndarray, shape (n,)
        Of one row; n is at most 4096, for the sum of those below to fit.
    high : int
    divergence : float
        Of the row.
    reach : float
        Nothing of `deltas` is larger.
    squares : int64 ndarray, shape (>= SQUARES,)
        Added to: multiples of 2**-30 of the power of two that stands for each exponent.
    """
    place, rounding, bits, most = grid_of(divergence)
    if reach < most:
        total = np.int64(0)
        for i in range(keys.size):
            delta = np.float64(deltas[i])
            value = np.float64(delta * delta) + rounding
            total += np.float64(value).view(np.int64) - bits if keys[i] > high else np.int64(0)
        _add_multiples(total, 1, place, squares)
        return
    for i in range(keys.size):
        if keys[i] > high:
            add_square_of_row(deltas[i], 1, divergence, squares)


def sum_squares(squares: Array) -> float:
    """What was added up in multiples of 2**-30 of the power of two that stands for each exponent.

    Examples
    --------
    >>> found = np.zeros(SQUARES, np.int64)
    >>> for delta in (0.5, 1.5, 3.0):
    ...     add_square(np.float32(delta), 1, found)
    >>> sum_squares(found)
    11.5
    """
    if squares[SQUARES - 1]:
        return math.inf
    total = sum(int(squares[e]) << max(0, int(e) - 1) for e in np.flatnonzero(squares[:SQUARES]))
    spare = max(0, total.bit_length() - 64)
    try:
        return math.ldexp(total >> spare, spare - 1022 - 30)
    except OverflowError:
        return math.inf
