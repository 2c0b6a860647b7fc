"""What is added up of a row for its divergences: weights, and sums of them with the differences to a donor.

The formulas, and why a row is *close*, *loose*, *near*, *far* or *distant*, are in :mod:`mergepipe.tasks.rows`. Sums
are taken in 64 lanes of float64, which are then added half on half: the order of additions is part of the result, and
neither processor nor chunks change it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergepipe.tasks.exponentials import LIMIT, ROOT, WIDEST, exp, four, less, plus, raised, small_expm1, times, total
from mergepipe.tasks.jit import inlined, inlined_late, uncounted
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array

SUMS = 6
"""Of a piece, with weights w and E: sums of w, w * E, w * expm1(E), w * expm1(E) * E, E and E**2.

Of a far one exp(E) stands for expm1(E). Of a distant one the sums are of w, w * D, f, f * D, D and D**2, with
``f = exp(A + D - largest B)``.
"""

MOMENTS, MORE = 9, 11
"""Of a close and of a loose row: sums of w * D**k for k from 0 to 7 or 9, and of D**2."""

ADDED = MORE * LANES
ROOM = ADDED + MORE
"""float64 numbers of working memory that the rows of a donor are measured with: lanes, and from :data:`ADDED` on what
they add up to."""

CLOSE, LOOSE, NEAR, FAR, DISTANT = range(5)
"""By their largest difference."""

LEFT = -1
"""In the place of a kind: not measured with the others."""

CLOSE_DELTA, LOOSE_DELTA, NEAR_DELTA, FAR_DELTA = 1 / 32, 1 / 8, 1.0, WIDEST
"""Largest magnitudes of D in close, loose, near and far rows, or of E where extremes are known."""

HEAVIEST = 64.0
"""Largest magnitude of A up to which weights are powers of a polynomial's: within 2e-11 there, within 2e-13 up to 1."""

STRIDE = 4 * LANES
"""Elements that are added up at once. What is left of a row is filled up to a multiple of :data:`LANES` with zeros
of no weight, and the lanes are a quarter as many."""

STRIP = 4 * STRIDE
"""Elements whose weights, which all donors share, are kept at a time: few enough for a first-level cache."""

FIRST: Any = np.int64(0)
"""The first element, of the type of any other: for a 0 that is written out, numba compiles a loop once more."""


@inlined_late
def _at(x: Any, i: Any, quarter: int) -> Any:
    """Elements, a quarter of a stride apart, in float64. What has no sign can't count from the end: no test is made."""
    j, k, m, n = np.uintp(i), np.uintp(i + quarter), np.uintp(i + 2 * quarter), np.uintp(i + 3 * quarter)
    return np.float64(x[j]), np.float64(x[k]), np.float64(x[m]), np.float64(x[n])


@inlined_late
def _apart(x: Any, y: Any, i: Any, quarter: int) -> Any:
    """Their differences, taken in the working type."""
    j, k, m, n = np.uintp(i), np.uintp(i + quarter), np.uintp(i + 2 * quarter), np.uintp(i + 3 * quarter)
    return np.float64(y[j] - x[j]), np.float64(y[k] - x[k]), np.float64(y[m] - x[m]), np.float64(y[n] - x[n])


@uncounted
def _weigh(a: Array, begin: int, end: int, reach: float, level: float, shared: Array) -> None:
    """Weights of the elements from `begin` to `end`.

    They are ``exp(a)`` where no magnitude of the row is beyond 64, else ``exp(a - level)``.
    """
    if reach > HEAVIEST:
        for i in range(end - begin):
            place = max(np.float64(a[np.uintp(begin + i)]) - level, -LIMIT)
            shared[np.uintp(i)] = exp((place, place, place, place))[0]
        return
    scale, rounds = 1.0, 0
    while reach * scale > 1.0:
        scale, rounds = scale * 0.25, rounds + 1
    # Powers of two: these are the bits that the polynomial has for scaled elements.
    square = scale * scale
    first, second, third = ROOT[1] * scale, ROOT[2] * square, ROOT[3] * (square * scale)
    fourth, fifth, sixth = (
        ROOT[4] * (square * square), ROOT[5] * (square * square * scale), ROOT[6] * (square * square * square),
    )  # fmt: skip
    for i in range(end - begin):
        place = np.float64(a[np.uintp(begin + i)])
        root = fifth + sixth * place
        root = fourth + root * place
        root = third + root * place
        root = second + root * place
        root = first + root * place
        root = ROOT[0] + root * place
        root *= root
        root *= root
        root *= root
        shared[np.uintp(i)] = root * root
    for _ in range(rounds):
        for i in range(end - begin):
            raised = shared[np.uintp(i)] * shared[np.uintp(i)]
            shared[np.uintp(i)] = raised * raised


@inlined_late
def _put_moments(lanes: Any, i: Any, weight: Any, d: Any, square: Any, fourth: Any) -> Any:
    """Add the sums of w * D**k of four elements for k from 0 to 7 to lane `i` of each; w * D**4 and w * D**5."""
    first, second = times(weight, d), times(weight, square)
    third = times(first, square)
    lanes[np.uintp(i)] += total(weight)
    lanes[np.uintp(i + LANES)] += total(first)
    lanes[np.uintp(i + 2 * LANES)] += total(second)
    lanes[np.uintp(i + 3 * LANES)] += total(third)
    even, odd = times(weight, fourth), times(first, fourth)
    lanes[np.uintp(i + 4 * LANES)] += total(even)
    lanes[np.uintp(i + 5 * LANES)] += total(odd)
    lanes[np.uintp(i + 6 * LANES)] += total(times(second, fourth))
    lanes[np.uintp(i + 7 * LANES)] += total(times(third, fourth))
    return even, odd


@inlined_late
def _add_moments(a: Array, b: Array, begin: int, end: int, quarter: int, shared: Array, lanes: Array) -> None:
    """Add the :data:`MOMENTS` of a donor's elements from `begin` to `end`, whole strides, to its lanes."""
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, d = _at(own, i, quarter), _apart(x, y, i, quarter)
            square = times(d, d)
            _put_moments(lanes, i, weight, d, square, times(square, square))
            lanes[np.uintp(i + 8 * LANES)] += total(square)


@inlined_late
def _add_more(a: Array, b: Array, begin: int, end: int, quarter: int, shared: Array, lanes: Array) -> None:
    """Add those of a loose row, :data:`MORE`, likewise."""
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, d = _at(own, i, quarter), _apart(x, y, i, quarter)
            square = times(d, d)
            fourth = times(square, square)
            even, odd = _put_moments(lanes, i, weight, d, square, fourth)
            lanes[np.uintp(i + 8 * LANES)] += total(times(even, fourth))
            lanes[np.uintp(i + 9 * LANES)] += total(times(odd, fourth))
            lanes[np.uintp(i + 10 * LANES)] += total(square)


@inlined_late
def _put(lanes: Any, i: Any, weight: Any, e: Any, moved: Any, square: Any) -> None:
    """Add :data:`SUMS` of four elements to lane `i` of each; `moved` is the third."""
    lanes[np.uintp(i)] += total(weight)
    lanes[np.uintp(i + LANES)] += total(times(weight, e))
    lanes[np.uintp(i + 2 * LANES)] += total(moved)
    lanes[np.uintp(i + 3 * LANES)] += total(times(moved, e))
    lanes[np.uintp(i + 4 * LANES)] += total(e)
    lanes[np.uintp(i + 5 * LANES)] += total(square)


@inlined_late
def _add_near(a: Array, b: Array, begin: int, end: int, quarter: int, mean: float, shared: Array, lanes: Array) -> None:
    """Add the :data:`SUMS` of a near row, with E less than 1, likewise."""
    means = four(mean)
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, e = _at(own, i, quarter), less(_apart(x, y, i, quarter), means)
            square = times(e, e)
            _put(lanes, i, weight, e, times(weight, small_expm1(e, square)), square)


@inlined_late
def _add_far(a: Array, b: Array, begin: int, end: int, quarter: int, mean: float, shared: Array, lanes: Array) -> None:
    """Add those of a far row."""
    means = four(mean)
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, e = _at(own, i, quarter), less(_apart(x, y, i, quarter), means)
            _put(lanes, i, weight, e, times(weight, raised(e)), times(e, e))


@uncounted
def _add_distant(
    a: Array, b: Array, begin: int, end: int, quarter: int, top: float, shared: Array, lanes: Array
) -> None:
    """Add those of a distant row, whose largest B is `top`."""
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, d = _at(own, i, quarter), _apart(x, y, i, quarter)
            other = less(plus(_at(x, i, quarter), d), four(top))
            other = exp((max(other[0], -LIMIT), max(other[1], -LIMIT), max(other[2], -LIMIT), max(other[3], -LIMIT)))
            # Only what a row was filled up with has no weight at all.
            other = (
                other[0] if weight[0] > 0.0 else 0.0, other[1] if weight[1] > 0.0 else 0.0,
                other[2] if weight[2] > 0.0 else 0.0, other[3] if weight[3] > 0.0 else 0.0,
            )  # fmt: skip
            _put(lanes, i, weight, d, other, times(d, d))


@uncounted
def _add_strides(
    a: Array, b: Array, begin: int, end: int, kind: int, shift: float, shared: Array, room: Array, donor: int
) -> None:
    # A quarter that is known as this is compiled: else it is asked of each stride what may overlap.
    y, lanes = b[donor], room[donor]
    if kind == CLOSE:
        _add_moments(a, y, begin, end, LANES, shared, lanes)
    elif kind == LOOSE:
        _add_more(a, y, begin, end, LANES, shared, lanes)
    elif kind == NEAR:
        _add_near(a, y, begin, end, LANES, shift, shared, lanes)
    elif kind == FAR:
        _add_far(a, y, begin, end, LANES, shift, shared, lanes)
    else:
        _add_distant(a, y, begin, end, LANES, shift, shared, lanes)


@uncounted
def _add_rest(filled: Array, end: int, kind: int, shift: float, shared: Array, room: Array, donor: int) -> None:
    # And one that is not known: a loop over so few lanes would be written out, and badly.
    a, b, lanes, quarter = filled[0], filled[1], room[donor], filled.shape[1] // 16
    if kind == CLOSE:
        _add_moments(a, b, FIRST, end, quarter, shared, lanes)
    elif kind == LOOSE:
        _add_more(a, b, FIRST, end, quarter, shared, lanes)
    elif kind == NEAR:
        _add_near(a, b, FIRST, end, quarter, shift, shared, lanes)
    elif kind == FAR:
        _add_far(a, b, FIRST, end, quarter, shift, shared, lanes)
    else:
        _add_distant(a, b, FIRST, end, quarter, shift, shared, lanes)


@uncounted
def _halve(lanes: Array, count: int, narrow: bool, eighth: int, at: int) -> None:
    """Sums of lanes, half on half: of the first so many times 64, which change, to where `at` is.

    Of a `narrow` row only the first quarter of the lanes is in use: what zeros for all others would give. `eighth` is
    an eighth of 64 that is not known as this is compiled: else the loop is written out, and badly.
    """
    for s in range(count):
        t = lanes[s * LANES : (s + 1) * LANES]
        if narrow:
            for i in range(eighth):
                t[np.uintp(i)] += t[np.uintp(i + 8)]
        else:
            for i in range(eighth):
                # Three halvings written out: a loop over them does not vectorise.
                a, b, c, d = np.uintp(i), np.uintp(i + 8), np.uintp(i + 16), np.uintp(i + 24)
                e, f, g, h = np.uintp(i + 32), np.uintp(i + 40), np.uintp(i + 48), np.uintp(i + 56)
                even, odd = (t[a] + t[e]) + (t[c] + t[g]), (t[b] + t[f]) + (t[d] + t[h])
                t[a] = even + odd
        lanes[at + s] = ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))


@uncounted
def _fill(values: Array, first: int, end: int, out: Array) -> None:
    """The values from `first` on, and zeros behind them up to `end`."""
    # An assignment to a slice would first ask whether the two overlap, and takes six times as long.
    rest = values.size - first
    for i in range(rest):
        out[i] = values[np.uintp(first + i)]
    for i in range(rest, end):
        out[np.uintp(i)] = 0.0


@inlined
def sums_of(kind: Any) -> Any:
    """How many numbers are added up of a row of this kind; the last one is the sum of D**2."""
    return MOMENTS if kind == CLOSE else MORE if kind == LOOSE else SUMS


@uncounted
def add_up(
    a: Array,
    b: Array,
    kinds: Array,
    reach: float,
    level: float,
    shifts: Array,
    shared: Array,
    filled: Array,
    room: Array,
) -> None:
    """:data:`MOMENTS`, :data:`MORE` or :data:`SUMS` of a row, or a piece of one, of those donors that have a kind.

    Parameters
    ----------
    a, b : ndarray, shape (n,) and (donors, n)
    kinds : int64 ndarray, shape (donors,)
        :data:`LEFT` for one that is left out.
    reach, level : float
        As of :func:`_weigh`.
    shifts : float64 ndarray, shape (donors,)
        The mean of D or what stands for it, of a distant row the largest B.
    shared, filled : float64 ndarray, shape (STRIP,); ndarray of the working type, shape (2, STRIDE)
        Working memory.
    room : float64 ndarray, shape (donors, ROOM)
        The sums come behind the lanes.
    """
    whole = a.size // STRIDE * STRIDE
    none, narrow, quarter = True, whole == 0, filled.shape[1] // 16
    for j in range(len(b)):
        if kinds[j] != LEFT:
            for s in range(sums_of(kinds[j])):
                lanes = room[j, s * LANES : (s + 1) * LANES]
                for i in range(quarter if narrow else 4 * quarter):
                    lanes[np.uintp(i)] = 0.0
            none = False
    if none:
        return
    for start in range(0, whole, STRIP):
        stop = min(start + STRIP, whole)
        _weigh(a, start, stop, reach, level, shared)
        for j in range(len(b)):
            if kinds[j] != LEFT:
                _add_strides(a, b, start, stop, kinds[j], shifts[j], shared, room, j)
    rest = a.size - whole
    if rest:
        stop = -(-rest // LANES) * LANES
        _fill(a, whole, stop, filled[0])
        _weigh(filled[0], FIRST, stop, reach, level, shared)
        for i in range(rest, stop):
            shared[np.uintp(i)] = 0.0
        for j in range(len(b)):
            if kinds[j] != LEFT:
                _fill(b[j], whole, stop, filled[1])
                _add_rest(filled, stop, kinds[j], shifts[j], shared, room, j)
    for j in range(len(b)):
        if kinds[j] != LEFT:
            _halve(room[j], sums_of(kinds[j]), narrow, filled.shape[1] // 32, ADDED)


@uncounted
def _add_differences(a: Array, b: Array, begin: int, end: int, quarter: int, lanes: Array) -> None:
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        for i in range(quarter):
            d = _apart(x, y, i, quarter)
            lanes[np.uintp(i)] += total(d)
            lanes[np.uintp(i + LANES)] += total(times(d, d))


@uncounted
def add_differences(a: Array, b: Array, filled: Array, lanes: Array) -> None:
    """Sums of D and of D**2 of a piece, as :data:`SUMS` has them.

    Parameters
    ----------
    a, b : ndarray, shape (n,)
    filled : ndarray, shape (2, STRIDE)
        Working memory.
    lanes : float64 ndarray, shape (2 * LANES + 2,)
        Zeros; the two sums come behind the lanes.
    """
    whole = a.size // STRIDE * STRIDE
    _add_differences(a, b, FIRST, whole, LANES, lanes)
    rest = a.size - whole
    if rest:
        stop = -(-rest // LANES) * LANES
        _fill(a, whole, stop, filled[0])
        _fill(b, whole, stop, filled[1])
        _add_differences(filled[0], filled[1], FIRST, stop, LANES // 4, lanes)
    _halve(lanes, 2, whole == 0, filled.shape[1] // 32, 2 * LANES)
