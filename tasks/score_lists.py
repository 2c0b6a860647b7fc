"""Lists of the elements whose scores lie in a window: made row by row, packed, and sorted out once all are listed.

See :mod:`mergepipe.tasks.fusion_guess`. What is listed of an element is the magnitude of its difference: its score
follows from that and the divergence of its row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergepipe.tasks.fused_counts import TOP_BINS, gather
from mergepipe.tasks.jit import kernel, uncounted
from mergepipe.tasks.method import Array
from mergepipe.tasks.scores import STRIP, factor_of, gathering, words_of
from mergepipe.tasks.select import FINE_BINS
from mergepipe.tasks.squares import add_square_of_row, squares_above


@uncounted
def list_row(
    a: Array, b: Array, divergence: float, always: bool, low: Any, high: Any, tally: Array, out: Array, size: Any,
    listed: Array, row: int, keys: Array, deltas: Array, marks: Array, full: Array, found: Array, table: Array,
) -> Any:  # fmt: skip
    """List the magnitudes of the differences of the elements of a row whose scores lie in a window.

    Parameters
    ----------
    a, b : float32 ndarray, shape (n,)
    divergence : float
        Of the row.
    always : bool
        As of :func:`score_delta`.
    low, high : int32
        Smallest key inside, above 0, and the smallest above.
    tally : int64 ndarray, shape (2, SQUARES)
        Added to: in the first two places how many scores lie below and inside; in the second row the squares of those
        above, as :func:`squares_above` has them.
    out : float32 ndarray
        Gets the magnitudes from place `size` on, as :func:`pack_row` leaves them; with room for all of the row.
    listed : float64 ndarray, shape (2, rows)
        Gets, in place `row`, how many of them are single, and how many are followed by their number.
    keys, deltas : int32 and float32 ndarray, shape (STRIP,)
        Working memory; and the others, from :func:`gathering`; and a table of :func:`pack_row`.

    Returns
    -------
    int
        Where the list ends now.
    """
    factor = factor_of(divergence, always)
    if factor == 0.0:
        # Zero times a difference that overflows is none.
        tally[0, 0] += a.size
        listed[:, row] = 0.0
        return size
    end = size
    for start in range(0, a.size, STRIP):
        count = min(STRIP, a.size - start)
        below, reach = _mark_scores(a, b, start, count, factor, low, high, keys, deltas, marks)
        tally[0, 0] += below
        squares_above(deltas[:count], keys[:count], np.int32(high - 1), divergence, reach, tally[1])
        for k in range(gather(marks, words_of(marks, count), full, found)):
            out[np.uintp(end)] = abs(deltas[np.uintp(found[np.uintp(k)])])
            end += 1
    tally[0, 1] += end - size
    return pack_row(out, size, end, listed, row, table)


@uncounted
def pack_row(out: Array, begin: Any, end: Any, listed: Array, row: int, table: Array) -> Any:
    """Make a list of magnitudes shorter: those that occur often once, with their number behind them.

    Differences of bfloat16 numbers have few significant bits: in a window there are few that fit into bfloat16, as
    nearly all do, and these are counted. First come those that occur once or do not fit.

    Parameters
    ----------
    out : float32 ndarray
        The list of a row, from `begin` to `end`; overwritten.
    listed : float64 ndarray, shape (2, rows)
        Gets, in place `row`, how many are single, and how many are followed by their number.
    table : int32 ndarray, shape (32768,)
        Zeros.

    Returns
    -------
    int
        Where the list ends now.
    """
    at: Any = begin
    low: Any = np.int32(0x7FFF)
    high: Any = np.int32(0)
    for i in range(begin, end):
        value = np.float32(out[np.uintp(i)])
        bits = value.view(np.int32)
        if bits & 0xFFFF:
            out[np.uintp(at)] = value
            at += 1
        else:
            top = np.int32(bits >> 16)
            table[np.uintp(top)] += np.int32(1)
            low, high = min(low, top), max(high, top)
    for pattern in range(low, high + 1):
        if table[np.uintp(pattern)] == 1:
            out[np.uintp(at)] = np.int32(pattern << 16).view(np.float32)
            table[np.uintp(pattern)] = 0
            at += 1
    listed[0, row], single = at - begin, at
    for pattern in range(low, high + 1):
        count = table[np.uintp(pattern)]
        if count:
            out[np.uintp(at)] = np.int32(pattern << 16).view(np.float32)
            out[np.uintp(at + 1)] = count
            table[np.uintp(pattern)] = 0
            at += 2
    listed[1, row] = (at - single) // 2
    return at


@kernel
def pack_rows(deltas: Array, each: Array, listed: Array) -> int:
    """:func:`pack_row` of rows whose lists lie behind each other, and do so again then; how many numbers they are now.

    `each`, int64, says how many there are of each row; of `listed`, shape (2, rows), see there.
    """
    table = np.zeros(TOP_BINS, np.int32)
    begin, size = 0, 0
    for row in range(each.size):
        for i in range(each[row]):
            deltas[size + i] = deltas[begin + i]
        begin += each[row]
        size = pack_row(deltas, size, size + each[row], listed, row, table)
    return size


@uncounted
def _mark_scores(
    a: Array, b: Array, start: int, count: int, factor: float, low: Any, high: Any, keys: Array, deltas: Array,
    marks: Array,
) -> Any:  # fmt: skip
    """Bits of the scores of a strip, and the differences, those in the window marked.

    How many lie below it is returned, and the largest magnitude of a difference.
    """
    below, largest = np.int32(0), np.int32(0)
    for i in range(count):
        # What has no sign can't count from the end: that test would keep the loop from vectorising.
        place = np.uintp(start + i)
        delta = np.float32(b[place] - a[place])
        score = np.float32(np.float64(abs(delta)) * factor)
        keys[np.uintp(i)] = score.view(np.int32)
        deltas[np.uintp(i)] = delta
        largest = max(largest, np.int32(delta.view(np.int32) & 0x7FFFFFFF))
    for i in range(count):
        key = keys[np.uintp(i)]
        marks[np.uintp(i)] = np.uint8((key >= low) & (key < high))
        below = np.int32(below + np.int32(key < low))
    found = np.int32(largest)
    return below, np.float64(found.view(np.float32))


@kernel
def list_tile(
    a: Array, b: Array, width: int, rows: Array, always: bool, low: Any, high: Any, tally: Array, listed: Array,
    out: Array,
) -> Any:  # fmt: skip
    """:func:`list_row` of whole rows; how many numbers the list has.

    Parameters
    ----------
    a, b : float32 ndarray, shape (rows * width,)
    width, rows, always
        As of :func:`score_delta`.
    low, high, tally, listed
        As of :func:`list_row`.
    out : float32 ndarray, shape (n,)
    """
    keys, deltas, table = np.empty(STRIP, np.int32), np.empty(STRIP, np.float32), np.zeros(TOP_BINS, np.int32)
    marks, full, found = gathering()
    size = np.int64(0)
    for row in range(rows.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        size = list_row(
            x, y, rows[row, 0], always, low, high, tally, out, size, listed, row, keys, deltas, marks, full, found,
            table,
        )  # fmt: skip
    return size


@kernel
def count_listed(deltas: Array, starts: Array, listed: Array, rows: Array, always: bool, counts: Array) -> None:
    """Count the top 15 bits of the scores of what was listed.

    Parameters
    ----------
    deltas : float32 ndarray
        The list.
    starts : int64 ndarray, shape (blocks,)
        Where that of each block begins.
    listed : int64 ndarray, shape (blocks, 2, rows of a block)
        As of :func:`list_row`; zeros behind the last row.
    rows : float64 ndarray, shape (rows,)
        The divergences.
    always : bool
        As of :func:`score_delta`.
    counts : int64 ndarray, shape (32768,)
        Added to.
    """
    for block in range(listed.shape[0]):
        at = starts[block]
        for row in range(listed.shape[2]):
            factor = factor_of(rows[min(block * listed.shape[2] + row, rows.size - 1)], always)
            for kind in range(2):
                for i in range(at, at + (kind + 1) * listed[block, kind, row], kind + 1):
                    score = np.float32(np.float64(deltas[i]) * factor)
                    counts[np.uintp(score.view(np.int32) >> 16)] += np.int64(deltas[i + 1]) if kind else np.int64(1)
                at += (kind + 1) * listed[block, kind, row]


@kernel
def sort_listed(
    deltas: Array, starts: Array, listed: Array, rows: Array, always: bool, low: int, unit: float, counts: Array
) -> None:
    """:func:`sort_tile` of what was listed, as :func:`count_listed` takes it.

    The bin begins with the key `low` and is 65536 wide.
    """
    squares = counts[0, FINE_BINS:]
    for block in range(listed.shape[0]):
        at = starts[block]
        for row in range(listed.shape[2]):
            number = min(block * listed.shape[2] + row, rows.size - 1)
            factor = factor_of(rows[number], always)
            for kind in range(2):
                for i in range(at, at + (kind + 1) * listed[block, kind, row], kind + 1):
                    score = np.float32(np.float64(deltas[i]) * factor)
                    place = np.int64(score.view(np.int32)) - low
                    many = np.int64(deltas[i + 1]) if kind else np.int64(1)
                    if place > 0xFFFF:
                        add_square_of_row(deltas[i], many, rows[number], squares)
                    elif place >= 0:
                        d = np.float64(deltas[i])
                        counts[0, np.uintp(place)] += many
                        counts[1, np.uintp(place)] += many * np.int64(d * d * unit + 0.5)
                at += (kind + 1) * listed[block, kind, row]
