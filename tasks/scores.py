"""What is done by score in coordinate fusion: scoring, counting, weighing and taking.

A score is ``abs(B - A)`` times the divergence of the row (:mod:`mergepipe.tasks.rows`, which also knows what an
element contributes to it). Where all is stored as bfloat16, a unit is worked on from its stored bits, in pieces that
stay in the caches, and without a call per block: the same operations in the same order as by tiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.jit import kernel
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array

PIECE = 8192
"""Elements, at the least, that the loops over stored bits take at once: a few pieces fill a first-level cache."""

TOO_LARGE = 0x7F7F8000
"""Bits of float32 magnitudes that are not finite, or not once they are rounded to bfloat16."""


@kernel
def score_delta(a: Array, b: Array, width: int, rows: Array, always: bool, out: Array) -> None:
    """``abs(D)`` times the row's divergence.

    Parameters
    ----------
    a, b : ndarray, shape (n,)
        Whole rows, or a piece of one.
    width : int
        Elements per row of `rows`.
    rows : float64 ndarray, shape (rows, 1 to 3)
        Their statistics.
    always : bool
        Whether elements of a row of divergence 0 score ``abs(D)`` rather than 0.
    out : ndarray, shape (n,)
    """
    for row in range(rows.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        scores = out[row * width : (row + 1) * width]
        factor = 1.0 if always and rows[row, 0] == 0.0 else rows[row, 0]
        if factor == 0.0:
            scores[:] = 0
            continue
        for i in range(scores.size):
            scores[i] = np.float64(abs(y[i] - x[i])) * factor


@kernel
def sort_energies(
    a: Array, b: Array, keys: Array, low: Any, high: Any, shift: int, unit: float, counts: Array, lanes: Array
) -> None:
    """Count keys from `low` to `high` by their last bits, and add up squares of D by score.

    Parameters
    ----------
    a, b : ndarray, shape (n,)
        Primary and donor; n is a multiple of 64, but for the last piece of a block.
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
    for start in range(0, a.size, LANES):
        x, y, key = a[start : start + LANES], b[start : start + LANES], keys[start : start + LANES]
        inside = np.int64(0)
        for i in range(x.size):
            d = np.float64(y[i] - x[i])
            lanes[i] += d * d if key[i] > high else 0.0
            inside += np.int64((key[i] >= low) & (key[i] <= high))
        if inside:
            for i in range(x.size):
                if (key[i] >= low) & (key[i] <= high):
                    d, place = np.float64(y[i] - x[i]), np.uintp((key[i] >> shift) & 0xFFFF)
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


@kernel
def added(lanes: Array) -> float:
    """Their sum, one after another."""
    total = 0.0
    for i in range(lanes.size):
        total += lanes[i]
    return total


@kernel
def _decode(bits: Array, out: Array) -> bool:
    """Stored bfloat16 to float32; whether all are finite."""
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    return bool(worst < 0x7F80)


@kernel
def _encode(values: Array, out: Array) -> bool:
    """float32 to stored bfloat16, rounded to nearest, ties to even; whether all are finite and fit."""
    worst = np.int32(0)
    for i in range(out.size):
        bits = np.float32(values[i]).view(np.int32)
        worst = max(worst, np.int32(bits & 0x7FFFFFFF))
        out[i] = np.uint16(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return bool(worst < TOO_LARGE)


@kernel
def _count_scores(scores: Array, counts: Array) -> None:
    keys = scores.view(np.int32)
    # Neighbours often fall into the same bin, and would wait for each other's counter: so two take turns.
    half = keys.size // 2
    first, second, even, odd = counts[0], counts[1], keys[:half], keys[half:]
    for i in range(half):
        first[np.uintp((even[i] & 0x7FFFFFFF) >> 16)] += np.int32(1)
        second[np.uintp((odd[i] & 0x7FFFFFFF) >> 16)] += np.int32(1)
    for i in range(2 * half, keys.size):
        first[np.uintp((keys[i] & 0x7FFFFFFF) >> 16)] += np.int32(1)


def piece_rows(width: int) -> int:
    """Rows that the loops over stored bits take at once: few enough for the caches, and whole multiples of the lanes.

    Examples
    --------
    >>> piece_rows(1536), piece_rows(4096), piece_rows(7), piece_rows(50_257)
    (6, 2, 1216, 64)
    """
    whole = LANES // math.gcd(width, LANES)
    return -(-PIECE // (width * whole)) * whole


@kernel
def count_stored(
    base: Array, donors: tuple[Array, ...], width: int, piece: int, found: Array, always: bool, counts: Array
) -> bool:
    """Count the top 15 bits of the scores of stored bfloat16 numbers.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
    width, piece : int
        Elements of a row and of what is worked on at once, whole rows.
    found : float64 ndarray, shape (donors, rows, 1 to 3)
        The statistics of the rows.
    always : bool
        As of :func:`score_delta`.
    counts : int64 ndarray, shape (donors, 32768)
        Added to.

    Returns
    -------
    bool
        False if a stored value is not finite: then all is for the general way.
    """
    first, second, scores = np.empty(piece, np.float32), np.empty(piece, np.float32), np.empty(piece, np.float32)
    turns = np.zeros((len(donors), 2, counts.shape[1]), np.int32)
    for at in range(0, base.size, piece):
        after = min(at + piece, base.size)
        a, b, out = first[: after - at], second[: after - at], scores[: after - at]
        if not _decode(base[at:after], a):
            return False
        for j in range(len(donors)):
            if not _decode(donors[j][at:after], b):
                return False
            score_delta(a, b, width, found[j, at // width : after // width], always, out)
            _count_scores(out, turns[j])
    for j in range(len(donors)):
        for i in range(counts.shape[1]):
            counts[j, i] += turns[j, 0, i] + turns[j, 1, i]
    return True


@kernel
def sort_stored(
    base: Array, donors: tuple[Array, ...], width: int, block: int, piece: int, found: Array, always: bool, lows: Array,
    units: Array, blocks: Array, counts: Array,
) -> bool:  # fmt: skip
    """Count the scores of stored bfloat16 numbers inside a bin, and add up squares: :func:`sort_energies`.

    Parameters
    ----------
    base, donors, width, piece, found, always
        As of :func:`count_stored`.
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
    first, second, scores = np.empty(piece, np.float32), np.empty(piece, np.float32), np.empty(piece, np.float32)
    lanes = np.empty((len(donors), LANES))
    for start in range(0, base.size, block):
        stop = min(start + block, base.size)
        lanes[:] = 0.0
        for at in range(start, stop, piece):
            after = min(at + piece, stop)
            a, b, out = first[: after - at], second[: after - at], scores[: after - at]
            if not _decode(base[at:after], a):
                return False
            for j in range(len(donors)):
                if not _decode(donors[j][at:after], b):
                    return False
                score_delta(a, b, width, found[j, at // width : after // width], always, out)
                low = np.int32(lows[j])
                keys = out.view(np.int32)
                sort_energies(a, b, keys, low, np.int32(low | 0xFFFF), 0, units[j], counts[j], lanes[j])
        for j in range(len(donors)):
            blocks[start // block, j] = added(lanes[j])
    return True


@kernel
def take_stored(
    base: Array, donors: tuple[Array, ...], width: int, piece: int, found: Array, always: bool, least: Array,
    scale: float, out: Array,
) -> bool:  # fmt: skip
    """Fuse stored bfloat16 numbers: :func:`take` of each donor in turn.

    Parameters
    ----------
    base, donors, width, piece, found, always
        As of :func:`count_stored`.
    least : float64 ndarray, shape (donors,)
        The thresholds.
    scale : float
    out : uint16 ndarray, shape (n,)

    Returns
    -------
    bool
        False if a value is not finite, or does not fit.
    """
    first, second, scores = np.empty(piece, np.float32), np.empty(piece, np.float32), np.empty(piece, np.float32)
    highest, fused = np.empty(piece, np.float32), np.empty(piece, np.float32)
    for at in range(0, base.size, piece):
        after = min(at + piece, base.size)
        size = after - at
        a, b, score, best, made = first[:size], second[:size], scores[:size], highest[:size], fused[:size]
        if not _decode(base[at:after], a):
            return False
        made[:] = a
        best[:] = 0
        for j in range(len(donors)):
            if not _decode(donors[j][at:after], b):
                return False
            score_delta(a, b, width, found[j, at // width : after // width], always, score)
            take(b, score, least[j], scale, best, a, made)
        if not _encode(made, out[at:after]):
            return False
    return True
