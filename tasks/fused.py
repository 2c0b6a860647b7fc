"""From stored bits to stored bits in one pass: bfloat16 inputs, float32 arithmetic, bfloat16 output.

The general way decodes a block of every model into a tile, works on the tile and encodes what comes out: three trips
through memory, and a few calls per block. For the one case that is most of all merges, the loops here take a whole unit
and go through it once, all in registers; for more than :data:`AT_ONCE` models the compiler no longer manages that, and
they go in strips that stay in the first-level cache. They do the same operations in the same order as
:mod:`mergepipe.tasks.convert`, :mod:`mergepipe.tasks.select` and :mod:`mergepipe.tasks.kernels`, and give the same
bits; the tests hold them to it.

All of them say whether they met something that is not finite, or that does not fit the output. They don't say where:
the unit is then done again in the general way, which knows. Everything is in one file because numba's cache notices
a change of a kernel's own file only.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array

Rows = tuple[Array, ...]
Scalars = tuple[float, ...]

TOP_BINS = 1 << 15

STRIP = 2048
"""Elements taken at once: a strip of eight models in float32 fills the first-level cache."""

PIECE = STRIP // 8
"""Elements of a strip that are taken as a sample."""

TOO_LARGE = 0x7F7F8000
"""Bits of magnitudes from which on all rounds to an infinity, is one or is NaN, and is for the general way."""

AT_ONCE = 5
"""Most models whose deltas one loop takes at once: with more it is not vectorised, and 20 times slower."""

MARKED = 4
"""As :data:`AT_ONCE`, where marks are read beside the models."""

FINE_BINS = 1 << 16

LANES = 64
"""As of :mod:`mergepipe.tasks.kernels`: partial sums are part of the result."""

ODD = 1 << 40
"""What :func:`count_near` adds to a counter, once a call, if it met a pattern that is not the counter's first: above
any number of elements."""


def strips(models: int) -> Rows:
    """Working memory for a call of :func:`agree_in_strips` or :func:`add_in_strips`."""
    return tuple(np.empty((models, STRIP), np.float32))


@kernel
def _decode(bits: Array, out: Array) -> Any:
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    return worst


@kernel
def _keys(bits: Array, base: Array, out: Array) -> Any:
    """Bits of the magnitudes of the deltas."""
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        delta = np.float32(np.int32(stored << 16).view(np.float32) - base[i])
        out[i] = np.int32(delta.view(np.int32) & 0x7FFFFFFF)
    return worst


@kernel
def _deltas(bits: Array, base: Array, out: Array) -> Any:
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32) - base[i]
    return worst


@kernel
def _encode(values: Array, out: Array) -> Any:
    worst = np.int32(0)
    for i in range(out.size):
        bits = np.float32(values[i]).view(np.int32)
        magnitude = np.int32(bits & 0x7FFFFFFF)
        worst = max(worst, magnitude)
        out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return np.int32(worst >= TOO_LARGE)


@kernel
def count_top(base: Array, rows: Rows, counts: Array) -> bool:
    """Add the top 15 bits of the magnitudes of the deltas to `counts`.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    counts : int64 ndarray, shape (models, 32768)

    Returns
    -------
    bool
        False if a stored value is not finite; `counts` are of no use then.
    """
    below = np.empty(STRIP, np.float32)
    keys = np.empty(STRIP, np.int32)
    worst = np.int32(0)
    # Neighbours often fall into the same bin, and would wait for each other's counter: so four take turns.
    lanes = np.zeros((len(rows), 4, TOP_BINS), np.int32)
    for start in range(0, base.size, STRIP):
        stop = min(start + STRIP, base.size)
        worst = max(worst, _decode(base[start:stop], below))
        for k in range(len(rows)):
            worst = max(worst, _keys(rows[k][start:stop], below, keys))
            _scatter(keys[: stop - start], lanes[k])
    for k in range(len(rows)):
        total = counts[k]
        for lane in lanes[k]:
            for i in range(TOP_BINS):
                total[i] += lane[i]
    return bool(worst < 0x7F80)


@kernel
def _scatter(keys: Array, lanes: Array) -> None:
    quarter = keys.size // 4
    first, second, third, fourth = lanes[0], lanes[1], lanes[2], lanes[3]
    a, b, c, d = keys[:quarter], keys[quarter:], keys[2 * quarter :], keys[3 * quarter :]
    for i in range(quarter):
        first[np.uintp(a[i] >> 16)] += np.int32(1)
        second[np.uintp(b[i] >> 16)] += np.int32(1)
        third[np.uintp(c[i] >> 16)] += np.int32(1)
        fourth[np.uintp(d[i] >> 16)] += np.int32(1)
    for i in range(4 * quarter, keys.size):
        first[np.uintp(keys[i] >> 16)] += np.int32(1)


@kernel
def sample_top(base: Array, rows: Rows, counts: Array) -> bool:
    """As :func:`count_top`, of a piece of each strip only, which lies elsewhere in each: no column is left out."""
    below = np.empty(PIECE, np.float32)
    keys = np.empty(PIECE, np.int32)
    worst = np.int32(0)
    for strip in range(base.size // STRIP):
        # Fibonacci hashing: neighbours get places far from each other, and no width of a row has a rhythm with it.
        place = ((strip * 0x9E3779B1) & 0xFFFFFFFF) >> 29
        start = strip * STRIP + place * PIECE
        worst = max(worst, _decode(base[start : start + PIECE], below))
        for k in range(len(rows)):
            worst = max(worst, _keys(rows[k][start : start + PIECE], below, keys))
            for i in range(PIECE):
                counts[k, np.uintp(keys[i] >> 16)] += 1
    return bool(worst < 0x7F80)


@kernel
def count_near(base: Array, rows: Rows, lows: Array, shifts: Array, counts: Array) -> bool:
    """Count the magnitudes of the deltas that lie in windows, exactly or several patterns to a counter.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    lows : int64 ndarray, shape (models, windows)
        The bits of the smallest magnitude inside; negative for a window that is not wanted.
    shifts : int64 ndarray, shape (models, windows)
        A counter stands for ``2**shift`` patterns, a window is 65536 counters wide.
    counts : int64 ndarray, shape (models, windows, 65536 or 65537)
        Added to: how many fall to each counter, plus :data:`ODD` if one of them is not the counter's first pattern;
        in the last place, if there is one, how many lie below the window.

    Returns
    -------
    bool
        False if a stored value, or a delta, is not finite; `counts` are of no use then.
    """
    marks = np.zeros(STRIP, np.uint8)
    words, full = marks.view(np.int64), np.empty(STRIP // 8, np.int32)
    keys, found = np.empty(STRIP, np.int32), np.empty(STRIP, np.int32)
    worst = np.int32(0)
    # One model after the other: processors foresee what a few streams will need next, not what many will.
    for k in range(len(rows)):
        if lows[k].max() < 0:
            continue
        row = rows[k]
        for start in range(0, base.size, STRIP):
            stop = min(start + STRIP, base.size)
            worst = max(worst, _magnitudes(base[start:stop], row[start:stop], keys))
            # Marks behind the end stay zero.
            marks[stop - start :] = 0
            for r in range(lows.shape[1]):
                if lows[k, r] >= 0:
                    low, width = np.int32(lows[k, r]), np.int32(FINE_BINS << shifts[k, r])
                    lower = _mark(keys[: stop - start], low, width, marks)
                    if counts.shape[2] > FINE_BINS:
                        counts[k, r, FINE_BINS] += lower
                    size = _gather(marks, words, full, found)
                    _count_found(keys, found[:size], low, shifts[k, r], counts[k, r])
    return bool(worst < 0x7F800000)


@kernel
def _magnitudes(base: Array, row: Array, out: Array) -> Any:
    """Bits of the magnitudes of the deltas; the largest of them."""
    worst = np.int32(0)
    for i in range(base.size):
        value, below = np.int32(np.int32(row[i]) << 16), np.int32(np.int32(base[i]) << 16)
        delta = np.float32(value.view(np.float32) - below.view(np.float32))
        key = np.int32(delta.view(np.int32) & 0x7FFFFFFF)
        worst = max(worst, key)
        out[i] = key
    return worst


@kernel
def _mark(keys: Array, low: Any, width: Any, marks: Array) -> Any:
    """Mark the keys inside a window; how many lie below it."""
    below = np.int32(0)
    for i in range(keys.size):
        place = np.int32(keys[i] - low)
        # The sum of two of 32 bits has 64, unless it is told otherwise, and halves the elements per instruction.
        below = np.int32(below - (place >> 31))
        # What lies below is large without its sign.
        marks[i] = np.uint8(np.uint32(place) < np.uint32(width))
    return below


@kernel
def _gather(marks: Array, words: Array, full: Array, found: Array) -> Any:
    """The places that are marked into `found`; how many there are.

    Eight marks are looked at as one word, and most words are zero. No branch asks for a word or a mark: among many, it
    would be foretold too badly.
    """
    some = np.int64(0)
    for word in range(words.size):
        full[np.uintp(some)] = word
        some += np.int64(words[word] != 0)
    size = np.int64(0)
    for j in range(some):
        first = 8 * np.int64(full[np.uintp(j)])
        for i in range(first, first + 8):
            found[np.uintp(size)] = i
            size += np.int64(marks[np.uintp(i)])
    return size


@kernel
def _count_found(keys: Array, found: Array, low: Any, shift: int, counts: Array) -> None:
    within = np.int32((1 << shift) - 1)
    for k in range(found.size):
        place = np.int32(keys[np.uintp(found[k])] - low)
        at = np.uintp(place >> shift)
        odd = ((place & within) != 0) & (counts[at] < ODD)
        counts[at] += np.int64(1) + (np.int64(odd) << 40)


@inlined
def _kept(value: Any, least: Any, most: Any, k: int) -> Any:
    """Whether a delta of model `k` is neither too small nor too large."""
    if most is None:
        return abs(value) >= np.float32(least[k])
    return (abs(value) >= np.float32(least[k])) & (abs(value) <= np.float32(most[k]))


@inlined
def _delta(own: Any, below: Any, marks: Any, stays: Any, k: int) -> Any:
    """The delta of model `k`, or zero where it is dropped by chance."""
    if marks is None:
        return np.int32(own << 16).view(np.float32) - below
    return np.int32(own << 16).view(np.float32) - below if stays & np.int32(1 << k) else np.float32(0)


@kernel
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
    """As :func:`mergepipe.tasks.kernels.agree_few`, from bits to bits, for up to :data:`AT_ONCE` models.

    Parameters
    ----------
    base, rows, out : uint16 ndarray, shape (n,)
    marks : uint8 ndarray, shape (n,), or None
        Bit k is set where model k's delta stays, for up to :data:`MARKED` models; None where none is dropped first.
    most : tuple of float, or None
        Larger magnitudes are dropped as those below `least` are; None where none is too large.
    factors : tuple of float, or None
        None where all are 1.
    weights, least, normalize, scale
        As for the other.

    Returns
    -------
    bool
        False if a stored value is not finite, or a result does not fit; `out` is of no use then.
    """
    zero, one, factor = np.float32(0), np.float32(1), np.float32(scale)
    worst, over = np.int32(0), np.int32(0)
    for i in range(out.size):
        # What is not 32 bits wide from the start halves the elements per instruction.
        stored = np.int32(base[i])
        below = np.int32(stored << 16).view(np.float32)
        # One maximum per element and then one over them: more at once do not vectorise.
        peak = np.int32(stored & 0x7FFF)
        stays = np.int32(0) if marks is None else np.int32(marks[i])
        vote = zero
        for k in range(len(rows)):
            own = np.int32(rows[k][i])
            peak = max(peak, np.int32(own & 0x7FFF))
            value = _delta(own, below, marks, stays, k)
            thinned = value if factors is None else np.float32(factors[k]) * value
            term = np.float32(weights[k]) * thinned
            vote = vote + term if _kept(value, least, most, k) else vote
        elected = one if vote >= zero else -one
        total, agreeing = zero, zero
        for k in range(len(rows)):
            value = _delta(np.int32(rows[k][i]), below, marks, stays, k)
            thinned = value if factors is None else np.float32(factors[k]) * value
            term = np.float32(weights[k]) * thinned
            agrees = _kept(value, least, most, k) & (term * elected > zero)
            total = total + term if agrees else total
            agreeing = agreeing + np.float32(weights[k]) if agrees else agreeing
        divisor = agreeing if (agreeing != zero) & normalize else one
        bits = np.float32(below + factor * (total / divisor)).view(np.int32)
        worst = max(worst, peak)
        over = max(over, np.int32(bits & 0x7FFFFFFF))
        out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bool((worst < 0x7F80) & (over < TOO_LARGE))


@kernel
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
    zero, whole, factor = np.float32(0), np.float32(divisor), np.float32(scale)
    divides = whole != np.float32(1)
    worst, over = np.int32(0), np.int32(0)
    for i in range(out.size):
        stored = np.int32(base[i])
        below = np.int32(stored << 16).view(np.float32)
        peak = np.int32(stored & 0x7FFF)
        stays = np.int32(0) if marks is None else np.int32(marks[i])
        total = zero
        for k in range(len(rows)):
            own = np.int32(rows[k][i])
            peak = max(peak, np.int32(own & 0x7FFF))
            value = _delta(own, below, marks, stays, k)
            thinned = value if factors is None else np.float32(factors[k]) * value
            total = total + np.float32(weights[k]) * thinned if _kept(value, least, most, k) else total
        bits = np.float32(below + factor * (total / whole if divides else total)).view(np.int32)
        worst = max(worst, peak)
        over = max(over, np.int32(bits & 0x7FFFFFFF))
        out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bool((worst < 0x7F80) & (over < TOO_LARGE))


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
        out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bool(over < TOO_LARGE)


@kernel
def agree_in_strips(
    base: Array,
    rows: Rows,
    strips: Rows,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars,
    normalize: bool,
    scale: float,
    out: Array,
) -> bool:
    """As :func:`agree`, for more models; `strips`, shape (STRIP,) each, one per model, are overwritten."""
    below = np.empty(STRIP, np.float32)
    merged = np.empty(STRIP, np.float32)
    worst, over = np.int32(0), np.int32(0)
    for start in range(0, base.size, STRIP):
        stop = min(start + STRIP, base.size)
        worst = max(worst, _decode(base[start:stop], below))
        for k in range(len(rows)):
            worst = max(worst, _deltas(rows[k][start:stop], below, strips[k]))
        _agree(below, strips, weights, least, most, factors, normalize, scale, merged[: stop - start])
        over |= _encode(merged, out[start:stop])
    return bool((worst < 0x7F80) & (over == 0))


@kernel
def _agree(
    base: Array,
    rows: Rows,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars,
    normalize: bool,
    scale: float,
    out: Array,
) -> None:
    zero, one, factor = np.float32(0), np.float32(1), np.float32(scale)
    for i in range(out.size):
        vote = zero
        for k in range(len(rows)):
            value = rows[k][i]
            thinned = np.float32(factors[k]) * value
            vote += np.float32(weights[k]) * thinned if _kept(value, least, most, k) else zero
        elected = one if vote >= zero else -one
        total = zero
        agreeing = zero
        for k in range(len(rows)):
            value = rows[k][i]
            thinned = np.float32(factors[k]) * value
            term = np.float32(weights[k]) * thinned if _kept(value, least, most, k) else zero
            agrees = term * elected > zero
            total += term if agrees else zero
            agreeing += np.float32(weights[k]) if agrees else zero
        divisor = agreeing if (agreeing != zero) & normalize else one
        out[i] = base[i] + factor * (total / divisor)


@kernel
def add_in_strips(
    base: Array,
    rows: Rows,
    strips: Rows,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars,
    divisor: float,
    scale: float,
    out: Array,
) -> bool:
    """As :func:`add`, for more models; `strips` as of :func:`agree_in_strips`."""
    below = np.empty(STRIP, np.float32)
    merged = np.empty(STRIP, np.float32)
    worst, over = np.int32(0), np.int32(0)
    for start in range(0, base.size, STRIP):
        stop = min(start + STRIP, base.size)
        worst = max(worst, _decode(base[start:stop], below))
        for k in range(len(rows)):
            worst = max(worst, _deltas(rows[k][start:stop], below, strips[k]))
        _add(below, strips, weights, least, most, factors, divisor, scale, merged[: stop - start])
        over |= _encode(merged, out[start:stop])
    return bool((worst < 0x7F80) & (over == 0))


@kernel
def _add(
    base: Array,
    rows: Rows,
    weights: Scalars,
    least: Scalars,
    most: Scalars | None,
    factors: Scalars,
    divisor: float,
    scale: float,
    out: Array,
) -> None:
    zero, whole, factor = np.float32(0), np.float32(divisor), np.float32(scale)
    for i in range(out.size):
        total = zero
        for k in range(len(rows)):
            value = rows[k][i]
            thinned = np.float32(factors[k]) * value
            total += np.float32(weights[k]) * thinned if _kept(value, least, most, k) else zero
        out[i] = base[i] + factor * (total / whole)


@kernel
def keep(base: Array, rows: Rows, marks: Array, out: Array) -> bool:
    """What other loops here can be given in place of the models: the base's bits where a model's delta is dropped.

    For more than :data:`MARKED` models. A value less itself is zero, as a dropped delta is.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    marks : uint8 ndarray, shape (n,)
        As for :func:`agree`.
    out : uint16 ndarray, shape (models, n)

    Returns
    -------
    bool
        False if a model's stored value is not finite, whether it stays or not.
    """
    worst = np.int32(0)
    for k in range(len(rows)):
        worst = max(worst, _keep(base, rows[k], marks, np.int32(1 << k), out[k]))
    return bool(worst < 0x7F80)


@kernel
def _keep(base: Array, row: Array, marks: Array, bit: Any, out: Array) -> Any:
    worst = np.int32(0)
    for i in range(out.size):
        own = np.int32(row[i])
        worst = max(worst, np.int32(own & 0x7FFF))
        out[i] = np.uint16(own if np.int32(marks[i]) & bit else np.int32(base[i]))
    return worst


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
