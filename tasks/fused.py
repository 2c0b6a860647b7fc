"""From stored bits to stored bits in one pass: bfloat16 inputs, float32 arithmetic, bfloat16 output.

The general way decodes a block of every model into a tile, works on the tile and encodes what comes out: three trips
through memory, and a few calls per block. For the one case that is most of all merges, the loops here take a whole unit
and go through it once, all in registers, for up to :data:`mergepipe.tasks.kernels.FEW` models. They do the same
operations in the same order as :mod:`mergepipe.tasks.convert`, :mod:`mergepipe.tasks.select` and
:mod:`mergepipe.tasks.kernels`, and give the same bits; the tests hold them to it. :mod:`mergepipe.tasks.fused_counts`
and :mod:`mergepipe.tasks.fused_sums` do the same for sweeps.

All of them say whether they met something that is not finite, or that does not fit. They don't say where: the unit is
then done again in the general way, which knows. Each of these files has what it needs, since numba's cache notices a
change of a kernel's own file only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array

Rows = tuple[Array, ...]
Scalars = tuple[float, ...]

TOO_LARGE = 0x7F7F8000
"""Bits of magnitudes from which on all rounds to an infinity, is one or is NaN, and is for the general way."""

INFINITY = 0x7F800000

UPPER = -0x10000
"""The upper half of a word of 32 bits."""

LEAST_FACTOR = 2.0**-16
"""What no factor may be below in magnitude, with its weight and without: so much of a delta is never zero."""


def agree(
    base: Array,
    rows: Rows,
    marks: Array | None,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars | None,
    normalize: bool,
    scale: float,
    out: Array,
) -> bool:
    """As :func:`mergepipe.tasks.kernels.agree_few`, from bits to bits.

    Parameters
    ----------
    base, rows, out : uint16 ndarray, shape (n,)
    marks : uint8 ndarray, shape (n,), or None
        Bit k is set where model k's delta stays; None where none is dropped first.
    most : tuple of float, or None
        Larger magnitudes are dropped as those below `least` are; None where none is too large.
    factors : tuple of float, or None
        None where all are 1.
    weights, least, normalize, scale
        As for the other; weights and factors with which no term :func:`vanishes`.

    Returns
    -------
    bool
        False if a stored value or a delta is not finite, or a result does not fit; `out` is of no use then.
    """
    share = _share(weights, factors, scale)
    # Sums of terms of one weight are so many times theirs without it, and so are those of weights.
    scale = scale if share is None or normalize else scale * share
    given = (weights if share is None else None), least, most, factors, normalize, scale
    return _by_words(base, rows, marks, out, partial(_agree, *given))


def add(
    base: Array,
    rows: Rows,
    marks: Array | None,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars | None,
    divisor: float,
    scale: float,
    out: Array,
) -> bool:
    """As :func:`mergepipe.tasks.kernels.add_few`, from bits to bits; parameters and result as for :func:`agree`."""
    share = _share(weights, factors, scale)
    if share is not None and divisor == 1.0:
        scale *= share
    elif share is not None:
        divisor /= share
    given = (weights if share is None else None), least, most, factors, divisor, scale
    return _by_words(base, rows, marks, out, partial(_add, *given))


def vanishes(weights: Scalars, factors: Scalars | None) -> bool:
    """Whether a delta that is not zero may make a term that is, though neither weight nor factor is.

    Such a term agrees with nobody; the loops, which look at signs alone, would count it.
    """
    pairs = zip(weights, factors or (1.0,) * len(weights), strict=True)
    return any(0.0 < abs(number) < LEAST_FACTOR for weight, factor in pairs for number in (factor, weight * factor))


def _share(weights: Scalars, factors: Scalars | None, scale: float) -> float | None:
    """The weight of all models, where the loops can do without: a power of two, which changes no digit of a term.

    None where they can't.
    """
    share = weights[0]
    plain = factors is None and weights.count(share) == len(weights) and math.frexp(share)[0] == 0.5 and share <= 1.0
    # With a smaller scale, the product of the two might lose digits.
    return share if plain and (scale == 0.0 or abs(scale) >= LEAST_FACTOR) else None


def _by_words(
    base: Array, rows: Rows, marks: Array | None, out: Array, run: Callable[[Array, Rows, Array | None, Array], bool]
) -> bool:
    """Hand a loop two stored numbers as one word of 32 bits, the last of an odd number beside itself.

    In a word the upper one has the place that it has in a float32 already, and no lane is widened or narrowed: a
    quarter less to do per element.
    """
    even = out.size - out.size % 2
    fine = True
    if even:
        words = _words(out[:even], np.int32)
        fine = run(*_inputs(lambda values, dtype: _words(values[:even], dtype), base, rows, marks), words)
        if words.base is None:  # a copy
            out[:even] = words.view(np.uint16)
    if even < out.size:
        word = np.empty(1, np.int32)
        fine &= run(*_inputs(_word, base, rows, marks), word)
        out[even:] = word.view(np.uint16)[:1]
    return fine


def _inputs(
    words: Callable[[Array, Any], Array], base: Array, rows: Rows, marks: Array | None
) -> tuple[Array, Rows, Array | None]:
    """What a loop reads, as words that nobody may write to: for others each loop would be compiled once more."""

    def read(values: Array, dtype: Any) -> Array:
        found = words(values, dtype)
        found.flags.writeable = False
        return found

    stays = None if marks is None else read(marks, np.uint16)
    return read(base, np.int32), tuple(read(row, np.int32) for row in rows), stays


def _words(values: Array, dtype: Any) -> Array:
    """An even number of values as words; a copy if they don't lie as words do."""
    words: Array = values.view(dtype)
    return words if words.flags.aligned else words.copy()


def _word(values: Array, dtype: Any) -> Array:
    """The last of them, twice."""
    word: Array = np.repeat(values[-1:], 2).view(dtype)
    return word


@inlined
def _half(word: Any, half: int) -> Any:
    """The lower (0) or upper (1) number of a word in float32."""
    return np.int32(word << 16 if half == 0 else word & np.int32(UPPER)).view(np.float32)


@inlined
def _kept(key: Any, stays: Any, least: Any, most: Any, k: int, half: int) -> Any:
    """Whether a delta of model `k` whose magnitude has these bits is neither too small, too large nor dropped."""
    # Strictly above what lies below: compilers turn the other comparison round, and need one step more. Zero, which
    # adds nothing and agrees with nobody, is never kept.
    kept = key > max(np.int32(np.float32(least[k]).view(np.int32) - 1), np.int32(0))
    if most is not None:
        kept = kept & (key <= np.float32(most[k]).view(np.int32))
    if stays is not None:
        kept = kept & ((stays & np.int32(1 << (8 * half + k))) != 0)
    return kept


@inlined
def _rounded(bits: Any) -> Any:
    """Bits of a float32 whose upper half is the nearest bfloat16."""
    return np.int32(bits + (np.int32(0x8000) if bits & 0x10000 else np.int32(0x7FFF)))


@kernel
def _bits(value: Any) -> Any:
    """A name of its own for what has been assigned more than once: numba takes no view of that."""
    return np.float32(value).view(np.int32)


@kernel
def _agree(
    weights: Scalars | None,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars | None,
    normalize: bool,
    scale: float,
    base: Array,
    rows: Rows,
    marks: Array | None,
    out: Array,
) -> bool:
    """:func:`agree` of words: `base`, `rows` and `out` int32, `marks` uint16, shape (n / 2,).

    Without `weights`, all are 1. What is not finite, and not dropped, makes a result that is not: an infinity or NaN in
    the vote has the sign of a term that is one, which then agrees.
    """
    zero, one, factor = np.float32(0), np.float32(1), np.float32(scale)
    worst, over = np.int32(0), np.int32(0)
    for i in range(out.size):
        # One maximum per word and then one over them: more at once do not vectorise.
        peak, top, merged = np.int32(0), np.int32(0), np.int32(0)
        stays = None if marks is None else np.int32(marks[i])
        for half in range(2):
            below = _half(base[i], half)
            vote = zero
            for k in range(len(rows)):
                value = np.float32(_half(rows[k][i], half) - below)
                key = np.int32(value.view(np.int32) & 0x7FFFFFFF)
                if (most is not None) | (marks is not None):
                    peak = max(peak, key)
                thinned = value if factors is None else np.float32(factors[k]) * value
                term = thinned if weights is None else np.float32(weights[k]) * thinned
                vote = vote + term if _kept(key, stays, least, most, k, half) else vote
            elected = _bits(vote)
            total, agreeing = zero, zero
            for k in range(len(rows)):
                value = np.float32(_half(rows[k][i], half) - below)
                key = np.int32(value.view(np.int32) & 0x7FFFFFFF)
                thinned = value if factors is None else np.float32(factors[k]) * value
                term = thinned if weights is None else np.float32(weights[k]) * thinned
                agrees = _kept(key, stays, least, most, k, half) & (np.int32(_bits(term) ^ elected) >= 0)
                total = total + term if agrees else total
                agreeing = agreeing + (one if weights is None else np.float32(weights[k])) if agrees else agreeing
            divisor = agreeing if (agreeing != zero) & normalize else one
            bits = np.float32(below + factor * (total / divisor)).view(np.int32)
            top = max(top, np.int32(bits & 0x7FFFFFFF))
            rounded = _rounded(bits)
            merged = np.int32(np.uint32(rounded) >> 16) if half == 0 else np.int32(merged | (rounded & np.int32(UPPER)))
        worst, over = max(worst, peak), max(over, top)
        out[i] = merged
    return bool((worst < INFINITY) & (over < TOO_LARGE))


@kernel
def _add(
    weights: Scalars | None,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars | None,
    divisor: float,
    scale: float,
    base: Array,
    rows: Rows,
    marks: Array | None,
    out: Array,
) -> bool:
    """:func:`add` of words, as :func:`_agree`."""
    zero, whole, factor = np.float32(0), np.float32(divisor), np.float32(scale)
    divides = whole != np.float32(1)
    worst, over = np.int32(0), np.int32(0)
    for i in range(out.size):
        peak, top, merged = np.int32(0), np.int32(0), np.int32(0)
        stays = None if marks is None else np.int32(marks[i])
        for half in range(2):
            below = _half(base[i], half)
            total = zero
            for k in range(len(rows)):
                value = np.float32(_half(rows[k][i], half) - below)
                key = np.int32(value.view(np.int32) & 0x7FFFFFFF)
                if (most is not None) | (marks is not None):
                    peak = max(peak, key)
                thinned = value if factors is None else np.float32(factors[k]) * value
                term = thinned if weights is None else np.float32(weights[k]) * thinned
                total = total + term if _kept(key, stays, least, most, k, half) else total
            bits = np.float32(below + factor * (total / whole if divides else total)).view(np.int32)
            top = max(top, np.int32(bits & 0x7FFFFFFF))
            rounded = _rounded(bits)
            merged = np.int32(np.uint32(rounded) >> 16) if half == 0 else np.int32(merged | (rounded & np.int32(UPPER)))
        worst, over = max(worst, peak), max(over, top)
        out[i] = merged
    return bool((worst < INFINITY) & (over < TOO_LARGE))


@kernel
def weigh(rows: Rows, weights: Scalars, divisor: float, out: Array) -> bool:
    """As :func:`mergepipe.tasks.kernels.sum_few`, from bits to bits; parameters and result as for :func:`agree`.

    What is not finite makes a result that is not, at a weight of 0, too: the inputs need no look of their own.
    """
    whole = np.float32(divisor)
    divides = whole != np.float32(1)
    over = np.int32(0)
    for i in range(out.size):
        total = np.float32(weights[0]) * np.int32(np.int32(rows[0][i]) << 16).view(np.float32)
        for k in range(1, len(rows)):
            total += np.float32(weights[k]) * np.int32(np.int32(rows[k][i]) << 16).view(np.float32)
        bits = np.float32(total / whole if divides else total).view(np.int32)
        over = max(over, np.int32(bits & 0x7FFFFFFF))
        out[i] = np.uint16(_rounded(bits) >> 16)
    return bool(over < TOO_LARGE)
