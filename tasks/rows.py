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

ROOM = MOMENTS * LANES + MOMENTS + EXTREMES + SUMS + STATISTICS
"""float64 numbers of working memory that rows are measured with."""

FAR = 1.0
"""Distance of an element of D from the mean above which a row is taken to be far."""

STRIDE = 4 * LANES
"""Elements that moments are taken of at once. A close row is filled up with zeros to a multiple of it, whose weights of
exactly 1 are taken off again; where it is shorter than :data:`LANES`, that is not worth while, and it is none."""

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
def _largest(a: Array, b: Array) -> tuple[float, float]:
    """Largest magnitudes of `a` and of the differences, float32: by their bits, whose maximum vectorises."""
    first, second = np.int32(0), np.int32(0)
    for i in range(a.size):
        first = max(first, np.int32(np.float32(a[i]).view(np.int32) & 0x7FFFFFFF))
        second = max(second, np.int32(np.float32(b[i] - a[i]).view(np.int32) & 0x7FFFFFFF))
    weight, delta = np.int32(first), np.int32(second)
    return float(weight.view(np.float32)), float(delta.view(np.float32))


@kernel
def _add_moments(a: Array, b: Array, lanes: Array) -> None:
    """Add :data:`MOMENTS` of `a` and `b`, shape (256 * k,), to `lanes`, shape (10 * 64,)."""
    for start in range(0, a.size, STRIDE):
        x, y = a[start : start + STRIDE], b[start : start + STRIDE]
        for i in range(LANES):
            # What has no sign can't count from the end: that test would keep the loop from vectorising.
            j, k, m, n = np.uintp(i), np.uintp(i + LANES), np.uintp(i + 2 * LANES), np.uintp(i + 3 * LANES)
            place = np.float64(x[j]), np.float64(x[k]), np.float64(x[m]), np.float64(x[n])
            d = np.float64(y[j] - x[j]), np.float64(y[k] - x[k]), np.float64(y[m] - x[m]), np.float64(y[n] - x[n])
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
            square = _times(d, d)
            fourth = _times(square, square)
            first, second = _times(weight, d), _times(weight, square)
            third = _times(first, square)
            lanes[j] += _sum(weight)
            lanes[k] += _sum(first)
            lanes[m] += _sum(second)
            lanes[n] += _sum(third)
            lanes[np.uintp(i + 4 * LANES)] += _sum(_times(weight, fourth))
            lanes[np.uintp(i + 5 * LANES)] += _sum(_times(first, fourth))
            lanes[np.uintp(i + 6 * LANES)] += _sum(_times(second, fourth))
            lanes[np.uintp(i + 7 * LANES)] += _sum(_times(third, fourth))
            lanes[np.uintp(i + 8 * LANES)] += _sum(d)
            lanes[np.uintp(i + 9 * LANES)] += _sum(square)


@kernel
def _measure_moments(a: Array, b: Array, lanes: Array, filled: Array, out: Array) -> None:
    """:data:`MOMENTS` of a row into `out`; `lanes`, shape (640,), and `filled`, (2, 256), are working memory."""
    lanes[:] = 0.0
    whole = a.size // STRIDE * STRIDE
    _add_moments(a[:whole], b[:whole], lanes)
    rest = a.size - whole
    if rest:
        filled[:] = 0.0
        filled[0, :rest] = a[whole:]
        filled[1, :rest] = b[whole:]
        _add_moments(filled[0], filled[1], lanes)
    for s in range(MOMENTS):
        own = lanes[s * LANES : (s + 1) * LANES]
        half = LANES // 2
        while half:
            for i in range(half):
                own[i] += own[np.uintp(i + half)]
            half //= 2
        out[s] = own[0]
    out[0] -= STRIDE - rest if rest else 0.0


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
    room, filled = np.empty(ROOM), np.empty((2, STRIDE), a.dtype)
    return _measure_rows(a, b, width, reverse, forward, out, 0.0, room, filled)


@kernel
def _measure_rows(
    a: Array,
    b: Array,
    width: int,
    reverse: float,
    forward: float,
    out: Array,
    energy: float,
    room: Array,
    filled: Array,
) -> float:
    """The same, added to the `energy` of rows before; with working memory, `room` of shape (:data:`ROOM`,)."""
    lanes = room[: MOMENTS * LANES]
    rooms = lanes[: EXTREMES * LANES].reshape(EXTREMES, LANES)
    rest = room[MOMENTS * LANES :]
    moments, extremes, sums = rest[:MOMENTS], rest[MOMENTS : MOMENTS + EXTREMES], rest[MOMENTS + EXTREMES : -STATISTICS]
    found = rest[-STATISTICS:]
    for row in range(a.size // width):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        if measured_close(a.itemsize, width):
            weight, delta = _largest(x, y)
            if weight <= CLOSE_WEIGHT and delta <= CLOSE_DELTA:
                _measure_moments(x, y, lanes, filled, moments)
                if finish_close(moments, reverse, forward, found):
                    energy += moments[MOMENTS - 1]
                    out[row] = found[: out.shape[1]]
                    continue
        measure_extremes(x, y, rooms, extremes)
        energy += extremes[5]
        if extremes[3] == extremes[4] and out.shape[1] == 1:
            out[row, 0] = 0.0
            continue
        measure_sums(x, y, extremes, width, rooms, sums)
        finish_row(extremes, sums, width, reverse, forward, found)
        out[row] = found[: out.shape[1]]
    return energy


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
def _decode(bits: Array, out: Array) -> bool:
    """Stored bfloat16 to float32; whether all are finite."""
    worst = np.int32(0)
    for i in range(bits.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    return bool(worst < 0x7F80)


@kernel
def measure_stored(
    base: Array, donors: tuple[Array, ...], width: int, block: int, piece: int, reverse: float, forward: float,
    columns: int, blocks: Array,
) -> bool:  # fmt: skip
    """Measure the rows of stored bfloat16 numbers: :func:`measure_rows` of each donor.

    Parameters
    ----------
    base, donors : uint16 ndarray, shape (n,); the primary, and one row per donor
        Whole blocks, but for the last of a tensor.
    width, block, piece : int
        Elements of a row, of a block and of what is worked on at once, whole rows.
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
    room, filled = np.empty(ROOM), np.empty((2, STRIDE), np.float32)
    first, second = np.empty(piece, np.float32), np.empty(piece, np.float32)
    for start in range(0, base.size, block):
        stop, own = min(start + block, base.size), blocks[start // block]
        own[:, -1] = 0.0
        for at in range(start, stop, piece):
            after = min(at + piece, stop)
            a, b = first[: after - at], second[: after - at]
            if not _decode(base[at:after], a):
                return False
            row, count = (at - start) // width, (after - at) // width
            for j in range(len(donors)):
                if not _decode(donors[j][at:after], b):
                    return False
                found = own[j, row * columns : (row + count) * columns].reshape(count, columns)
                own[j, -1] = _measure_rows(a, b, width, reverse, forward, found, own[j, -1], room, filled)
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
