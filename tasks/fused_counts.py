"""Counting magnitudes of deltas from stored bfloat16: the sweeps behind exact thresholds, over whole units.

As :mod:`mergepipe.tasks.fused`, which see, these loops need no tile. They go strip by strip through memory that stays
in the first-level cache, count as :mod:`mergepipe.tasks.select` does, and add as :mod:`mergepipe.tasks.kernels` does.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, kernel, uncounted
from mergepipe.tasks.kernels import LANES, add_norms
from mergepipe.tasks.method import Array

Rows = tuple[Array, ...]

TOP_BINS = 1 << 15

STRIP = 2048
"""Elements taken at once."""

PIECE = STRIP // 8
"""Elements of a strip that are taken as a sample."""

ODD = 1 << 40
"""What :func:`count_near` adds to a counter, once a call, if it counted a pattern that is not the counter's first: more
than there are elements."""

ASIDE = 16
"""Such patterns that are put aside of each block and window."""


@uncounted
def _decode(bits: Array, out: Array) -> Any:
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    return worst


@uncounted
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
def count_top(base: Array, rows: Rows, edges: Array, sums: Array, counts: Array) -> bool:
    """Add the top 15 bits of the magnitudes of the deltas to `counts`; on request take their norms.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    edges : int64 ndarray, shape (blocks + 1,)
        Where each block begins, and the end of the last one.
    sums : float64 ndarray, shape (blocks, models, 2)
        Overwritten: the sum of magnitudes and the sum of squares, as :func:`mergepipe.tasks.kernels.norms` adds them.
        Of no columns if they are not wanted.
    counts : int64 ndarray, shape (models, 32768)

    Returns
    -------
    bool
        False if a stored value is not finite; `counts` and `sums` are of no use then.
    """
    below, keys = np.empty(STRIP, np.float32), np.empty(STRIP, np.int32)
    moments = np.empty((len(rows), 2, LANES))
    worst = np.int32(0)
    # Neighbours often fall into the same bin, and would wait for each other's counter: so four take turns.
    lanes = np.zeros((len(rows), 4, TOP_BINS), np.int32)
    for block in range(edges.size - 1):
        begin, end = edges[block], edges[block + 1]
        worst = max(worst, _count_block(base, rows, begin, end, below, keys, sums[block], moments, lanes))
    for k in range(len(rows)):
        total = counts[k]
        for lane in lanes[k]:
            for i in range(TOP_BINS):
                total[i] += lane[i]
    return bool(worst < 0x7F80)


@uncounted
def _count_block(
    base: Array, rows: Rows, begin: int, end: int, below: Array, keys: Array, sums: Array, moments: Array, lanes: Array
) -> Any:
    """The same for one block; the largest magnitude of the stored numbers, 16 bits of it."""
    worst = np.int32(0)
    moments[:] = 0.0
    for start in range(begin, end, STRIP):
        stop = min(start + STRIP, end)
        worst = max(worst, _decode(base[start:stop], below))
        for k in range(len(rows)):
            worst = max(worst, _keys(rows[k][start:stop], below, keys))
            _scatter(keys[: stop - start], lanes[k])
            if sums.shape[1] > 0:
                add_norms(keys[: stop - start].view(np.float32), moments[k])
    for k in range(len(rows)):
        for power in range(sums.shape[1]):
            sums[k, power] = moments[k, power].sum()
    return worst


@uncounted
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


@inlined
def sampled(size: int) -> int:
    """How many of so many elements :func:`sample_top` takes."""
    return size // STRIP * PIECE


@kernel
def sample_top(base: Array, rows: Rows, counts: Array, means: Array) -> bool:
    """As :func:`count_top`, of a piece of each strip only, which lies elsewhere in each: no column is left out.

    Of as many rows as it has places, `means` gets the mean magnitude of the delta, float64.
    """
    moments = np.zeros((means.size, 2, LANES))
    below, keys = np.empty(PIECE, np.float32), np.empty(PIECE, np.int32)
    worst = _sample(base, rows, below, keys, counts, moments)
    for k in range(means.size):
        means[k] = moments[k, 0].sum() / max(1, sampled(base.size))
    return bool(worst < 0x7F80)


@uncounted
def _sample(base: Array, rows: Rows, below: Array, keys: Array, counts: Array, moments: Array) -> Any:
    worst = np.int32(0)
    for strip in range(base.size // STRIP):
        # Fibonacci hashing: neighbours get places far from each other, and no width of a row has a rhythm with it.
        place = ((strip * 0x9E3779B1) & 0xFFFFFFFF) >> 29
        start = strip * STRIP + place * PIECE
        # The compiler is not to see how long a piece is: it would write out the last loop, which took twice as long.
        stop = min(start + PIECE, base.size)
        worst = max(worst, _decode(base[start:stop], below))
        for k in range(len(rows)):
            worst = max(worst, _keys(rows[k][start:stop], below, keys))
            own = counts[k]
            for i in range(stop - start):
                own[np.uintp(keys[i] >> 16)] += 1
            if moments.shape[0] > 0:
                add_norms(keys[: stop - start].view(np.float32), moments[k])
    return worst


@kernel
def count_near(base: Array, rows: Rows, lows: Array, shifts: Array, counts: Array, aside: Array) -> bool:
    """Count the magnitudes of the deltas that lie in windows, exactly or several patterns to a counter.

    Parameters
    ----------
    base, rows : uint16 ndarray, shape (n,); one row per model
    lows : int64 ndarray, shape (models, windows)
        The bits of the smallest magnitude inside; negative for a window that is not wanted.
    shifts : int64 ndarray, shape (models, windows)
        A counter stands for ``2**shift`` patterns.
    counts : int64 ndarray, shape (models, windows, counters) or (models, windows, counters + 1)
        Added to: how many fall to each of the counters, an even number of them, plus :data:`ODD` if one of them is not
        the counter's first pattern; in the last place of an odd number of places, how many lie below the window.
    aside : float64 ndarray, shape (blocks, models, windows * ASIDE)
        Gets the bits of magnitudes that are not their counter's first pattern, which are counted only where there is no
        room; those of one window stand in the same columns of all rows, zeros behind them. It may have no rows.

    Returns
    -------
    bool
        False if a stored value, or a delta, is not finite; `counts` are of no use then.
    """
    marks = np.zeros(STRIP, np.uint8)
    words, full = marks.view(np.int64), np.empty(STRIP // 8, np.int32)
    keys, found = np.empty(STRIP, np.int32), np.empty(STRIP, np.int32)
    used = np.empty(lows.shape[1], np.int64)
    worst = np.int32(0)
    # One model after the other: processors foresee what a few streams will need next, not what many will.
    for k in range(len(rows)):
        if lows[k].max() >= 0:
            largest = _near(
                base, rows[k], lows[k], shifts[k], counts[k], aside[:, k], used, marks, words, full, keys, found
            )
            worst = max(worst, largest)
    return bool(worst < 0x7F800000)


@uncounted
def _near(
    base: Array, row: Array, lows: Array, shifts: Array, counts: Array, aside: Array, used: Array, marks: Array,
    words: Array, full: Array, keys: Array, found: Array,
) -> Any:  # fmt: skip
    """The same for one model; the largest magnitude of a delta, by its bits. `used` is working memory."""
    worst = np.int32(0)
    used[:] = 0
    counters = counts.shape[1] & ~1
    for start in range(0, base.size, STRIP):
        stop = min(start + STRIP, base.size)
        worst = max(worst, _magnitudes(base[start:stop], row[start:stop], keys))
        # Marks behind the end stay zero.
        marks[stop - start :] = 0
        for r in range(lows.size):
            if lows[r] >= 0:
                low, width = np.int32(lows[r]), np.int32(counters << shifts[r])
                lower = _mark(keys[: stop - start], low, width, marks)
                if counts.shape[1] > counters:
                    counts[r, counters] += lower
                size = gather(marks, words, full, found)
                own = aside[:, r * ASIDE : (r + 1) * ASIDE]
                used[r] = _count_found(keys, found[:size], low, shifts[r], counts[r], own, used[r])
    return worst


@uncounted
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


@uncounted
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


@uncounted
def gather(marks: Array, words: Array, full: Array, found: Array) -> Any:
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


@uncounted
def _count_found(keys: Array, found: Array, low: Any, shift: int, counts: Array, aside: Array, used: int) -> int:
    """Count the keys at the places `found`; how many are put aside then, of which `used` were before."""
    within = np.int32((1 << shift) - 1)
    for k in range(found.size):
        key = keys[np.uintp(found[k])]
        place = np.int32(key - low)
        at = np.uintp(place >> shift)
        if (place & within) == 0:
            counts[at] += 1
        elif used < aside.size:
            aside[used // ASIDE, used % ASIDE] = key
            used += 1
        else:
            counts[at] += np.int64(1) + (np.int64(counts[at] < ODD) << 40)
    return used
