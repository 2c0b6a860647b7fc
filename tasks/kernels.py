"""The loops over tiles: weighted sums, sign consensus, thinning by a threshold, and float64 sums for reductions.

Each is a plain loop over one tile in the working type. For up to :data:`FEW` models the rows are a tuple, whose length
the compiler knows: it unrolls the loop over models and vectorises the one over elements, so that a tile is
read once and nothing in between is stored. For more models the same arithmetic runs in strips that stay in the
first-level cache, one model at a time. Both add in model order and round to the working type at each step, and both
give the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from mergepipe.tasks.jit import kernel, uncounted
from mergepipe.tasks.method import Array

Rows = tuple[Array, ...]
"""One array of shape (n,) per model."""

Scalars = tuple[float, ...]
"""One number per model, rounded to the working type by the kernel (Python's floats are the quickest to pass)."""

FEW = 8
"""Most models that a kernel of tuples takes; beyond it the compiler no longer unrolls, and is 500 times slower."""

STRIP = 1024
"""Elements that a kernel for many models takes at once."""

LANES = 64
"""Partial sums kept side by side, so that a float64 sum vectorises; part of the result, as the block length is."""


@kernel
def sum_few(rows: Rows, weights: Scalars, divisor: float, out: Array) -> None:
    """``out = sum(weights[k] * rows[k]) / divisor``, summed in model order."""
    work = out.dtype.type
    whole = work(divisor)
    for i in range(out.size):
        total = work(weights[0]) * rows[0][i]
        for k in range(1, len(rows)):
            total += work(weights[k]) * rows[k][i]
        out[i] = total / whole


@kernel
def sum_many(values: Array, weights: Array, divisor: float, out: Array) -> None:
    """As :func:`sum_few`, for any number of models: `values` has shape (models, n), `weights` shape (models,)."""
    whole = out.dtype.type(divisor)
    for start in range(0, out.size, STRIP):
        total = out[start : start + STRIP]
        for k in range(weights.size):
            weight = weights[k]
            row = values[k][start : start + STRIP]
            if k == 0:
                for i in range(total.size):
                    total[i] = weight * row[i]
            else:
                for i in range(total.size):
                    total[i] += weight * row[i]
        for i in range(total.size):
            total[i] /= whole


@kernel
def add_few(
    base: Array,
    rows: Rows,
    weights: Scalars,
    least: Scalars,
    factors: Scalars,
    divisor: float,
    scale: float,
    out: Array,
) -> None:
    """Thin, weight, add up and put on the base.

    ``out = base + scale * (sum(weights[k] * thinned[k]) / divisor)``, where ``thinned[k]`` is ``factors[k] * rows[k]``
    with zero wherever ``abs(rows[k]) < least[k]``.

    Parameters
    ----------
    base, out : ndarray, shape (n,)
    rows : tuple of ndarray, shape (n,)
    weights, least, factors : tuple of float, one per model
    divisor, scale : float
    """
    work = out.dtype.type
    zero, whole, factor = work(0), work(divisor), work(scale)
    for i in range(out.size):
        total = zero
        for k in range(len(rows)):
            value = rows[k][i]
            total += work(weights[k]) * (work(factors[k]) * value) if abs(value) >= work(least[k]) else zero
        out[i] = base[i] + factor * (total / whole)


@kernel
def agree_few(
    base: Array,
    rows: Rows,
    weights: Scalars,
    least: Scalars,
    factors: Scalars,
    normalize: bool,
    scale: float,
    out: Array,
) -> None:
    """Thin, weight, elect a sign, add up the models that agree with it, and put the sum on the base.

    A term is ``weights[k] * thinned[k]``, with `thinned` as in :func:`add_few`. The elected sign is that of the sum of
    the terms, zero counting as positive. A term that is exactly zero agrees with nobody. ``out = base + scale * (sum of
    agreeing terms / sum of their weights)``; the divisor is 1 where these add up to 0, or without `normalize`.

    Parameters
    ----------
    base, rows, weights, least, factors, scale, out
        As in :func:`add_few`.
    normalize : bool
    """
    work = out.dtype.type
    zero, one, factor = work(0), work(1), work(scale)
    for i in range(out.size):
        vote = zero
        for k in range(len(rows)):
            value = rows[k][i]
            vote += work(weights[k]) * (work(factors[k]) * value) if abs(value) >= work(least[k]) else zero
        elected = one if vote >= zero else -one
        total = zero
        agreeing = zero
        for k in range(len(rows)):
            value = rows[k][i]
            term = work(weights[k]) * (work(factors[k]) * value) if abs(value) >= work(least[k]) else zero
            agrees = term * elected > zero
            total += term if agrees else zero
            agreeing += work(weights[k]) if agrees else zero
        divisor = agreeing if (agreeing != zero) & normalize else one
        out[i] = base[i] + factor * (total / divisor)


@kernel
def count_votes(values: Array, weights: Array, out: Array) -> None:
    """How many terms are positive less how many are negative: `values` has shape (models, n), `out` shape (n,)."""
    zero, one = out.dtype.type(0), out.dtype.type(1)
    for start in range(0, out.size, STRIP):
        votes = out[start : start + STRIP]
        votes[:] = zero
        for k in range(weights.size):
            weight = weights[k]
            row = values[k][start : start + STRIP]
            for i in range(votes.size):
                term = weight * row[i]
                votes[i] += one if term > zero else (-one if term < zero else zero)


@kernel
def agree_many(
    base: Array, values: Array, weights: Array, normalize: bool, scale: float, sums: Array, divisors: Array, out: Array
) -> None:
    """The second half of :func:`agree_few`, for any number of models whose values are thinned already.

    Parameters
    ----------
    base : ndarray, shape (n,)
    values : ndarray, shape (models, n)
        Contiguous.
    weights : ndarray, shape (models,)
    normalize : bool
    scale : float
    sums, divisors : ndarray, shape (n,)
        Working memory, overwritten.
    out : ndarray, shape (n,)
        On entry the votes, whose sign is the elected one. Overwritten.
    """
    zero, one, factor = out.dtype.type(0), out.dtype.type(1), out.dtype.type(scale)
    for start in range(0, out.size, STRIP):
        elected = out[start : start + STRIP]
        total = sums[: elected.size]
        agreeing = divisors[: elected.size]
        for i in range(elected.size):
            elected[i] = one if elected[i] >= zero else -one
            total[i] = zero
            agreeing[i] = zero
        for k in range(weights.size):
            weight = weights[k]
            row = values[k][start : start + STRIP]
            for i in range(elected.size):
                term = weight * row[i]
                agrees = term * elected[i] > zero
                total[i] += term if agrees else zero
                agreeing[i] += weight if agrees else zero
        below = base[start : start + STRIP]
        for i in range(elected.size):
            divisor = agreeing[i] if (agreeing[i] != zero) & normalize else one
            elected[i] = below[i] + factor * (total[i] / divisor)


@kernel
def put_on_base(base: Array, scale: float, out: Array) -> None:
    """``out = base + scale * out``, in place."""
    factor = out.dtype.type(scale)
    for i in range(out.size):
        out[i] = base[i] + factor * out[i]


@kernel
def thin(values: Array, least: float, factor: float) -> None:
    """Zero all of `values`, shape (n,), below `least` in magnitude and multiply the rest by `factor`. In place."""
    work = values.dtype.type
    zero, smallest, scale = work(0), work(least), work(factor)
    for i in range(values.size):
        values[i] = scale * values[i] if abs(values[i]) >= smallest else zero


@kernel
def drop_late_ties(values: Array, least: float, allowed: int) -> None:
    """Zero all of `values`, shape (n,), whose magnitude is `least` but the first `allowed`. In place."""
    seen = 0
    for i in range(values.size):
        if abs(values[i]) == least:
            seen += 1
            if seen > allowed:
                values[i] = 0


@kernel
def count_ties(values: Array, least: float) -> int:
    """How many of `values`, shape (n,), have the magnitude `least`."""
    found, sought = np.int32(0), values.dtype.type(least)
    for i in range(values.size):
        found += np.int32(abs(values[i]) == sought)
    return int(found)


@kernel
def count_kept(values: Array, least: float) -> tuple[int, int]:
    """How many of `values`, shape (n,), have a magnitude above `least`, and how many one equal to it, in float64."""
    above, equal = np.int32(0), np.int32(0)
    for i in range(values.size):
        magnitude = abs(np.float64(values[i]))
        above += np.int32(magnitude > least)
        equal += np.int32(magnitude == least)
    return int(above), int(equal)


@kernel
def blend(left: Array, right: Array, a: float, b: float, out: Array) -> None:
    """``out = a * left + b * right``."""
    first, second = out.dtype.type(a), out.dtype.type(b)
    for i in range(out.size):
        out[i] = first * left[i] + second * right[i]


@kernel
def norms(values: Array, out: Array) -> None:
    """Sum of magnitudes and sum of squares of `values`, shape (n,), in float64 into `out`, shape (2,)."""
    lanes = np.zeros((2, LANES))
    add_norms(values, lanes)
    out[0] = lanes[0].sum()
    out[1] = lanes[1].sum()


@uncounted
def add_norms(values: Array, lanes: Array) -> None:
    """Add magnitudes and squares of `values`, shape (n,), to the two `lanes`, float64, shape (2, 64)."""
    ones, twos = lanes[0], lanes[1]
    for start in range(0, values.size, LANES):
        row = values[start : start + LANES]
        for i in range(row.size):
            magnitude = abs(np.float64(row[i]))
            ones[i] += magnitude
            twos[i] += magnitude * magnitude


@kernel
def kept_squares(before: Array, after: Array, out: Array) -> None:
    """Sum of the squares of `before`, and of those where `after` is not zero, both shape (n,), in float64 into `out`.

    Summed as by :func:`norms`.
    """
    lanes = np.zeros((2, LANES))
    whole, kept = lanes[0], lanes[1]
    for start in range(0, before.size, LANES):
        row, left = before[start : start + LANES], after[start : start + LANES]
        for i in range(row.size):
            value = np.float64(row[i])
            square = value * value
            whole[i] += square
            kept[i] += square if left[i] != 0 else 0.0
    out[0] = whole.sum()
    out[1] = kept.sum()


@kernel
def dots(left: Array, right: Array, out: Array) -> None:
    """``left . left``, ``right . right`` and ``left . right``, in float64 into `out`, shape (3,)."""
    lanes = np.zeros((3, LANES))
    first, second, both = lanes[0], lanes[1], lanes[2]
    for start in range(0, left.size, LANES):
        a = left[start : start + LANES]
        b = right[start : start + LANES]
        for i in range(a.size):
            x, y = np.float64(a[i]), np.float64(b[i])
            first[i] += x * x
            second[i] += y * y
            both[i] += x * y
    out[0] = first.sum()
    out[1] = second.sum()
    out[2] = both.sum()


def fold(blocks: Array) -> Array:
    """Add up rows of float64 partial sums, shape (blocks, ...) to (...): each sum is rounded once, in any order.

    Examples
    --------
    >>> fold(np.array([[1e100, 1.0], [1.0, 2.0], [-1e100, 3.0]])).tolist()
    [1.0, 6.0]
    """
    columns = blocks.reshape(len(blocks), math.prod(blocks.shape[1:])).T
    return np.array([math.fsum(column) for column in columns], np.float64).reshape(blocks.shape[1:])
