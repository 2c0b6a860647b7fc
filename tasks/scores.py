"""What is done by score in coordinate fusion: scoring, counting, weighing and taking.

A score is ``abs(B - A)`` times the divergence of the row (:mod:`mergepipe.tasks.rows`, which also knows what an
element contributes to it). Where all is stored as bfloat16, a unit is worked on from its stored bits, in registers or
in strips that stay in the caches, and without a call per block: the same operations in the same order as by tiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, kernel, uncounted
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array

STRIP = 2048
"""Elements whose scores the loops over stored bits keep at a time, a multiple of the lanes: a few strips fill a
first-level cache. A block is cut into strips whatever its rows are."""

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


@uncounted
def sort_energies(
    deltas: Array, keys: Array, low: Any, high: Any, shift: int, unit: float, counts: Array, lanes: Array
) -> None:
    """Count keys from `low` to `high` by their last bits, and add up squares of D by score.

    Parameters
    ----------
    deltas : ndarray, shape (n,)
        Of the donor to the primary; n is a multiple of 64, but for the last piece of a block.
    keys : signed integer ndarray, shape (n,)
        The scores, as :func:`mergepipe.tasks.select.order_keys` has them.
    low, high, shift : int
        The 16 bits that lie `shift` from the right are what keys are counted by.
    unit : float
    counts : int64 ndarray, shape (2, 65536)
        Added to: how many keys there are; and the sum of their squares in whole multiples of 1 / `unit`, which add up
        exactly in any order.
    lanes : float64 ndarray, shape (64,)
        Added to: the squares of keys above `high`.
    """
    for start in range(0, deltas.size, LANES):
        delta, key = deltas[start : start + LANES], keys[start : start + LANES]
        inside = np.int64(0)
        for i in range(key.size):
            d = np.float64(delta[i])
            lanes[i] += d * d if key[i] > high else 0.0
            inside += np.int64((key[i] >= low) & (key[i] <= high))
        if inside:
            for i in range(key.size):
                if (key[i] >= low) & (key[i] <= high):
                    d, place = np.float64(delta[i]), np.uintp((key[i] >> shift) & 0xFFFF)
                    counts[0, place] += 1
                    counts[1, place] += np.int64(d * d * unit + 0.5)


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
def added(lanes: Array) -> float:
    """Their sum, one after another."""
    total = 0.0
    for i in range(lanes.size):
        total += lanes[i]
    return total


@uncounted
def _score_strip(
    base: Array, donor: Array, start: int, stop: int, width: int, rows: Array, always: bool, keys: Array, deltas: Array
) -> Any:  # fmt: skip
    """Bits of the scores of the stored elements `start` to `stop` into `keys`, their differences into `deltas`.

    The largest magnitude of stored bits is returned.
    """
    worst = np.int32(0)
    at = start
    while at < stop:
        row = at // width
        after = min((row + 1) * width, stop)
        factor = factor_of(rows[row, 0], always)
        for place in range(at, after):
            # What has no sign can't count from the end: that test would keep the loop from vectorising.
            i, k = np.uintp(place), np.uintp(place - start)
            first, second = np.int32(base[i]), np.int32(donor[i])
            worst = max(worst, max(np.int32(first & 0x7FFF), np.int32(second & 0x7FFF)))
            delta = np.float32(np.int32(second << 16).view(np.float32) - np.int32(first << 16).view(np.float32))
            score = np.float32(np.float64(abs(delta)) * factor)
            # Zero times a difference that overflows is none.
            keys[k] = np.int32(0) if factor == 0.0 else score.view(np.int32)
            deltas[k] = delta
        at = after
    return worst


@kernel
def sort_stored(
    base: Array, donors: tuple[Array, ...], width: int, block: int, found: Array, always: bool, lows: Array,
    units: Array, blocks: Array, counts: Array,
) -> bool:  # fmt: skip
    """Count the scores of stored bfloat16 numbers inside a bin, and add up squares: :func:`sort_energies`.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
    width : int
        Elements of a row.
    found : float64 ndarray, shape (donors, rows, 1 or 3)
        The statistics of the rows.
    always : bool
        As of :func:`score_delta`.
    block : int
        Elements of a block.
    lows : int64 ndarray, shape (donors,)
        The smallest key of the bin, which is 65536 wide.
    units : float64 ndarray, shape (donors,)
    blocks : float64 ndarray, shape (blocks, donors)
        Sums of squares of what scores above the bin.
    counts : int64 ndarray, shape (donors, 2, 65536)

    Returns
    -------
    bool
        False if a stored value is not finite.
    """
    keys, deltas = np.empty(STRIP, np.int32), np.empty(STRIP, np.float32)
    lanes = np.empty((len(donors), LANES))
    worst = np.int32(0)
    for first in range(0, base.size, block):
        last = min(first + block, base.size)
        lanes[:] = 0.0
        for j in range(len(donors)):
            for start in range(first, last, STRIP):
                stop = min(start + STRIP, last)
                key, delta = keys[: stop - start], deltas[: stop - start]
                worst = max(worst, _score_strip(base, donors[j], start, stop, width, found[j], always, key, delta))
                low = np.int32(lows[j])
                sort_energies(delta, key, low, np.int32(low | 0xFFFF), 0, units[j], counts[j], lanes[j])
        for j in range(len(donors)):
            blocks[first // block, j] = added(lanes[j])
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
