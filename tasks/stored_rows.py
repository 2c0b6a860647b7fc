"""Rows of stored bfloat16 numbers: measured, and their scores counted while they are at hand.

As :func:`mergepipe.tasks.rows.measure_rows` of each donor, :func:`mergepipe.tasks.scores.score_delta` and
:func:`mergepipe.tasks.select.count_top`, to the same bits: a row is decoded once for all of it.
"""

from __future__ import annotations

import math

import numpy as np

from mergepipe.tasks.fused_counts import TOP_BINS
from mergepipe.tasks.jit import kernel, uncounted
from mergepipe.tasks.method import Array
from mergepipe.tasks.row_sums import ROOM, STRIDE, STRIP
from mergepipe.tasks.rows import kind_of, measure_row
from mergepipe.tasks.score_lists import list_row
from mergepipe.tasks.scores import STRIP as PICKED
from mergepipe.tasks.scores import factor_of, gathering


@uncounted
def _decode(bits: Array, out: Array) -> float:
    """Stored bfloat16 to float32; the largest magnitude, which is not below an infinity if one is not finite."""
    largest = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        largest = max(largest, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    found = np.int32(largest << 16)
    return np.float64(found.view(np.float32))


@uncounted
def _decode_donor(bits: Array, a: Array, out: Array) -> tuple[bool, float]:
    """The same for a donor: whether all are finite, and the largest magnitude of the differences to `a`."""
    worst, largest = np.int32(0), np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        value = np.int32(stored << 16).view(np.float32)
        largest = max(largest, np.int32(np.float32(value - a[i]).view(np.int32) & 0x7FFFFFFF))
        out[i] = value
    found = np.int32(largest)
    return bool(worst < 0x7F80), np.float64(found.view(np.float32))


@uncounted
def _count_scores(a: Array, b: Array, factor: float, bins: Array, counts: Array) -> None:
    """Count the top 15 bits of the scores of a row: shape (n,) into the (2, 32768) of `counts`."""
    first, second = counts[0], counts[1]
    for start in range(0, a.size, STRIP):
        size = min(STRIP, a.size - start)
        for i in range(size):
            # What has no sign can't count from the end: that test would keep the loop from vectorising.
            place = np.uintp(start + i)
            score = np.float32(np.float64(abs(np.float32(b[place] - a[place]))) * factor)
            bins[np.uintp(i)] = score.view(np.int32) >> 16
        # Neighbours often fall into the same bin, and would wait for each other's counter: so two take turns.
        half = size // 2
        even, odd = bins[:half], bins[half:size]
        for i in range(half):
            first[np.uintp(even[i])] += np.int32(1)
            second[np.uintp(odd[i])] += np.int32(1)
        if size > 2 * half:
            first[np.uintp(odd[half])] += np.int32(1)


@kernel
def measure_and_count(
    base: Array, donors: tuple[Array, ...], width: int, block: int, reverse: float, forward: float, always: bool,
    blocks: Array, counts: Array,
) -> bool:  # fmt: skip
    """Measure rows, and count the top 15 bits of the scores that follow.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
        Whole blocks, but for the last of a tensor.
    width, block : int
        Elements of a row and of a block.
    reverse, forward : float
        Weights of the two directions.
    always : bool
        As of :func:`mergepipe.tasks.scores.score_delta`.
    blocks : float64 ndarray, shape (blocks, donors, rows of a block + 1)
        Where the divergences of the rows are put, and behind those of a block its sum of squares.
    counts : int64 ndarray, shape (donors, 32768)
        Added to; of no counters if no scores are wanted.

    Returns
    -------
    bool
        False if a stored value is not finite: then nothing is counted, and all is for the general way.
    """
    shared, filled, room = np.empty(STRIP), np.empty((2, STRIDE), np.float32), np.empty((len(donors), ROOM))
    a, b = np.empty(width, np.float32), np.empty((len(donors), width), np.float32)
    kinds, shifts = np.empty(len(donors), np.int64), np.zeros(len(donors))
    bins, turns = np.empty(STRIP, np.int32), np.zeros((len(donors), 2, counts.shape[1]), np.int32)
    zeros = np.zeros(len(donors), np.int64)
    for start in range(0, base.size, block):
        span, own = (start, min(start + block, base.size)), blocks[start // block]
        if not _measure_block(
            base, donors, span, (reverse, forward), always, own, a, b, kinds, shifts, shared, filled, room, bins,
            turns, zeros,
        ):  # fmt: skip
            return False
    for j in range(len(donors)):
        for i in range(counts.shape[1]):
            counts[j, i] += turns[j, 0, i] + turns[j, 1, i]
        if counts.shape[1] > 0:
            counts[j, 0] += zeros[j]
    return True


@uncounted
def _measure_block(
    base: Array, donors: tuple[Array, ...], span: tuple[int, int], directions: tuple[float, float], always: bool,
    own: Array, a: Array, b: Array, kinds: Array, shifts: Array, shared: Array, filled: Array, room: Array,
    bins: Array, turns: Array, zeros: Array,
) -> bool:  # fmt: skip
    """The same for the rows of one block, of which `own` takes the divergences, and behind them the sums of squares."""
    width = a.size
    own[:, -1] = 0.0
    for row in range((span[1] - span[0]) // width):
        at = span[0] + row * width
        if not _measure_row(base, donors, at, row, directions, own, a, b, kinds, shifts, shared, filled, room):
            return False
        for j in range(len(donors) if turns.shape[2] > 0 else 0):
            factor = factor_of(own[j, row], always)
            if factor == 0.0:
                # Zero times a difference that overflows is none.
                zeros[j] += width
            else:
                _count_scores(a, b[j], factor, bins, turns[j])
    return True


@uncounted
def _measure_row(
    base: Array, donors: tuple[Array, ...], at: int, row: int, directions: tuple[float, float], own: Array, a: Array,
    b: Array, kinds: Array, shifts: Array, shared: Array, filled: Array, room: Array,
) -> bool:  # fmt: skip
    """Decode the row that begins at `at` into `a` and `b`, and measure it: number `row` of those of `own`."""
    reach = _decode(base[at : at + a.size], a)
    if not reach < math.inf:
        return False
    for j in range(len(donors)):
        finite, distance = _decode_donor(donors[j][at : at + a.size], a, b[j])
        if not finite:
            return False
        kinds[j] = kind_of(reach, distance)
    found, energies = own[:, row : row + 1], own[:, -1]
    measure_row(a, b, kinds, reach, directions[0], directions[1], found, energies, shifts, shared, filled, room)
    return True


@kernel
def measure_and_list(
    base: Array, donors: tuple[Array, ...], width: int, block: int, reverse: float, forward: float, always: bool,
    bounds: Array, blocks: Array, tallies: Array, out: Array, sizes: Array,
) -> bool:  # fmt: skip
    """Measure rows, and list the elements whose scores lie in a window of each donor.

    Parameters
    ----------
    base, donors, width, block, reverse, forward, always
        As of :func:`measure_and_count`.
    bounds : int64 ndarray, shape (donors, 2)
        Smallest key inside, above 0, and the smallest above.
    blocks : float64 ndarray, shape (blocks, donors, 3 * rows of a block + 2)
        Where the divergences of the rows are put, then what `list_row` says of each in its `listed`, where the list of
        a block begins, and its sum of squares.
    tallies : int64 ndarray, shape (donors, 2, SQUARES)
        As of :func:`mergepipe.tasks.score_lists.list_row`.
    out : float32 ndarray, shape (donors, n)
        Gets the magnitudes.
    sizes : int64 ndarray, shape (donors,)
        Gets how many there are.

    Returns
    -------
    bool
        False if a stored value is not finite: then nothing of it is of use.
    """
    shared, filled, room = np.empty(STRIP), np.empty((2, STRIDE), np.float32), np.empty((len(donors), ROOM))
    a, b = np.empty(width, np.float32), np.empty((len(donors), width), np.float32)
    kinds, shifts = np.empty(len(donors), np.int64), np.zeros(len(donors))
    keys, deltas, table = np.empty(PICKED, np.int32), np.empty(PICKED, np.float32), np.zeros(TOP_BINS, np.int32)
    marks, full, found = gathering()
    directions = (reverse, forward)
    sizes[:] = 0
    for start in range(0, base.size, block):
        own = blocks[start // block]
        own[:, -1] = 0.0
        most = (own.shape[1] - 2) // 3
        own[:, 3 * most] = sizes
        for row in range((min(start + block, base.size) - start) // width):
            at = start + row * width
            if not _measure_row(base, donors, at, row, directions, own, a, b, kinds, shifts, shared, filled, room):
                return False
            for j in range(len(donors)):
                low, high = np.int32(bounds[j, 0]), np.int32(bounds[j, 1])
                listed = own[j, most : 3 * most].reshape(2, most)
                sizes[j] = list_row(
                    a, b[j], own[j, row], always, low, high, tallies[j], out[j], sizes[j], listed, row, keys, deltas,
                    marks, full, found, table,
                )  # fmt: skip
    return True
