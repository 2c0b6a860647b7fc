"""How kernels are compiled."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from mergepipe.tasks.jit import _Kernel, kernel, uncounted

COUNTS = "NRT_incref"


def _first_of(row: np.ndarray[Any, Any]) -> Any:
    return row[:8].sum() + row[0]


def _code(loop: Any, rows: np.ndarray[Any, Any]) -> str:
    """What it is compiled to, with all that it calls."""
    assert isinstance(loop, _Kernel)
    loop._options.pop("cache")  # code that was kept can't be looked at
    out = np.empty(len(rows))
    loop(rows, out)
    np.testing.assert_array_equal(out, rows[:, :8].sum(axis=1) + rows[:, 0])
    return "".join(loop.inspect_llvm().values())


@pytest.mark.parametrize("how", [kernel, uncounted])
def test_nobody_counts_who_holds_an_array(how: Any) -> None:
    first = numba.njit(_first_of)

    def measure(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        for i in range(len(rows)):
            out[i] = first(rows[i])

    rows = np.arange(64.0).reshape(4, 16)
    assert (COUNTS in _code(how(measure), rows)) == (how is kernel)


def test_one_that_makes_an_array_has_to_count() -> None:
    def measure(rows: np.ndarray[Any, Any]) -> Any:
        return np.empty(len(rows)).size

    with pytest.raises(numba.TypingError):
        uncounted(measure)(np.zeros((4, 16)))


def test_a_kernel_that_makes_an_array_is_called_from_one_that_counts_nothing() -> None:
    """What calls it says nothing about how it is compiled."""

    def extend(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        out[:] = np.ones(out.size) + rows[0, 0]

    extended = kernel(extend)

    def measure(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        extended(rows, out)

    out = np.zeros(3)
    uncounted(measure)(np.zeros((4, 16)), out)
    np.testing.assert_array_equal(out, 1.0)
