"""The one way a kernel is compiled: without the GIL, on one thread, cached on disk.

`parallel=True` is never used: in a worker thread numba's thread layer aborts the process, and our own threads are as
fast. `fastmath` is never used: the order of additions is part of the result. `error_model="numpy"` drops the test for a
division by zero, which keeps loops from vectorising; kernels test where they divide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a plain loop over arrays on first use; the type checker keeps seeing the function itself."""
    return cast(F, numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def inlined(function: F) -> F:
    """As :func:`kernel`, for a small function that is only called from kernels."""
    return cast(F, numba.njit(nogil=True, error_model="numpy", inline="always")(function))
