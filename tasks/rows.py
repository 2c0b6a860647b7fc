"""Row statistics: how far a donor's rows diverge from the primary's.

A row runs along the last axis. With ``D = B - A`` in the working type, ``p = softmax(A)``, ``q = softmax(B)``, where B
stands for A + D, any number c, ``E = D - c`` and ``z = sum(p * expm1(E))``:

    reverse KL(q || p) = sum(p * exp(E) * E) / (1 + z) - log1p(z)
    forward KL(p || q) = log1p(z) - sum(p * E)

all in float64; the differences that a fine-tune makes are so small that the textbook formula in float32 is noise. A
divergence does not depend on c, nor on a factor of all the weights ``exp(A)`` that p is made of; and weights that are a
little off, the same ones in all sums, are those of another p that is as little off. So all donors of a row share its
weights, which are a short polynomial raised to a high power. By their largest difference rows are of five kinds:

*Close*, no D beyond 1/32, as most rows of a fine-tune are. With c = 0 both divergences are series in the moments of D
under p, ``m_k = sum(p * D**k)``: seven leave about 1e-12 of the divergence, they take no exponential of D, and
nothing of order D is left to cancel:

    z = sum(m_k / k!),    reverse = (sum((k - 1) * m_k / k!) - z**2) / (1 + z) - (log1p(z) - z)
                          forward = sum(m_k / k!) from k = 2, + (log1p(z) - z)

*Loose*, none beyond 1/8: the same with nine moments.

*Near*, none beyond 1: the formulas above. *Far*, none beyond 8: 1 + z may vanish, and the logarithm of
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

import numpy as np

from mergepipe.tasks.blocks import BLOCK_ELEMENTS
from mergepipe.tasks.jit import kernel, uncounted
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array, Job
from mergepipe.tasks.row_sums import (
    ADDED,
    CLOSE,
    CLOSE_DELTA,
    DISTANT,
    FAR,
    FAR_DELTA,
    HEAVIEST,
    LEFT,
    LOOSE,
    LOOSE_DELTA,
    MORE,
    NEAR,
    NEAR_DELTA,
    ROOM,
    STRIDE,
    STRIP,
    SUMS,
    add_differences,
    add_up,
    sums_of,
)

EXTREMES = 7
"""Of a piece: largest A, largest B, sum of D, smallest D, largest D, largest magnitude of A, sum of squares of D."""

STATISTICS = 3
"""Of a row: its divergence, log(sum(exp(A))), and what log(q / p) is short of D."""

SHIFTED = 0.75
"""Share of the mean square of D that its squared mean may be where c is 0: it is what cancels."""

CLOSE_TERMS, LOOSE_TERMS = 9, 16
"""Terms of the series in z of a close row, whose z is below 0.032, and of a loose one, with z below 0.134."""

OVER = np.array([0.0, *(1 / k for k in range(1, LOOSE_TERMS + 2))])
"""1 / k: divisions would take longer than all else that is done once per row."""

OVER_FACTORIAL = np.array([1 / math.factorial(k) for k in range(MORE - 1)])
"""1 / k!"""


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
    if not (reach <= HEAVIEST and distance <= FAR_DELTA):
        return DISTANT
    if distance <= LOOSE_DELTA:
        return CLOSE if distance <= CLOSE_DELTA else LOOSE
    return NEAR if distance <= NEAR_DELTA else FAR


@uncounted
def _finish_close(moments: Array, kind: int, reverse: float, forward: float, out: Array) -> bool:
    """:data:`STATISTICS` of a close or loose row from its moments; False, with `out` undefined, if too much cancels."""
    total = moments[0]
    mean, spread = moments[1] / total, moments[2] / total
    if mean * mean > SHIFTED * spread:
        return False
    # The sums of m_k / k! and of (k - 1) * m_k / k!, from k = 2 on.
    onward, backward, share = 0.0, 0.0, 1.0 / total
    for k in range(2, sums_of(kind) - 1):
        term = moments[k] * share * OVER_FACTORIAL[k]
        onward += term
        backward += (k - 1) * term
    z = mean + onward
    # log1p(z) - z, as a series.
    rising, power = 0.0, -z
    for k in range(2, (CLOSE_TERMS if kind == CLOSE else LOOSE_TERMS) + 2):
        power *= -z
        rising -= power * OVER[k]
    backward = (backward - z * z) / (1.0 + z) - rising
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
    if kind <= LOOSE:
        return _finish_close(moments, kind, reverse, forward, out)
    mean = moments[4] / width
    if mean * mean > SHIFTED * (moments[5] / width):
        return False
    _finish_sums(moments, kind, 0.0, 0.0, 0.0, reverse, forward, out)
    return True


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
    add_differences(a, b, filled, lanes)
    out[2], out[6] = lanes[2 * LANES], lanes[2 * LANES + 1]


@uncounted
def _measured_as(extremes: Array, width: int) -> tuple[int, float, float]:
    """Of a row whose :data:`EXTREMES` are known: its kind, and what is taken off A and off D."""
    mean = extremes[2] / width
    distance, level = max(extremes[4] - mean, mean - extremes[3]), extremes[0] if extremes[5] > HEAVIEST else 0.0
    if not distance <= FAR_DELTA:
        return DISTANT, level, extremes[1]
    return NEAR if distance <= NEAR_DELTA else FAR, level, mean


@kernel
def measure_sums(a: Array, b: Array, extremes: Array, width: int, out: Array) -> None:
    """:data:`SUMS` of a piece, given the :data:`EXTREMES` of its whole row and the row's width."""
    kind, level, shift = _measured_as(extremes, width)
    kinds, shifts, room = np.full(1, kind), np.full(1, shift), np.empty((1, ROOM))
    shared, filled = np.empty(STRIP), np.empty((2, STRIDE), a.dtype)
    add_up(a, b.reshape(1, b.size), kinds, extremes[5], level, shifts, shared, filled, room)
    for s in range(SUMS):
        out[s] = room[0, ADDED + s]


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
    """:func:`finish_once` for rows, shape (rows, sums): into `out`, shape (rows, 3), and `settled`, bool, (rows,)."""
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
        The divergences alone, or all three; contiguous.

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
        Working memory; see :func:`~mergepipe.tasks.row_sums.add_up`.
    """
    for j in range(len(b)):
        if kinds[j] == DISTANT:
            kinds[j] = LEFT
    add_up(a, b, kinds, reach, 0.0, shifts, shared, filled, room)
    for j in range(len(b)):
        moments = room[j, ADDED:]
        if kinds[j] != LEFT and finish_once(moments, kinds[j], a.size, reverse, forward, out[j]):
            energies[j] += moments[sums_of(kinds[j]) - 1]
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
