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

# (exp(x / 32) - 1 - x / 32) / x**2 for x from -1 to 1: what is made of it is within 2e-14 of exp(x) - 1.
SMALL = (0.0004882812500000008, 5.086263019028746e-06, 3.973642983757194e-08, 2.483599048788458e-10,
         1.293537411651531e-12)  # fmt: skip

# exp(x / 16) for x from -1 to 1; its sixteenth power is within 2e-13 of that of x, and exactly 1 for 0.
ROOT = (1.0, 0.06250000000008085, 0.0019531250000006314, 4.069010351985786e-05, 6.35782872551062e-07,
        7.94857956135269e-09, 8.27943348996717e-11)  # fmt: skip

WIDEST = 8.0
"""What the arguments of :func:`raised` must not exceed in magnitude."""

# exp(x / 128) for x up to that.
RAISED = (1.0, 0.0078125, 3.0517578125009866e-05, 7.947285970054042e-08, 1.5522042786890684e-10, 2.425319189429405e-13,
          3.158353230107784e-16, 3.524899992219853e-19)  # fmt: skip


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
def small_expm1(x: Any, square: Any) -> Any:
    """exp(x) - 1 for x from -1 to 1, whose `square` is known: that of x / 32, and ``h * (h + 2)`` for twice as much."""
    even, odd = step(square, four(SMALL[4]), SMALL[2]), step(square, four(SMALL[3]), SMALL[1])
    even = step(even, square, SMALL[0])
    h = plus(times(x, four(0.03125)), times(square, plus(even, times(odd, x))))
    h = times(h, plus(h, four(2.0)))
    h = times(h, plus(h, four(2.0)))
    h = times(h, plus(h, four(2.0)))
    h = times(h, plus(h, four(2.0)))
    return times(h, plus(h, four(2.0)))


@inlined_late
def raised(x: Any) -> Any:
    """exp(x) for x from -8 to 8, within 4e-14: the 128th power of that of x / 128."""
    y = step(step(four(RAISED[7]), x, RAISED[6]), x, RAISED[5])
    y = step(step(step(y, x, RAISED[4]), x, RAISED[3]), x, RAISED[2])
    y = step(step(y, x, RAISED[1]), x, RAISED[0])
    y = times(y, y)
    y = times(y, y)
    y = times(y, y)
    y = times(y, y)
    y = times(y, y)
    y = times(y, y)
    return times(y, y)
