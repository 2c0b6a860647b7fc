"""Exponentials of additions and multiplications alone, four side by side: none waits for itself, loops vectorise.

Their bits are the same on every machine: no mathematical library, no fused multiplication and addition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined_late

LOG2E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
ROUND = 6755399441055744.0

LIMIT = 700.0
"""What the arguments of :func:`grow` must not exceed in magnitude."""

# (exp(x) - 1 - x) / x**2 for x from -log(2) / 2 to log(2) / 2, within 1e-15.
SECOND = (0.5000000000000001, 0.16666666666666746, 0.041666666666632164, 0.008333333333229376, 0.001388888891327119,
          0.00019841270208637693, 2.4801527317728415e-05, 2.7556837815990328e-06, 2.761727135487715e-07,
          2.5276571798281242e-08)  # fmt: skip

# The same for x from -1/16 to 1/16, within 1e-13 of it.
SMALL = (0.5000000000000462, 0.1666666666666745, 0.041666666453853675, 0.008333333306145793, 0.0013890341935815325,
         0.00019842971194824108)  # fmt: skip

# exp(x / 16) for x from -1 to 1; its sixteenth power is within 2e-14 of that of x, and exactly 1 for 0.
ROOT = (1.0, 0.06250000000008085, 0.0019531250000006314, 4.069010351985786e-05, 6.35782872551062e-07,
        7.94857956135269e-09, 8.27943348996717e-11)  # fmt: skip


@inlined_late
def four(c: Any) -> Any:
    """The same at four places."""
    return c, c, c, c


@inlined_late
def step(t: Any, x: Any, c: Any) -> Any:
    """A step of a polynomial: ``c + t * x``."""
    return c + t[0] * x[0], c + t[1] * x[1], c + t[2] * x[2], c + t[3] * x[3]


@inlined_late
def times(t: Any, x: Any) -> Any:
    """The products."""
    return t[0] * x[0], t[1] * x[1], t[2] * x[2], t[3] * x[3]


@inlined_late
def plus(t: Any, x: Any) -> Any:
    """The sums."""
    return t[0] + x[0], t[1] + x[1], t[2] + x[2], t[3] + x[3]


@inlined_late
def less(t: Any, x: Any) -> Any:
    """The differences."""
    return t[0] - x[0], t[1] - x[1], t[2] - x[2], t[3] - x[3]


@inlined_late
def total(t: Any) -> Any:
    """The sum of all four."""
    return (t[0] + t[1]) + (t[2] + t[3])


@inlined_late
def _power(shifted: Any) -> Any:
    return np.int64((np.float64(shifted).view(np.int64) + 1023) << 52).view(np.float64)


@inlined_late
def grow(x: Any) -> Any:
    """Powers of two p, remainders r and ``q = exp(r) - 1 - r``, so that ``exp(x) = p * (1 + r + q)``.

    r is x itself where p is 1.
    """
    shifted = step(x, four(LOG2E), ROUND)
    whole = less(shifted, four(ROUND))
    r = less(less(x, times(whole, four(LN2_HIGH))), times(whole, four(LN2_LOW)))
    square = times(r, r)
    # Even and odd powers by themselves: the chain of what waits for each other is half as long.
    even, odd = step(square, four(SECOND[8]), SECOND[6]), step(square, four(SECOND[9]), SECOND[7])
    even, odd = step(even, square, SECOND[4]), step(odd, square, SECOND[5])
    even, odd = step(even, square, SECOND[2]), step(odd, square, SECOND[3])
    even, odd = step(even, square, SECOND[0]), step(odd, square, SECOND[1])
    power = _power(shifted[0]), _power(shifted[1]), _power(shifted[2]), _power(shifted[3])
    return power, r, times(square, plus(even, times(odd, r)))


@inlined_late
def exp(x: Any) -> Any:
    """exp(x), within a few units of the last place."""
    power, r, q = grow(x)
    return plus(power, times(power, plus(r, q)))


@inlined_late
def small_expm1(x: Any) -> Any:
    """exp(x) - 1 for x from -1 to 1, within 1e-13: that of x / 16, and ``h * (h + 2)`` for twice as much."""
    y = times(x, four(0.0625))
    square = times(y, y)
    even, odd = step(square, four(SMALL[4]), SMALL[2]), step(square, four(SMALL[5]), SMALL[3])
    even, odd = step(even, square, SMALL[0]), step(odd, square, SMALL[1])
    h = plus(y, times(square, plus(even, times(odd, y))))
    h = times(h, plus(h, four(2.0)))
    h = times(h, plus(h, four(2.0)))
    h = times(h, plus(h, four(2.0)))
    return times(h, plus(h, four(2.0)))
