"""Row statistics: how far a donor's rows diverge from the primary's.

A row runs along the last axis. With ``D = B - A`` in the working type, ``p = softmax(A)``, ``q = softmax(B)``, where B
stands for A + D, any number c, ``E = D - c`` and ``z = sum(p * expm1(E))``:

    reverse KL(q || p) = sum(p * exp(E) * E) / (1 + z) - log1p(z)
    forward KL(p || q) = log1p(z) - sum(p * E)

all in float64; the differences that a fine-tune makes are so small that the textbook formula in float32 is noise. A
divergence does not depend on c, nor on a factor of all the weights ``exp(A)`` that p is made of; and weights that are a
little off, the same ones in all sums, are those of another p that is as little off. So all donors of a row share its
weights, which are a short polynomial raised to a high power. By their largest difference rows are of four kinds:

*Close*, no D beyond 1/32, as most rows of a fine-tune are. With c = 0 both divergences are series in the moments of D
under p, ``m_k = sum(p * D**k)``: seven leave less than 1e-12 of the divergence, they take no exponential of D, and
nothing of order D is left to cancel:

    z = sum(m_k / k!),    reverse = sum((k - 1) * m_k / k!) / (1 + z) + z / (1 + z) - log1p(z)
                          forward = sum(m_k / k!) from k = 2, + log1p(z) - z

*Near*, none beyond 1: the formulas above. *Far*, none beyond 256: 1 + z may vanish, and the logarithm of
``sum(p * exp(E))`` is taken instead. *Distant*, whatever there is: A + D and A have normalisers of their own, each less
its largest element.

Rows are read once with c = 0. What all elements have moved by cancels, though: where the squared mean of D is most of
its mean square, and where a row is distant or has an A beyond 64, its *extremes* are measured first and then its
sums, with the mean of D for c. Both are a few numbers that can be folded over *pieces* of the row. A row that fits a
block is one piece; a wider one, which is always measured in two steps, is cut as
:func:`~mergepipe.tasks.blocks.block_bounds` cuts it, whatever the chunks are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.blocks import BLOCK_ELEMENTS
from mergepipe.tasks.exponentials import LIMIT, ROOT, exp, four, less, plus, small_expm1, times, total
from mergepipe.tasks.jit import inlined_late, kernel, uncounted
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array, Job

EXTREMES = 7
"""Of a piece: largest A, largest B, sum of D, smallest D, largest D, largest magnitude of A, sum of squares of D."""

SUMS = 6
"""Of a piece, with weights w and E: sums of w, w * E, w * expm1(E), w * expm1(E) * E, E and E**2.

Of a far one exp(E) stands for expm1(E). Of a distant one the sums are of w, w * D, f, f * D, D and D**2, with
``f = exp(A + D - largest B)``.
"""

MOMENTS = 9
"""Of a close row: sums of w * D**k for k from 0 to 7, and of D**2."""

STATISTICS = 3
"""Of a row: its divergence, log(sum(exp(A))), and what log(q / p) is short of D."""

ROOM = MOMENTS * LANES + MOMENTS
"""float64 numbers of working memory that the rows of a donor are measured with: lanes, and what they add up to."""

CLOSE, NEAR, FAR, DISTANT = range(4)

LEFT = -1
"""In the place of a kind: not measured with the others."""

CLOSE_DELTA, NEAR_DELTA, LARGEST = 1 / 32, 1.0, 256.0
"""Largest magnitudes of D in close, near and far rows, or of E where extremes are known."""

HEAVIEST = 64.0
"""Largest magnitude of A up to which weights are powers of a polynomial's: within 2e-12 there, within 2e-14 up to 1."""

STRIDE = 4 * LANES
"""Elements that are added up at once. What is left of a row is filled up to a multiple of :data:`LANES` with zeros
of no weight, and the lanes are a quarter as many."""

STRIP = 4 * STRIDE
"""Elements whose weights, which all donors share, are kept at a time: few enough for a first-level cache."""

SHIFTED = 0.75
"""Share of the mean square of D that its squared mean may be where c is 0: it is what cancels."""

FIRST: Any = np.int64(0)
"""The first element, of the type of any other: for a 0 that is written out, numba compiles a loop once more."""

CLOSE_TERMS = 9
"""Terms of the series in z of a close row, whose z is below 0.032."""


@uncounted
def _reach(a: Array) -> float:
    """Largest magnitude, float32: by its bits, whose maximum vectorises."""
    largest = np.int32(0)
    for i in range(a.size):
        largest = max(largest, np.int32(np.float32(a[i]).view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return np.float64(found.view(np.float32))


@uncounted
def _distance(a: Array, b: Array) -> float:
    """Largest magnitude of the differences, likewise."""
    largest = np.int32(0)
    for i in range(a.size):
        largest = max(largest, np.int32(np.float32(b[i] - a[i]).view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return np.float64(found.view(np.float32))


@kernel
def kind_of(reach: float, distance: float) -> int:
    """What a row is measured as, given its largest magnitudes of A and D; NaN is beyond everything."""
    if not (reach <= HEAVIEST and distance <= LARGEST):
        return DISTANT
    return CLOSE if distance <= CLOSE_DELTA else NEAR if distance <= NEAR_DELTA else FAR


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
def _add_moments(a: Array, b: Array, begin: int, end: int, quarter: int, shared: Array, lanes: Array) -> None:
    """Add the :data:`MOMENTS` of a donor's elements from `begin` to `end`, whole strides, to its lanes."""
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, d = _at(own, i, quarter), _apart(x, y, i, quarter)
            square = times(d, d)
            fourth = times(square, square)
            first, second = times(weight, d), times(weight, square)
            third = times(first, square)
            lanes[np.uintp(i)] += total(weight)
            lanes[np.uintp(i + LANES)] += total(first)
            lanes[np.uintp(i + 2 * LANES)] += total(second)
            lanes[np.uintp(i + 3 * LANES)] += total(third)
            lanes[np.uintp(i + 4 * LANES)] += total(times(weight, fourth))
            lanes[np.uintp(i + 5 * LANES)] += total(times(first, fourth))
            lanes[np.uintp(i + 6 * LANES)] += total(times(second, fourth))
            lanes[np.uintp(i + 7 * LANES)] += total(times(third, fourth))
            lanes[np.uintp(i + 8 * LANES)] += total(square)


@inlined_late
def _put(lanes: Any, i: Any, weight: Any, e: Any, moved: Any) -> None:
    """Add :data:`SUMS` of four elements to lane `i` of each; `moved` is the third."""
    lanes[np.uintp(i)] += total(weight)
    lanes[np.uintp(i + LANES)] += total(times(weight, e))
    lanes[np.uintp(i + 2 * LANES)] += total(moved)
    lanes[np.uintp(i + 3 * LANES)] += total(times(moved, e))
    lanes[np.uintp(i + 4 * LANES)] += total(e)
    lanes[np.uintp(i + 5 * LANES)] += total(times(e, e))


@inlined_late
def _add_near(a: Array, b: Array, begin: int, end: int, quarter: int, mean: float, shared: Array, lanes: Array) -> None:
    """Add the :data:`SUMS` of a near row, with E less than 1, likewise."""
    means = four(mean)
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, e = _at(own, i, quarter), less(_apart(x, y, i, quarter), means)
            _put(lanes, i, weight, e, times(weight, small_expm1(e)))


@inlined_late
def _add_far(a: Array, b: Array, begin: int, end: int, quarter: int, mean: float, shared: Array, lanes: Array) -> None:
    """Add those of a far row."""
    means = four(mean)
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        own = shared[start - begin : start - begin + 4 * quarter]
        for i in range(quarter):
            weight, e = _at(own, i, quarter), less(_apart(x, y, i, quarter), means)
            _put(lanes, i, weight, e, times(weight, exp(e)))


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
            _put(lanes, i, weight, d, other)


@uncounted
def _add_strides(
    a: Array, b: Array, begin: int, end: int, kind: int, shift: float, shared: Array, room: Array, donor: int
) -> None:
    # A quarter that is known as this is compiled: else it is asked of each stride what may overlap.
    y, lanes = b[donor], room[donor]
    if kind == CLOSE:
        _add_moments(a, y, begin, end, LANES, shared, lanes)
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
    elif kind == NEAR:
        _add_near(a, b, FIRST, end, quarter, shift, shared, lanes)
    elif kind == FAR:
        _add_far(a, b, FIRST, end, quarter, shift, shared, lanes)
    else:
        _add_distant(a, b, FIRST, end, quarter, shift, shared, lanes)


@uncounted
def _halve(lanes: Array, count: int, eighth: int, at: int) -> None:
    """Sums of lanes, half on half: of the first so many times 64, which change, to where `at` is.

    `eighth` is an eighth of 64 that is not known as this is compiled: else the loop is written out, and badly.
    """
    for s in range(count):
        t = lanes[s * LANES : (s + 1) * LANES]
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


@uncounted
def _add_up(
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
    """:data:`MOMENTS` or :data:`SUMS` of a row, or a piece of one, of those donors that have a kind.

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
    none = True
    for j in range(len(b)):
        if kinds[j] != LEFT:
            room[j, : MOMENTS * LANES] = 0.0
            none = False
    if none:
        return
    whole = a.size // STRIDE * STRIDE
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
            _halve(room[j], MOMENTS if kinds[j] == CLOSE else SUMS, filled.shape[1] // 32, MOMENTS * LANES)


@uncounted
def _finish_close(moments: Array, reverse: float, forward: float, out: Array) -> bool:
    """:data:`STATISTICS` of a close row from its :data:`MOMENTS`; False, with `out` undefined, if too much cancels."""
    total = moments[0]
    mean, spread = moments[1] / total, moments[2] / total
    if mean * mean > SHIFTED * spread:
        return False
    # The sums of m_k / k! and of (k - 1) * m_k / k!, from k = 2 on.
    onward, backward, factorial = 0.0, 0.0, 1.0
    for k in range(2, 8):
        factorial *= k
        term = moments[k] / total / factorial
        onward += term
        backward += (k - 1) * term
    z = mean + onward
    # z / (1 + z) - log1p(z) and log1p(z) - z, as series.
    falling, rising, power = 0.0, 0.0, -z
    for k in range(2, CLOSE_TERMS + 2):
        power *= -z
        falling -= power * ((k - 1) / k)
        rising -= power / k
    backward = backward / (1.0 + z) + falling
    onward += rising
    found = reverse * backward + forward * onward
    out[0] = found if found > 0.0 else 0.0
    if out.size == STATISTICS:
        out[1], out[2] = math.log(total), math.log1p(z)
    return True


@uncounted
def _finish_sums(
    sums: Array, kind: int, level: float, top: float, mean: float, reverse: float, forward: float, out: Array
) -> None:
    """:data:`STATISTICS` of any other row from its :data:`SUMS`; `top` is the largest B of a distant one."""
    if kind == NEAR:
        z = sums[2] / sums[0]
        moved = math.log1p(z)
        backward = (sums[1] + sums[3]) / sums[0] / (1.0 + z) - moved
    else:
        moved = math.log(sums[2] / sums[0]) + (top - level if kind == DISTANT else 0.0)
        backward = sums[3] / sums[2] - moved
    found = reverse * backward + forward * (moved - sums[1] / sums[0])
    out[0] = found if found > 0.0 and found < math.inf else 0.0
    if out.size == STATISTICS:
        out[1], out[2] = level + math.log(sums[0]), moved + mean


@uncounted
def finish_once(moments: Array, kind: int, width: int, reverse: float, forward: float, out: Array) -> bool:
    """:data:`STATISTICS` of a row that was read once; False, with `out` undefined, if too much cancels."""
    if kind == CLOSE:
        return _finish_close(moments, reverse, forward, out)
    mean = moments[4] / width
    if mean * mean > SHIFTED * (moments[5] / width):
        return False
    _finish_sums(moments, kind, 0.0, 0.0, 0.0, reverse, forward, out)
    return True


@uncounted
def _add_differences(a: Array, b: Array, begin: int, end: int, quarter: int, lanes: Array) -> None:
    """Add D and its squares, as :data:`SUMS` have them."""
    for start in range(begin, end, 4 * quarter):
        x, y = a[start : start + 4 * quarter], b[start : start + 4 * quarter]
        for i in range(quarter):
            d = _apart(x, y, i, quarter)
            lanes[np.uintp(i)] += total(d)
            lanes[np.uintp(i + LANES)] += total(times(d, d))


@kernel
def measure_extremes(a: Array, b: Array, out: Array) -> None:
    """:data:`EXTREMES` of a piece: `a` and `b` of shape (n,)."""
    tops = np.empty((5, LANES), a.dtype)
    top_a, top_b, low, high, reach = tops[0], tops[1], tops[2], tops[3], tops[4]
    for i in range(LANES):
        top_a[i], top_b[i], low[i], high[i], reach[i] = a[0], b[0], b[0] - a[0], b[0] - a[0], abs(a[0])
    for start in range(0, a.size, LANES):
        x, y = a[start : start + LANES], b[start : start + LANES]
        for i in range(x.size):
            d = y[i] - x[i]
            top_a[i], top_b[i] = max(top_a[i], x[i]), max(top_b[i], y[i])
            low[i], high[i] = min(low[i], d), max(high[i], d)
            reach[i] = max(reach[i], abs(x[i]))
    out[0], out[1], out[3], out[4], out[5] = top_a.max(), top_b.max(), low.min(), high.max(), reach.max()
    lanes, filled = np.zeros(2 * LANES + 2), np.empty((2, STRIDE), a.dtype)
    whole = a.size // STRIDE * STRIDE
    _add_differences(a, b, FIRST, whole, LANES, lanes)
    rest = a.size - whole
    if rest:
        stop = -(-rest // LANES) * LANES
        _fill(a, whole, stop, filled[0])
        _fill(b, whole, stop, filled[1])
        _add_differences(filled[0], filled[1], FIRST, stop, LANES // 4, lanes)
    _halve(lanes, 2, filled.shape[1] // 32, 2 * LANES)
    out[2], out[6] = lanes[2 * LANES], lanes[2 * LANES + 1]


@uncounted
def _measured_as(extremes: Array, width: int) -> tuple[int, float, float]:
    """Of a row whose :data:`EXTREMES` are known: its kind, and what is taken off A and off D."""
    mean = extremes[2] / width
    distance, level = max(extremes[4] - mean, mean - extremes[3]), extremes[0] if extremes[5] > HEAVIEST else 0.0
    if not distance <= LARGEST:
        return DISTANT, level, extremes[1]
    return NEAR if distance <= NEAR_DELTA else FAR, level, mean


@kernel
def measure_sums(a: Array, b: Array, extremes: Array, width: int, out: Array) -> None:
    """:data:`SUMS` of a piece, given the :data:`EXTREMES` of its whole row and the row's width."""
    kind, level, shift = _measured_as(extremes, width)
    kinds, shifts, room = np.full(1, kind), np.full(1, shift), np.empty((1, ROOM))
    shared, filled = np.empty(STRIP), np.empty((2, STRIDE), a.dtype)
    _add_up(a, b.reshape(1, b.size), kinds, extremes[5], level, shifts, shared, filled, room)
    for s in range(SUMS):
        out[s] = room[0, MOMENTS * LANES + s]


@uncounted
def finish_row(extremes: Array, sums: Array, width: int, reverse: float, forward: float, out: Array) -> None:
    """:data:`STATISTICS` of a row; `reverse` and `forward` are the weights of the two directions.

    The divergence is 0 where D is the same all along the row, where rounding leaves it below 0, and where D overflows.
    """
    kind, level, shift = _measured_as(extremes, width)
    if kind == DISTANT:
        _finish_sums(sums, kind, level, shift, 0.0, reverse, forward, out)
    else:
        _finish_sums(sums, kind, level, 0.0, shift, reverse, forward, out)
    spread = extremes[4] - extremes[3]
    if not (spread > 0.0 and spread < math.inf):
        out[0] = 0.0
        if out.size == STATISTICS:
            out[2] = extremes[2] / width


@uncounted
def finish_rows_once(
    moments: Array, kinds: Array, width: int, reverse: float, forward: float, out: Array, settled: Array
) -> None:
    """:func:`finish_once` for rows, shape (rows, 9): into `out`, shape (rows, 3), and `settled`, bool, (rows,)."""
    for row in range(len(moments)):
        settled[row] = finish_once(moments[row], kinds[row], width, reverse, forward, out[row])


@kernel
def measure_rows(a: Array, b: Array, width: int, reverse: float, forward: float, out: Array) -> float:
    """:data:`STATISTICS` of whole rows.

    Parameters
    ----------
    a, b : ndarray, shape (rows * width,)
        Primary and donor, in the working type.
    width : int
    reverse, forward : float
        Weights of the two directions.
    out : float64 ndarray, shape (rows, 1 or 3)
        The first columns are written.

    Returns
    -------
    float
        Sum of squares of D.
    """
    shared, filled, room = np.empty(STRIP), np.empty((2, STRIDE), a.dtype), np.empty((1, ROOM))
    energies, kinds, shifts = np.zeros(1), np.empty(1, np.int64), np.zeros(1)
    count = a.size // width
    rows, donors = a.reshape(count, width), b.reshape(count, 1, width)
    found = out.reshape(count, 1, out.shape[1])
    _measure_each(rows, donors, reverse, forward, found, energies, kinds, shifts, shared, filled, room)
    return float(energies[0])


@uncounted
def _measure_each(
    a: Array, b: Array, reverse: float, forward: float, out: Array, energies: Array, kinds: Array, shifts: Array,
    shared: Array, filled: Array, room: Array,
) -> None:  # fmt: skip
    for row in range(len(a)):
        reach = _reach(a[row])
        kinds[0] = kind_of(reach, _distance(a[row], b[row, 0]))
        measure_row(a[row], b[row], kinds, reach, reverse, forward, out[row], energies, shifts, shared, filled, room)


@uncounted
def measure_row(
    a: Array, b: Array, kinds: Array, reach: float, reverse: float, forward: float, out: Array, energies: Array,
    shifts: Array, shared: Array, filled: Array, room: Array,
) -> None:  # fmt: skip
    """:data:`STATISTICS` of a row of all donors.

    Parameters
    ----------
    a, b : ndarray, shape (n,) and (donors, n)
    kinds : int64 ndarray, shape (donors,)
        What they are by :func:`kind_of`; changed.
    reach, reverse, forward : float
    out : float64 ndarray, shape (donors, 1 or 3)
    energies : float64 ndarray, shape (donors,)
        Added to: the sums of squares of D.
    shifts : float64 ndarray, shape (donors,)
        Zeros.
    shared, filled, room : ndarray
        Working memory; see :func:`_add_up`.
    """
    for j in range(len(b)):
        if kinds[j] == DISTANT:
            kinds[j] = LEFT
    _add_up(a, b, kinds, reach, 0.0, shifts, shared, filled, room)
    for j in range(len(b)):
        moments = room[j, MOMENTS * LANES :]
        if kinds[j] != LEFT and finish_once(moments, kinds[j], a.size, reverse, forward, out[j]):
            energies[j] += moments[MOMENTS - 1] if kinds[j] == CLOSE else moments[SUMS - 1]
        else:
            energies[j] += _measure_twice(a, b[j], reverse, forward, out[j])


@kernel
def _measure_twice(a: Array, b: Array, reverse: float, forward: float, out: Array) -> float:
    """:data:`STATISTICS` of a row that is read once more; its sum of squares of D."""
    extremes, sums = np.empty(EXTREMES), np.empty(SUMS)
    measure_extremes(a, b, extremes)
    measure_sums(a, b, extremes, a.size, sums)
    finish_row(extremes, sums, a.size, reverse, forward, out)
    return float(extremes[EXTREMES - 1])


@kernel
def fold_extremes(pieces: Array, out: Array) -> None:
    """:data:`EXTREMES` of rows, shape (rows, 7), from those of their pieces, shape (rows, pieces, 7), in order."""
    out[:] = pieces[:, 0]
    for row in range(pieces.shape[0]):
        found = out[row]
        for k in range(1, pieces.shape[1]):
            piece = pieces[row, k]
            found[0], found[1] = max(found[0], piece[0]), max(found[1], piece[1])
            found[3], found[4] = min(found[3], piece[3]), max(found[4], piece[4])
            found[5] = max(found[5], piece[5])
            found[2] += piece[2]
            found[6] += piece[6]


@kernel
def finish_rows(extremes: Array, pieces: Array, width: int, reverse: float, forward: float, out: Array) -> None:
    """:data:`STATISTICS` of rows, shape (rows, 1 or 3), from the sums of their pieces, shape (rows, pieces, 6)."""
    sums = np.empty(SUMS)
    for row in range(pieces.shape[0]):
        sums[:] = 0.0
        for k in range(pieces.shape[1]):
            sums += pieces[row, k]
        finish_row(extremes[row], sums, width, reverse, forward, out[row])


def row_width(job: Job) -> int:
    """Elements of a row."""
    return int(job.shape[-1]) if job.shape else 1


def is_wide(job: Job) -> bool:
    """Whether a row is cut into several blocks."""
    return row_width(job) > BLOCK_ELEMENTS


def rows_of(job: Job, start: int, size: int) -> tuple[slice, int]:
    """The rows that a tile of `size` elements from flat index `start` covers, and how many elements of each it has."""
    width = row_width(job)
    first = start // width
    return (slice(first, first + 1), size) if is_wide(job) else (slice(first, first + size // width), width)
