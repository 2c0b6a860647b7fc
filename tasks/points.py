"""What each element contributes to its row's divergence (:mod:`mergepipe.tasks.rows`): pointwise scores.

With ``r = log(q / p)`` it is ``q * log(q / p) - q + p = p * (exp(r) * r - expm1(r))`` in reverse, and
``p * (expm1(r) - r)`` forward, never negative. Small ones would cancel: where r needs no power of two taken out, both
are made of ``exp(r) - 1 - r``, which the exponential has beside.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks.exponentials import LIMIT, grow
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array

LARGEST = 256.0
"""Largest magnitude of A and D with which neither p nor exp(r) vanishes or overflows."""


@kernel
def _within(a: Array, b: Array) -> bool:
    """Whether no A and no D is beyond :data:`LARGEST`: by bits, whose maximum vectorises."""
    largest = np.int32(0)
    for i in range(a.size):
        largest = max(largest, np.int32(np.float32(a[i]).view(np.int32) & 0x7FFFFFFF))
        largest = max(largest, np.int32(np.float32(b[i] - a[i]).view(np.int32) & 0x7FFFFFFF))
    found = np.int32(largest)
    return bool(found.view(np.float32) <= LARGEST)


@kernel
def score_points(
    a: Array, b: Array, width: int, rows: Array, reverse: float, forward: float, always: bool, out: Array
) -> None:
    """The contributions, in the weights of the two directions.

    `rows` has all three columns; the rest is as in :func:`mergepipe.tasks.scores.score_delta` and
    :func:`mergepipe.tasks.rows.measure_rows`.
    """
    for row in range(rows.shape[0]):
        x, y = a[row * width : (row + 1) * width], b[row * width : (row + 1) * width]
        scores = out[row * width : (row + 1) * width]
        kl, normaliser, moved = rows[row, 0], rows[row, 1], rows[row, 2]
        if kl == 0.0:
            for i in range(scores.size):
                scores[i] = abs(y[i] - x[i]) if always else 0
            continue
        if _within(x, y):
            for i in range(scores.size):
                r = np.float64(y[i] - x[i]) - moved
                # What stands at the other two places is thrown away.
                power, rest, q = grow((np.float64(x[i]) - normaliser, r, 0.0, 0.0))
                p = power[0] + power[0] * (rest[0] + q[0])
                growth = power[1] * (rest[1] + q[1]) + (power[1] - 1.0)
                small = reverse * (r * r + (r - 1.0) * q[1]) + forward * q[1]
                large = max(reverse * (growth * (r - 1.0) + r) + forward * (growth - r), 0.0)
                scores[i] = p * (small if power[1] == 1.0 else large)
        else:
            for i in range(scores.size):
                r, log_p = np.float64(y[i] - x[i]) - moved, np.float64(x[i]) - normaliser
                first, second = max(log_p, -LIMIT), max(log_p + r, -LIMIT)
                power, rest, q = grow((first, second, min(max(r, -LIMIT), LIMIT), 0.0))
                p, other = power[0] + power[0] * (rest[0] + q[0]), power[1] + power[1] * (rest[1] + q[1])
                small = p * (reverse * (r * r + (r - 1.0) * q[2]) + forward * q[2])
                large = max(reverse * (other * r - other + p) + forward * (other - p - p * r), 0.0)
                scores[i] = small if power[2] == 1.0 else large
