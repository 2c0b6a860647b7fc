"""Row statistics: how far a donor's rows diverge from the primary's, and what each element contributes.

A row runs along the last axis. With ``D = B - A`` in the working type, ``p = softmax(A)``, ``q = softmax(B)`` and the
mean c of D over the row, ``E = D - c`` and ``z = sum(p * expm1(E))``:

    reverse KL(q || p) = sum(p * exp(E) * E) / (1 + z) - log1p(z)
    forward KL(p || q) = log1p(z) - sum(p * E)

all in float64, where B stands for A + D; the differences that a fine-tune makes are so small that the textbook formula
in float32 is noise. Where an element is further than 1 from the mean, 1 + z may vanish, and the logarithms of both
normalisers are taken instead, which then loses nothing.

Most rows of a fine-tune are *close*: no A beyond 1, no D beyond 1/32, and a mean of D that is small against its spread.
A divergence does not depend on c, which then is as well taken as 0, and both are series in the moments of D under p,
``m_k = sum(p * D**k)``: they converge so quickly that seven leave less than 1e-12 of the divergence, they take no
exponential of D, that of A is a short polynomial, and nothing of order D is left to cancel. A row is read once:

    z = sum(m_k / k!),    reverse = sum((k - 1) * m_k / k!) / (1 + z) + z / (1 + z) - log1p(z)
                          forward = sum(m_k / k!) from k = 2, + log1p(z) - z

Any other row is worked on in two steps, extremes first and then sums, each of which is a few numbers that can be
folded over *pieces* of the row. A row that fits a block is one piece; a wider one, which is never taken for close, is
cut as :func:`~mergepipe.tasks.blocks.block_bounds` cuts it, whatever the chunks are. The exponentials are our own, of
additions and multiplications alone: they vectorise, and their bits are the same on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergepipe.tasks.blocks import BLOCK_ELEMENTS
from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array, Job

EXTREMES = 6
"""Of a piece: largest A, largest A + D, sum of D, smallest D, largest D, sum of squares of D."""

SUMS = 4
"""Of a piece, with weights ``e = exp(A - largest A)``: sums of e, e * expm1(E), e * exp(E) * E and e * E.

Of a piece of a far row, with ``f = exp(A + D - largest A + D)`` beside: sums of e, f, f * D and e * D.
"""

MOMENTS = 10
"""Of a close row: sums of w * D**k for k from 0 to 7, with ``w = exp(A)``, and of D and D**2."""

STATISTICS = 3
"""Of a row: its divergence, log(sum(exp(A))), and what log(q / p) is short of D."""

OTHERS = MOMENTS - 1
"""Moments that are a donor's own: the sum of w is the same for all."""

ROOM = OTHERS * LANES + MOMENTS + EXTREMES + SUMS + STATISTICS
"""float64 numbers of working memory that the rows of a donor are measured with."""

FAR = 1.0
"""Distance of an element of D from the mean above which a row is taken to be far."""

STRIDE = 4 * LANES
"""Elements that moments are taken of at once. A close row is filled up with zeros to a multiple of it, whose weights of
exactly 1 are taken off again; where it is shorter than :data:`LANES`, that is not worth while, and it is none."""

STRIP = 4 * STRIDE
"""Elements whose weights, which all donors share, are kept at a time: few enough for a first-level cache."""

SHARED = STRIP + LANES + 1
"""float64 numbers of working memory for all donors of a row together."""

CLOSE_WEIGHT, CLOSE_DELTA = 1.0, 1 / 32
"""Largest magnitudes of A and D in a close row."""

SHIFTED = 0.75
"""Share of the mean square of D that its squared mean may be in a close row: it is what cancels."""

CLOSE_TERMS = 9
"""Terms of the series in z of a close row, whose z is below 0.032."""

SERIES = 0.3
"""Log ratio, in magnitude, up to which a pointwise divergence is a series: the closed form cancels there."""

SERIES_TERMS = 12

_LOG2E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0
_LIMIT = 700.0

# exp(x / 16) for x from -1 to 1, within 2e-14: its sixteenth power is that of x, and exactly 1 for 0.
_ROOT = (1.0, 0.06250000000008085, 0.0019531250000006314, 4.069010351985786e-05, 6.35782872551062e-07,
         7.94857956135269e-09, 8.27943348996717e-11)  # fmt: skip


@inlined
def _expm1(x: Any) -> Any:
    """exp(x) - 1, within a few units of the last place; for magnitudes above 700 that of 700."""
    x = min(max(x, -_LIMIT), _LIMIT)
    shifted = x * _LOG2E + _ROUND
    whole = shifted - _ROUND
    r = (x - whole * _LN2_HIGH) - whole * _LN2_LOW
    tail = 1 / 479001600.0 + r * (1 / 6227020800.0)
    tail = 1 / 3628800.0 + r * (1 / 39916800.0 + r * tail)
    tail = 1 / 40320.0 + r * (1 / 362880.0 + r * tail)
    tail = 1 / 720.0 + r * (1 / 5040.0 + r * tail)
    tail = 1 / 24.0 + r * (1 / 120.0 + r * tail)
    tail = r + r * r * (0.5 + r * (1 / 6.0 + r * tail))
    power = np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)
    return power * tail + (power - 1.0)


@inlined
def _step(t: Any, x: Any, c: Any) -> Any:
    """A step of a polynomial at four places: side by side, none waits for itself."""
    return c + t[0] * x[0], c + t[1] * x[1], c + t[2] * x[2], c + t[3] * x[3]


@inlined
def _times(t: Any, x: Any) -> Any:
    return t[0] * x[0], t[1] * x[1], t[2] * x[2], t[3] * x[3]


@inlined
def _sum(t: Any) -> Any:
    return (t[0] + t[1]) + (t[2] + t[3])


@kernel
def _reach(a: Array) -> float:
    """Largest magnitude, float32: by its bits, whose maximum vectorises."""
    largest = np.int32(0)
    for i in range(a.size):
        largest = max(largest, np.int32(np.float32(a[i]).view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return float(found.view(np.float32))


@kernel
def _distance(a: Array, b: Array) -> float:
    """Largest magnitude of the differences, likewise."""
    largest = np.int32(0)
    for i in range(a.size):
        largest = max(largest, np.int32(np.float32(b[i] - a[i]).view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return float(found.view(np.float32))


@kernel
def _add_weights(a: Array, begin: int, end: int, shared: Array) -> None:
    """``exp(a)`` of the elements from `begin` to `end`, whole strides; their lanes come behind them."""
    lanes = shared[STRIP : STRIP + LANES]
    for start in range(begin, end, STRIDE):
        x, own = a[start : start + STRIDE], shared[start - begin : start - begin + STRIDE]
        for i in range(LANES):
            # What has no sign can't count from the end: that test would keep the loop from vectorising.
            j, k, m, n = np.uintp(i), np.uintp(i + LANES), np.uintp(i + 2 * LANES), np.uintp(i + 3 * LANES)
            place = np.float64(x[j]), np.float64(x[k]), np.float64(x[m]), np.float64(x[n])
            root = _step((_ROOT[6], _ROOT[6], _ROOT[6], _ROOT[6]), place, _ROOT[5])
            root = _step(root, place, _ROOT[4])
            root = _step(root, place, _ROOT[3])
            root = _step(root, place, _ROOT[2])
            root = _step(root, place, _ROOT[1])
            root = _step(root, place, _ROOT[0])
            root = _times(root, root)
            root = _times(root, root)
            root = _times(root, root)
            weight = _times(root, root)
            own[j], own[k], own[m], own[n] = weight[0], weight[1], weight[2], weight[3]
            lanes[j] += _sum(weight)


@kernel
def _add_moments(a: Array, b: Array, donor: int, begin: int, end: int, shared: Array, room: Array) -> None:
    """Add the other :data:`MOMENTS` of a donor's elements from `begin` to `end`, whole strides, to its lanes."""
    lanes = room[donor]
    for start in range(begin, end, STRIDE):
        x, y = a[start : start + STRIDE], b[donor, start : start + STRIDE]
        own = shared[start - begin : start - begin + STRIDE]
        for i in range(LANES):
            j, k, m, n = np.uintp(i), np.uintp(i + LANES), np.uintp(i + 2 * LANES), np.uintp(i + 3 * LANES)
            weight = own[j], own[k], own[m], own[n]
            d = np.float64(y[j] - x[j]), np.float64(y[k] - x[k]), np.float64(y[m] - x[m]), np.float64(y[n] - x[n])
            square = _times(d, d)
            fourth = _times(square, square)
            first, second = _times(weight, d), _times(weight, square)
            third = _times(first, square)
            lanes[j] += _sum(first)
            lanes[k] += _sum(second)
            lanes[m] += _sum(third)
            lanes[n] += _sum(_times(weight, fourth))
            lanes[np.uintp(i + 4 * LANES)] += _sum(_times(first, fourth))
            lanes[np.uintp(i + 5 * LANES)] += _sum(_times(second, fourth))
            lanes[np.uintp(i + 6 * LANES)] += _sum(_times(third, fourth))
            lanes[np.uintp(i + 7 * LANES)] += _sum(d)
            lanes[np.uintp(i + 8 * LANES)] += _sum(square)


@kernel
def _halve(lanes: Array, first: int, count: int, at: int) -> None:
    """Sums of lanes, half on half: of so many times 64 from `first` on, which change, to where `at` is."""
    for s in range(first, first + count * LANES, LANES):
        for i in range(s, s + 8):
            # Three halvings written out: a loop over them does not vectorise.
            a, b, c, d = np.uintp(i), np.uintp(i + 8), np.uintp(i + 16), np.uintp(i + 24)
            e, f, g, h = np.uintp(i + 32), np.uintp(i + 40), np.uintp(i + 48), np.uintp(i + 56)
            even, odd = (lanes[a] + lanes[e]) + (lanes[c] + lanes[g]), (lanes[b] + lanes[f]) + (lanes[d] + lanes[h])
            lanes[a] = even + odd
    for s in range(count):
        t = lanes[first + s * LANES : first + s * LANES + 8]
        lanes[at + s] = ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))


@kernel
def _fill(values: Array, first: int, out: Array) -> None:
    """The values from `first` on, and zeros behind them."""
    # An assignment to a slice would first ask whether the two overlap, and takes six times as long.
    rest = values.size - first
    for i in range(rest):
        out[i] = values[np.uintp(first + i)]
    for i in range(rest, out.size):
        out[np.uintp(i)] = 0.0


@kernel
def _measure_moments(a: Array, b: Array, close: Array, shared: Array, filled: Array, room: Array) -> None:
    """:data:`MOMENTS` of a row of those donors that are close.

    Parameters
    ----------
    a : float32 ndarray, shape (n,)
    b : float32 ndarray, shape (donors, n)
    close : bool ndarray, shape (donors,)
    shared, filled : float64 ndarray, shape (SHARED,); float32 ndarray, shape (2, 256)
        Working memory.
    room : float64 ndarray, shape (donors, ROOM)
        The moments come behind the lanes.
    """
    # A slice that is handed to another kernel is counted, atomically: rows are handed on whole.
    shared[STRIP:] = 0.0
    for j in range(len(b)):
        if close[j]:
            room[j, : OTHERS * LANES] = 0.0
    whole = a.size // STRIDE * STRIDE
    for start in range(0, whole, STRIP):
        stop = min(start + STRIP, whole)
        _add_weights(a, start, stop, shared)
        for j in range(len(b)):
            if close[j]:
                _add_moments(a, b, j, start, stop, shared, room)
    rest = a.size - whole
    if rest:
        _fill(a, whole, filled[0])
        _add_weights(filled[0], 0, STRIDE, shared)
        for j in range(len(b)):
            if close[j]:
                _fill(b[j], whole, filled[1])
                _add_moments(filled[0], filled[1:], 0, 0, STRIDE, shared, room[j : j + 1])
    _halve(shared, STRIP, 1, STRIP + LANES)
    for j in range(len(b)):
        if close[j]:
            own = room[j]
            own[OTHERS * LANES] = shared[STRIP + LANES] - (STRIDE - rest if rest else 0.0)
            _halve(own, 0, OTHERS, OTHERS * LANES + 1)


@kernel
def finish_close(moments: Array, reverse: float, forward: float, out: Array) -> bool:
    """:data:`STATISTICS` of a close row from its :data:`MOMENTS`; False, with `out` undefined, if it is none."""
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
    out[0], out[1], out[2] = found if found > 0.0 else 0.0, math.log(total), math.log1p(z)
    return True


@kernel
def measure_extremes(a: Array, b: Array, lanes: Array, out: Array) -> None:
    """:data:`EXTREMES` of a piece: `a` and `b` of shape (n,), `lanes` of shape (6, 64) as working memory."""
    used = min(LANES, a.size)
    top_a, top_b, total, low, high, squares = lanes[0], lanes[1], lanes[2], lanes[3], lanes[4], lanes[5]
    for i in range(used):
        d = np.float64(b[i] - a[i])
        top_a[i], top_b[i], total[i], low[i], high[i], squares[i] = a[i], np.float64(a[i]) + d, 0.0, d, d, 0.0
    for start in range(0, a.size, LANES):
        x, y = a[start : start + LANES], b[start : start + LANES]
        for i in range(x.size):
            d = np.float64(y[i] - x[i])
            top_a[i] = max(top_a[i], np.float64(x[i]))
            top_b[i] = max(top_b[i], np.float64(x[i]) + d)
            low[i] = min(low[i], d)
            high[i] = max(high[i], d)
            total[i] += d
            squares[i] += d * d
    out[0], out[1], out[2], out[3], out[4], out[5] = top_a[0], top_b[0], 0.0, low[0], high[0], 0.0
    for i in range(used):
        out[0], out[1] = max(out[0], top_a[i]), max(out[1], top_b[i])
        out[3], out[4] = min(out[3], low[i]), max(out[4], high[i])
        out[2] += total[i]
        out[5] += squares[i]


@kernel
def _near(a: Array, b: Array, top: float, mean: float, lanes: Array) -> None:
    weights, moved, first, second = lanes[0], lanes[1], lanes[2], lanes[3]
    for start in range(0, a.size, LANES):
        x, y = a[start : start + LANES], b[start : start + LANES]
        for i in range(x.size):
            e = np.float64(y[i] - x[i]) - mean
            weight = _expm1(np.float64(x[i]) - top) + 1.0
            growth = _expm1(e)
            weights[i] += weight
            moved[i] += weight * growth
            first[i] += weight * (growth + 1.0) * e
            second[i] += weight * e


@kernel
def _far(a: Array, b: Array, top_a: float, top_b: float, lanes: Array) -> None:
    weights, others, first, second = lanes[0], lanes[1], lanes[2], lanes[3]
    for start in range(0, a.size, LANES):
        x, y = a[start : start + LANES], b[start : start + LANES]
        for i in range(x.size):
            d = np.float64(y[i] - x[i])
            weight = _expm1(np.float64(x[i]) - top_a) + 1.0
            other = _expm1((np.float64(x[i]) + d) - top_b) + 1.0
            weights[i] += weight
            others[i] += other
            first[i] += other * d
            second[i] += weight * d


@kernel
def _is_far(extremes: Array, width: int) -> bool:
    mean = extremes[2] / width
    return bool(max(extremes[4] - mean, mean - extremes[3]) > FAR)


@kernel
def measure_sums(a: Array, b: Array, extremes: Array, width: int, lanes: Array, out: Array) -> None:
    """:data:`SUMS` of a piece, given the :data:`EXTREMES` of its whole row and the row's width."""
    used = min(LANES, a.size)
    lanes[:SUMS, :used] = 0.0
    if _is_far(extremes, width):
        _far(a, b, extremes[0], extremes[1], lanes)
    else:
        _near(a, b, extremes[0], extremes[2] / width, lanes)
    for s in range(SUMS):
        out[s] = 0.0
        for i in range(used):
            out[s] += lanes[s, i]


@kernel
def finish_row(extremes: Array, sums: Array, width: int, reverse: float, forward: float, out: Array) -> None:
    """:data:`STATISTICS` of a row; `reverse` and `forward` are the weights of the two directions.

    The divergence is 0 where D is the same all along the row, where rounding leaves it below 0, and where D overflows.
    """
    mean = extremes[2] / width
    out[0], out[1], out[2] = 0.0, extremes[0] + math.log(sums[0]), mean
    spread = extremes[4] - extremes[3]
    if not (spread > 0.0 and spread < math.inf):
        return
    if _is_far(extremes, width):
        moved = extremes[1] + math.log(sums[1]) - out[1]
        backward, onward = sums[2] / sums[1] - moved, moved - sums[3] / sums[0]
    else:
        z = sums[1] / sums[0]
        moved = math.log1p(z)
        backward, onward = sums[2] / sums[0] / (1.0 + z) - moved, moved - sums[3] / sums[0]
        moved += mean
    found = reverse * backward + forward * onward
    out[0] = found if found > 0.0 and found < math.inf else 0.0
    out[2] = moved


@kernel
def measured_close(itemsize: int, width: int) -> bool:
    """Whether rows of this width, in float32 or float64, can be close ones."""
    return itemsize == 4 and width >= LANES


@kernel
def finish_close_rows(moments: Array, reverse: float, forward: float, out: Array, settled: Array) -> None:
    """:func:`finish_close` for rows, shape (rows, 10): into `out`, shape (rows, 3), and `settled`, bool, (rows,)."""
    for row in range(len(moments)):
        settled[row] = finish_close(moments[row], reverse, forward, out[row])


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
    out : float64 ndarray, shape (rows, 1 to 3)
        The first columns are written.

    Returns
    -------
    float
        Sum of squares of D.
    """
    room, shared, filled = np.empty((1, ROOM)), np.empty(SHARED), np.empty((2, STRIDE), a.dtype)
    energies, close, lanes = np.zeros(1), np.empty(1, np.bool_), np.empty((EXTREMES, LANES))
    donors = b.reshape(b.size // width, 1, width)
    for row in range(a.size // width):
        x, y = a[row * width : (row + 1) * width], donors[row]
        close[0] = measured_close(a.itemsize, width) and _reach(x) <= CLOSE_WEIGHT and _distance(x, y[0]) <= CLOSE_DELTA
        _measure_row(x, y, close, reverse, forward, out[row : row + 1], energies, shared, filled, room, lanes)
    return float(energies[0])


@kernel
def _measure_row(
    a: Array, b: Array, close: Array, reverse: float, forward: float, out: Array, energies: Array, shared: Array,
    filled: Array, room: Array, lanes: Array,
) -> None:  # fmt: skip
    """:data:`STATISTICS` of a row of all donors.

    Parameters
    ----------
    a, b : ndarray, shape (n,) and (donors, n)
    close : bool ndarray, shape (donors,)
        Whether magnitudes are those of a close row.
    reverse, forward : float
    out : float64 ndarray, shape (donors, 1 to 3)
    energies : float64 ndarray, shape (donors,)
        Added to: the sums of squares of D.
    shared, filled, room, lanes : ndarray
        Working memory; see :func:`_measure_moments` and :func:`measure_extremes`.
    """
    some = False
    for j in range(close.size):
        some |= close[j]
    if some:
        _measure_moments(a, b, close, shared, filled, room)
    for j in range(len(b)):
        rest = room[j, OTHERS * LANES :]
        moments, extremes = rest[:MOMENTS], rest[MOMENTS : MOMENTS + EXTREMES]
        sums, found = rest[MOMENTS + EXTREMES : -STATISTICS], rest[-STATISTICS:]
        if close[j] and finish_close(moments, reverse, forward, found):
            energies[j] += moments[MOMENTS - 1]
            for s in range(out.shape[1]):
                out[j, s] = found[s]
            continue
        measure_extremes(a, b[j], lanes, extremes)
        energies[j] += extremes[5]
        if extremes[3] == extremes[4] and out.shape[1] == 1:
            out[j, 0] = 0.0
            continue
        measure_sums(a, b[j], extremes, a.size, lanes, sums)
        finish_row(extremes, sums, a.size, reverse, forward, found)
        for s in range(out.shape[1]):
            out[j, s] = found[s]


@kernel
def fold_extremes(pieces: Array, out: Array) -> None:
    """:data:`EXTREMES` of rows, shape (rows, 6), from those of their pieces, shape (rows, pieces, 6), in order."""
    out[:] = pieces[:, 0]
    for row in range(pieces.shape[0]):
        found = out[row]
        for k in range(1, pieces.shape[1]):
            piece = pieces[row, k]
            found[0], found[1] = max(found[0], piece[0]), max(found[1], piece[1])
            found[3], found[4] = min(found[3], piece[3]), max(found[4], piece[4])
            found[2] += piece[2]
            found[5] += piece[5]


@kernel
def finish_rows(extremes: Array, pieces: Array, width: int, reverse: float, forward: float, out: Array) -> None:
    """:data:`STATISTICS` of rows, shape (rows, 1 to 3), from the sums of their pieces, shape (rows, pieces, 4)."""
    sums, found = np.empty(SUMS), np.empty(STATISTICS)
    for row in range(pieces.shape[0]):
        sums[:] = 0.0
        for k in range(pieces.shape[1]):
            sums += pieces[row, k]
        finish_row(extremes[row], sums, width, reverse, forward, found)
        out[row] = found[: out.shape[1]]


@kernel
def _series(reverse: float, forward: float) -> Array:
    """Of ``reverse * (exp(r) * r - expm1(r)) + forward * (expm1(r) - r)`` over r squared, highest power first."""
    found = np.empty(SERIES_TERMS)
    factorial = 1.0
    for k in range(2, SERIES_TERMS + 2):
        factorial *= k
        found[SERIES_TERMS + 1 - k] = (reverse * (k - 1) + forward) / factorial
    return found


@kernel
def score_points(
    a: Array, b: Array, width: int, rows: Array, reverse: float, forward: float, always: bool, out: Array
) -> None:
    """What each element contributes to its row's divergence: ``q * log(q / p) - q + p`` in reverse, never negative.

    `rows` has all three columns; the rest is as in :func:`score_delta` and :func:`measure_rows`.
    """
    terms = _series(reverse, forward)
    for row in range(rows.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        scores = out[row * width : (row + 1) * width]
        kl, normaliser, moved = rows[row, 0], rows[row, 1], rows[row, 2]
        if kl == 0.0:
            for i in range(scores.size):
                scores[i] = abs(y[i] - x[i]) if always else 0
            continue
        for i in range(scores.size):
            r = np.float64(y[i] - x[i]) - moved
            log_p = np.float64(x[i]) - normaliser
            p = _expm1(log_p) + 1.0
            q = _expm1(log_p + r) + 1.0
            series = 0.0
            for k in range(SERIES_TERMS):
                series = series * r + terms[k]
            near = p * (r * r * series)
            far = max(reverse * (q * r - q + p) + forward * (q - p - p * r), 0.0)
            scores[i] = near if abs(r) <= SERIES else far


@kernel
def _decode(bits: Array, out: Array) -> float:
    """Stored bfloat16 to float32; the largest magnitude, which is not below an infinity if one is not finite."""
    largest = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        largest = max(largest, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    found = np.int32(largest << 16)
    return float(found.view(np.float32))


@kernel
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
    return bool(worst < 0x7F80), float(found.view(np.float32))


@kernel
def measure_stored(
    base: Array, donors: tuple[Array, ...], width: int, block: int, reverse: float, forward: float, columns: int,
    blocks: Array,
) -> bool:  # fmt: skip
    """Measure the rows of stored bfloat16 numbers: :func:`measure_rows` of each donor.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
        Whole blocks, but for the last of a tensor.
    width, block : int
        Elements of a row and of a block.
    reverse, forward : float
    columns : int
        Statistics that are kept of a row.
    blocks : float64 ndarray, shape (blocks, donors, rows of a block * columns + 1)
        Where the statistics are put, and behind those of a block its sum of squares.

    Returns
    -------
    bool
        False if a stored value is not finite: then all is for the general way.
    """
    room, shared, filled = np.empty((len(donors), ROOM)), np.empty(SHARED), np.empty((2, STRIDE), np.float32)
    a, b = np.empty(width, np.float32), np.empty((len(donors), width), np.float32)
    energies, close, lanes = np.empty(len(donors)), np.empty(len(donors), np.bool_), np.empty((EXTREMES, LANES))
    may_be_close = measured_close(4, width)
    for start in range(0, base.size, block):
        stop, own = min(start + block, base.size), blocks[start // block]
        energies[:] = 0.0
        for at in range(start, stop, width):
            reach = _decode(base[at : at + width], a)
            if not reach < math.inf:
                return False
            for j in range(len(donors)):
                finite, distance = _decode_donor(donors[j][at : at + width], a, b[j])
                if not finite:
                    return False
                close[j] = may_be_close and reach <= CLOSE_WEIGHT and distance <= CLOSE_DELTA
            place = (at - start) // width * columns
            found = own[:, place : place + columns]
            _measure_row(a, b, close, reverse, forward, found, energies, shared, filled, room, lanes)
        own[:, -1] = energies
    return True


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
