"""What is done by score in coordinate fusion: scoring, counting, weighing and taking.

A score is ``abs(B - A)`` times the divergence of the row (:mod:`mergepipe.tasks.rows`, which also knows what an
element contributes to it). Where all is stored as bfloat16, a unit is worked on from its stored bits, in registers or
in strips that stay in the caches, and without a call per block: the same operations in the same order as by tiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.fused_counts import gather
from mergepipe.tasks.jit import inlined, kernel, uncounted
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array
from mergepipe.tasks.select import FINE_BINS
from mergepipe.tasks.squares import squares_above

STRIP = 2048
"""Elements whose scores the loops over stored bits keep at a time, a multiple of the lanes: a few strips fill a
first-level cache."""

UNIT_BITS = 52
"""Squares inside a bin are counted in units of the whole sum over two to this."""

AT_ONCE = 8
"""Most donors that one loop takes from at once: with twice as many it is not vectorised, and ten times slower."""

TOO_LARGE = 0x7F7F8000
"""Bits of float32 magnitudes that are not finite, or not once they are rounded to bfloat16."""


@inlined
def factor_of(divergence: Any, always: Any) -> Any:
    """What the differences of a row are multiplied by."""
    return 1.0 if always and divergence == 0.0 else divergence


@kernel
def score_delta(a: Array, b: Array, width: int, rows: Array, always: bool, out: Array) -> None:
    """``abs(D)`` times the row's divergence.

    Parameters
    ----------
    a, b : ndarray, shape (n,)
        Whole rows, or a piece of one.
    width : int
        Elements per row of `rows`.
    rows : float64 ndarray, shape (rows, 1 or 3)
        Their statistics.
    always : bool
        Whether elements of a row of divergence 0 score ``abs(D)`` rather than 0.
    out : ndarray, shape (n,)
    """
    for row in range(rows.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        scores = out[row * width : (row + 1) * width]
        factor = factor_of(rows[row, 0], always)
        if factor == 0.0:
            scores[:] = 0
            continue
        for i in range(scores.size):
            scores[i] = np.float64(abs(y[i] - x[i])) * factor


def unit_of(energy: float) -> float:
    """A power of two that takes a sum of squares to about 2**52; 1 where there is none, or none that is finite."""
    if not 0 < energy < math.inf:
        return 1.0
    return math.ldexp(1.0, min(UNIT_BITS - math.frexp(energy)[1], 1000))


@uncounted
def _sort_inside(
    deltas: Array, keys: Array, low: Any, high: Any, shift: int, unit: float, counts: Array, marks: Array, full: Array,
    found: Array,
) -> None:  # fmt: skip
    """Count keys from `low` to `high` by their last bits, and add up squares of D by these: see :func:`sort_tile`.

    Of at most :data:`STRIP` elements; the last three are working memory, from :func:`gathering`.
    """
    for i in range(keys.size):
        marks[i] = np.uint8((keys[i] >= low) & (keys[i] <= high))
    for k in range(gather(marks, words_of(marks, keys.size), full, found)):
        at = np.uintp(found[np.uintp(k)])
        d, place = np.float64(deltas[at]), np.uintp((keys[at] >> shift) & 0xFFFF)
        counts[0, place] += 1
        counts[1, place] += np.int64(d * d * unit + 0.5)


@inlined
def gathering() -> Any:
    """Working memory for what is picked out of a strip: marks, words that have some, places."""
    return np.zeros(STRIP, np.uint8), np.empty(STRIP // 8, np.int32), np.empty(STRIP, np.int32)


@inlined
def words_of(marks: Array, count: Any) -> Any:
    """Those of the first `count` marks; those behind in the last word are made zero."""
    size = (count + 7) // 8
    for i in range(count, 8 * size):
        marks[np.uintp(i)] = 0
    return marks.view(np.int64)[:size]


@kernel
def sort_tile(
    deltas: Array, keys: Array, width: int, rows: Array, low: Any, high: Any, shift: int, mask: Any, unit: float,
    counts: Array,
) -> None:  # fmt: skip
    """Count scores by their last bits, and add up squares of D by score.

    Parameters
    ----------
    deltas : ndarray, shape (n,)
        Of the donor to the primary: whole rows of `width` elements, or a piece of one.
    keys : signed integer ndarray, shape (n,)
        The scores, as :func:`mergepipe.tasks.select.order_keys` has them.
    width : int
    rows : float64 ndarray, shape (rows, 1 or 3)
        The statistics of the rows.
    low, high, shift : int
        The 16 bits that lie `shift` from the right are what keys from `low` to `high` are counted by.
    mask : int
        All bits but the sign's, of the type of a key.
    unit : float
    counts : int64 ndarray, shape (2, 65536 + SQUARES)
        Added to: how many keys there are, and behind them the squares of keys above `high`, as :func:`squares_above`
        has them; and the squares of those inside in whole multiples of 1 / `unit`, which add up exactly in any order.
    """
    marks, full, found = gathering()
    # Largest magnitudes by their bits, whose maximum vectorises.
    bits, peak = deltas.view(keys.dtype), np.empty(1, keys.dtype)
    for start in range(0, keys.size, STRIP):
        part, delta = keys[start : start + STRIP], deltas[start : start + STRIP]
        _sort_inside(delta, part, low, high, shift, unit, counts, marks, full, found)
    for row in range(rows.shape[0]):
        for start in range(row * width, (row + 1) * width, STRIP):
            stop = min(start + STRIP, (row + 1) * width)
            largest = bits[start] & mask
            for i in range(start, stop):
                largest = max(largest, bits[i] & mask)
            peak[0] = largest
            reach = np.float64(peak.view(deltas.dtype)[0])
            squares_above(deltas[start:stop], keys[start:stop], high, rows[row, 0], reach, counts[0, FINE_BINS:])


@kernel
def kept_energy(a: Array, b: Array, scores: Array, least: float, out: Array) -> None:
    """Count, and sum of squares of D, of the elements that are taken: into `out`, shape (2,)."""
    lanes = np.zeros((2, LANES))
    for start in range(0, a.size, LANES):
        x, y, score = a[start : start + LANES], b[start : start + LANES], scores[start : start + LANES]
        for i in range(x.size):
            d = np.float64(y[i] - x[i])
            taken = (np.float64(score[i]) >= least) & (score[i] > 0)
            lanes[0, i] += 1.0 if taken else 0.0
            lanes[1, i] += d * d if taken else 0.0
    out[0] = lanes[0].sum()
    out[1] = lanes[1].sum()


@kernel
def take(b: Array, scores: Array, least: float, scale: float, best: Array, primary: Array, out: Array) -> None:
    """Put the donor's elements into `out` where they score at least `least`, more than 0 and more than `best`.

    At a `scale` of 1 it is the donor's own value, else ``primary + scale * (b - primary)``; `best` is raised.
    """
    # Loads come first: one that depends on a comparison would keep the loops from vectorising.
    if scale == 1.0:
        for i in range(out.size):
            score, top, moved, old = scores[i], best[i], b[i], out[i]
            taken = (np.float64(score) >= least) & (score > top)
            out[i] = moved if taken else old
            best[i] = score if taken else top
        return
    factor = out.dtype.type(scale)
    for i in range(out.size):
        score, top, moved, old = scores[i], best[i], primary[i] + factor * (b[i] - primary[i]), out[i]
        taken = (np.float64(score) >= least) & (score > top)
        out[i] = moved if taken else old
        best[i] = score if taken else top


def rounded_up(thresholds: Array) -> Array:
    """The smallest float32 numbers that are not below float64 thresholds: what float32 scores reach is the same.

    Examples
    --------
    >>> rounded_up(np.array([1.0, 1.0 + 1e-12])).tolist()
    [1.0, 1.0000001192092896]
    """
    with np.errstate(over="ignore"):
        nearest = thresholds.astype(np.float32)
        found: Array = np.where(nearest < thresholds, np.nextafter(nearest, np.float32(math.inf)), nearest)
    return found


@uncounted
def _score_strip(base: Array, donor: Array, start: int, stop: int, factor: float, keys: Array, deltas: Array) -> Any:
    """Bits of the scores of the stored elements `start` to `stop` of a row into `keys`, their differences too.

    The largest magnitude of stored bits is returned, and that of a difference.
    """
    worst, largest = np.int32(0), np.int32(0)
    for place in range(start, stop):
        # What has no sign can't count from the end: that test would keep the loop from vectorising.
        i, k = np.uintp(place), np.uintp(place - start)
        first, second = np.int32(base[i]), np.int32(donor[i])
        worst = max(worst, max(np.int32(first & 0x7FFF), np.int32(second & 0x7FFF)))
        delta = np.float32(np.int32(second << 16).view(np.float32) - np.int32(first << 16).view(np.float32))
        score = np.float32(np.float64(abs(delta)) * factor)
        # Zero times a difference that overflows is none.
        keys[k] = np.int32(0) if factor == 0.0 else score.view(np.int32)
        deltas[k] = delta
        largest = max(largest, np.int32(delta.view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return worst, np.float64(found.view(np.float32))


@kernel
def sort_stored(
    base: Array, donors: tuple[Array, ...], width: int, found: Array, always: bool, lows: Array, units: Array,
    counts: Array,
) -> bool:  # fmt: skip
    """Count the scores of stored bfloat16 numbers inside a bin, and add up squares: :func:`sort_tile`.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
    width : int
        Elements of a row.
    found : float64 ndarray, shape (donors, rows, 1 or 3)
        The statistics of the rows.
    always : bool
        As of :func:`score_delta`.
    lows : int64 ndarray, shape (donors,)
        The smallest key of the bin, which is 65536 wide.
    units : float64 ndarray, shape (donors,)
    counts : int64 ndarray, shape (donors, 2, 65536 + SQUARES)

    Returns
    -------
    bool
        False if a stored value is not finite.
    """
    keys, deltas = np.empty(STRIP, np.int32), np.empty(STRIP, np.float32)
    marks, full, places = gathering()
    worst, rows = np.int32(0), base.size // width
    # Many narrow rows, or a part of a wide one, are looked at together.
    together, part = max(1, STRIP // width), min(width, STRIP)
    for first in range(0, rows, together):
        for j in range(len(donors)):
            low = np.int32(lows[j])
            high, squares = np.int32(low | 0xFFFF), counts[j, 0, FINE_BINS:]
            for begin in range(0, width, part):
                size = min(part, width - begin)
                last = min(first + together, rows)
                for row in range(first, last):
                    at, start = (row - first) * size, row * width + begin
                    key, delta = keys[at : at + size], deltas[at : at + size]
                    factor = factor_of(found[j, row, 0], always)
                    peak, reach = _score_strip(base, donors[j], start, start + size, factor, key, delta)
                    worst = max(worst, peak)
                    squares_above(delta, key, high, found[j, row, 0], reach, squares)
                size *= last - first
                _sort_inside(deltas[:size], keys[:size], low, high, 0, units[j], counts[j], marks, full, places)
    return bool(worst < 0x7F80)


@uncounted
def _take_row(
    base: Array, donors: tuple[Array, ...], start: int, stop: int, factors: Array, least: Array, scale: float | None,
    out: Array,
) -> bool:  # fmt: skip
    """Fuse the elements `start` to `stop` of a row, all donors at once and in registers: :func:`take_stored`.

    What the differences of the row are multiplied by stands in `factors`, float64, shape (donors,).
    """
    worst, over = np.int32(0), np.int32(0)
    for place in range(start, stop):
        # What has no sign can't count from the end: that test would keep the loop from vectorising.
        i = np.uintp(place)
        stored = np.int32(base[i])
        below = np.int32(stored << 16).view(np.float32)
        peak = np.int32(stored & 0x7FFF)
        best, taken_bits, taken_value = np.float32(0), stored, below
        for j in range(len(donors)):
            own = np.int32(donors[j][i])
            peak = max(peak, np.int32(own & 0x7FFF))
            delta = np.float32(np.int32(own << 16).view(np.float32) - below)
            score = np.float32(np.float64(abs(delta)) * factors[j])
            taken = (score >= least[j]) & (score > best)
            best = score if taken else best
            if scale is None:
                taken_bits = own if taken else taken_bits
            else:
                taken_value = below + np.float32(scale) * delta if taken else taken_value
        worst = max(worst, peak)
        if scale is None:
            out[i] = np.uint16(taken_bits)
        else:
            bits = np.float32(taken_value).view(np.int32)
            over = max(over, np.int32(bits & 0x7FFFFFFF))
            out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bool((worst < 0x7F80) & (over < TOO_LARGE))


@kernel
def take_stored(
    base: Array, donors: tuple[Array, ...], width: int, found: Array, always: bool, least: Array, scale: float | None,
    out: Array,
) -> bool:  # fmt: skip
    """Fuse stored bfloat16 numbers: :func:`take` of each donor in turn.

    Parameters
    ----------
    base, donors, width, found, always
        As of :func:`sort_stored`.
    least : float32 ndarray, shape (donors,)
        The thresholds, or the next larger numbers.
    scale : float or None
        None for 1, where stored bits are taken as they are.
    out : uint16 ndarray, shape (n,)

    Returns
    -------
    bool
        False if a value is not finite, or does not fit.
    """
    factors = np.empty(len(donors))
    for row in range(base.size // width):
        for j in range(len(donors)):
            factors[j] = factor_of(found[j, row, 0], always)
        if not _take_row(base, donors, row * width, (row + 1) * width, factors, least, scale, out):
            return False
    return True
