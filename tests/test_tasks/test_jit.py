"""How kernels are compiled."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from mergepipe.tasks import jit
from mergepipe.tasks.jit import _Kernel, kernel, uncounted

COUNTS = re.compile("NRT_incref|atomicrmw")


def _ends(row: np.ndarray[Any, Any]) -> Any:
    piece = row[:8]
    return piece[0] + piece[7]


def _anew(loop: Any) -> Any:
    """The same, compiled here and now: code that was kept says nothing about how it would be compiled."""
    assert isinstance(loop, _Kernel)
    loop._options.pop("cache")
    return loop


@pytest.mark.parametrize("how", [kernel, uncounted])
def test_nobody_counts_who_holds_an_array(how: Any) -> None:
    ends = numba.njit(_ends)

    def largest(rows: np.ndarray[Any, Any]) -> Any:
        found = rows[0]
        for i in range(len(rows)):
            if ends(rows[i]) > ends(found):
                found = rows[i]
        return ends(found)

    loop = _anew(how(largest))
    assert loop(np.arange(64.0).reshape(4, 16)) == 48 + 55
    assert any(COUNTS.search(code) for code in loop.inspect_llvm().values()) == (how is kernel)


def test_one_that_makes_an_array_has_to_count() -> None:
    def measure(rows: np.ndarray[Any, Any]) -> Any:
        return np.empty(len(rows)).size

    with pytest.raises(numba.TypingError):
        _anew(uncounted(measure))(np.zeros((4, 16)))


def test_a_kernel_that_makes_an_array_is_called_from_one_that_counts_nothing() -> None:
    """What calls it says nothing about how it is compiled."""

    def extend(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        out[:] = np.ones(out.size) + rows[0, 0]

    extended = _anew(kernel(extend))

    def measure(rows: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        extended(rows, out)

    out = np.zeros(3)
    _anew(uncounted(measure))(np.zeros((4, 16)), out)
    np.testing.assert_array_equal(out, 1.0)


def _kept(value: float) -> float:
    return value + 1.0


def _is_kept() -> bool:
    """Whether the compiled loop was found where the last one left it."""
    loop: Any = kernel(_kept)
    assert loop(1.0) == 2.0
    return bool(loop.stats.cache_hits)


def test_what_is_kept_serves_until_some_file_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if it is another file: kernels are linked with those they call, and with constants."""
    monkeypatch.setattr(jit, "sources", lambda: "one")
    _is_kept()
    assert _is_kept()
    monkeypatch.setattr(jit, "sources", lambda: "another")
    assert not _is_kept()
    assert _is_kept()


def test_sources_are_all_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(jit, "__file__", str(tmp_path / "jit.py"))
    (tmp_path / "methods").mkdir()
    seen = set()
    for name, text in (("jit.py", ""), ("rows.py", "WIDTH = 1"), ("rows.py", "WIDTH = 2"), ("methods/linear.py", "")):
        (tmp_path / name).write_text(text)
        seen.add(jit.sources.__wrapped__())
    assert len(seen) == 3  # an empty file more is none
