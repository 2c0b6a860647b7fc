"""Scales and low-rank updates, block by block: as numpy does them at once, whatever the cut."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.tasks.adjust import Adjuster, Adjustment, BlockScales, Factor, LowRank, held_bytes
from mergepipe.tasks.convert import decode

Tensors = dict[str, np.ndarray[Any, Any]]


def adjuster(tensors: Tensors, adjustments: list[Adjustment], work: Any = np.float32, name: str = "w") -> Adjuster:
    def read(which: str, start: int, stop: int, out: np.ndarray[Any, Any]) -> None:
        out[:] = tensors[which].reshape(-1)[start:stop]

    return Adjuster(adjustments, name, tensors[name].shape, np.dtype(work), read)


def cut(size: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def adjusted(tensors: Tensors, adjustments: list[Adjustment], step: int, work: Any = np.float32) -> Any:
    found = adjuster(tensors, adjustments, work)
    out = tensors["w"].astype(work).reshape(-1)
    for start, stop in cut(out.size, step):
        assert found.apply(start, out[start:stop]) == -1
    return out.reshape(tensors["w"].shape)


def low_rank(
    shape: tuple[int, ...], rank: int, seed: int, *, turned: bool, lengths: str = ""
) -> tuple[Tensors, LowRank]:
    rng = np.random.default_rng(seed)
    rows, width = shape[0], math.prod(shape[1:])
    tensors: Tensors = {"w": rng.normal(size=shape), "left": rng.normal(size=(rows, rank))}
    tensors["right"] = rng.normal(size=(rank, width))
    tensors["lengths"] = rng.uniform(0.5, 2, rows if lengths == "rows" else width)
    tensors = {name: value.astype(np.float32) for name, value in tensors.items()}
    record = LowRank(
        Factor("left", "F32", turned), Factor("right", "F32", turned), rank, 0.37,
        Factor("lengths", "F32") if lengths else None, "columns" if lengths == "columns" else "rows",
    )  # fmt: skip
    return tensors, record


def stored(tensors: Tensors, record: LowRank) -> Tensors:
    """The factors as they lie in a file: turned round where the record says so."""
    if not record.left.transposed:
        return tensors
    return tensors | {name: np.ascontiguousarray(tensors[name].T) for name in ("left", "right")}


def reference(tensors: Tensors, record: LowRank) -> Any:
    t = {name: value.astype(np.float64) for name, value in tensors.items()}
    w = t["w"].reshape(t["left"].shape[0], -1) + record.scaling * (t["left"] @ t["right"])
    if record.magnitude is not None:
        axis = 1 if record.along == "rows" else 0
        w *= np.expand_dims(t["lengths"] / np.linalg.norm(w, axis=axis), axis)
    return w.reshape(t["w"].shape)


SHAPES = [(5, 7), (33, 2050), (3, 2, 3, 3), (1, 1), (40, 1025)]


@pytest.mark.parametrize("lengths", ["", "rows", "columns"])
@pytest.mark.parametrize("turned", [False, True], ids=["plain", "turned"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_low_rank_update(shape: tuple[int, ...], turned: bool, lengths: str) -> None:
    """As float64 has it, to rounding; the same bits however the tensor is cut, also in the middle of rows."""
    for rank in (1, 4, 7):
        tensors, record = low_rank(shape, rank, 1, turned=turned, lengths=lengths)
        expected = reference(tensors, record)
        files = stored(tensors, record)
        whole = adjusted(files, [record], math.prod(shape))
        np.testing.assert_allclose(whole, expected, rtol=2e-5, atol=2e-5)
        for step in (1 if expected.size < 100 else 977, 1024, shape[-1] * 3):
            np.testing.assert_array_equal(adjusted(files, [record], step), whole)
        exact = adjusted(files, [record], 500, np.float64)
        np.testing.assert_allclose(exact, expected, rtol=1e-12, atol=1e-12)


def test_factors_of_many_rows_are_turned_in_pieces() -> None:
    tensors, record = low_rank((70_000, 3), 2, 2, turned=True, lengths="columns")
    np.testing.assert_allclose(
        adjusted(stored(tensors, record), [record], 65_536), reference(tensors, record), atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 30)
)
def test_block_scales(rows: int, width: int, block_rows: int, block_width: int, stack: int, step: int) -> None:
    """Each element times the scale of its block, the last blocks being smaller."""
    rng = np.random.default_rng(rows * 100 + width)
    grid = (-(-rows // block_rows), -(-width // block_width))
    w = rng.normal(size=(stack, rows, width)).astype(np.float32)
    scales = rng.uniform(0.5, 2, (stack, *grid)).astype(np.float32)
    spread = np.repeat(np.repeat(scales, block_rows, 1)[:, :rows], block_width, 2)[:, :, :width]
    record = BlockScales(Factor("s", "F32"), grid, (block_rows, block_width))
    np.testing.assert_array_equal(adjusted({"w": w, "s": scales}, [record], step), w * spread)


def test_scales_come_before_an_adapter_and_count_in_its_lengths() -> None:
    tensors, record = low_rank((6, 8), 3, 3, turned=False, lengths="rows")
    tensors["s"] = np.array([[2.0, 0.5]], np.float32)
    scaled = tensors | {"w": tensors["w"] * np.repeat(tensors["s"], 4, 1)}
    found = adjusted(tensors, [BlockScales(Factor("s", "F32"), (1, 2), (6, 4)), record], 16)
    np.testing.assert_allclose(found, reference(scaled, record), rtol=1e-5, atol=1e-6)


def test_what_is_not_finite_is_found() -> None:
    tensors, record = low_rank((4, 4), 1, 0, turned=False)
    tensors["left"][2] = np.inf
    out = tensors["w"].reshape(-1).copy()
    assert adjuster(tensors, [record]).apply(0, out) == 8
    assert adjuster(tensors, [record]).apply(4, out[4:12].copy()) == 4


def test_released_memory_is_read_again() -> None:
    tensors, record = low_rank((4, 4), 2, 0, turned=False)
    found = adjuster(tensors, [record])
    first, second = tensors["w"].reshape(-1).copy(), tensors["w"].reshape(-1).copy()
    found.apply(0, first)
    found.release()
    found.apply(0, second)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("lengths", ["", "rows", "columns"])
def test_what_is_held_is_what_is_said(lengths: str) -> None:
    """The sum of the arrays that an adjuster has, and of what it takes to make them, is within the projection."""
    import tracemalloc

    tensors, record = low_rank((3000, 500), 64, 0, turned=True, lengths=lengths)
    files = stored(tensors, record)
    block = tensors["w"].reshape(-1)[:65_500].copy()
    adjuster(files, [record]).apply(0, block)  # compiles
    tracemalloc.start()
    adjuster(files, [record]).apply(0, block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak <= held_bytes([record], (3000, 500), 4) + 20_000
    assert held_bytes([], (3000, 500), 4) == 0


@pytest.mark.parametrize(("name", "kind"), [("F8_E4M3", ml_dtypes.float8_e4m3fn), ("F8_E5M2", ml_dtypes.float8_e5m2)])
def test_all_codes_of_8_bits(name: str, kind: Any) -> None:
    """Every code decodes to what ml_dtypes says; the first that is no number is found."""
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(kind).astype(np.float32)
    out = np.empty(256, np.float32)
    assert decode(codes, name, out) == int(np.argmax(~np.isfinite(expected)))
    np.testing.assert_array_equal(out, expected)
    finite = codes[np.isfinite(expected)]
    assert decode(finite, name, np.empty(finite.size, np.float32)) == -1
