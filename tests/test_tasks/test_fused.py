"""The one-pass loops give the bits of the general way, and say when they can't."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import product
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.tasks import convert, fused, fused_counts, fused_sums, kernels, select, windows
from mergepipe.tasks.blocks import block_bounds
from mergepipe.tasks.jit import _Kernel
from mergepipe.tasks.method import Accumulator, stored_sweep
from support.bits import as_bits, deltas, drawn, settings_for
from support.drive import load_tile, make_job, merge

MODELS = st.sampled_from([1, 3, 8])
NONE = np.empty((0, 8, 0))
"""Room for no pattern that is put aside."""
SIZES = st.sampled_from([1, 3, 63, 64, 65, 2047, 2048, 2049, 6151])


@given(SIZES, MODELS, st.integers(0, 1000))
def test_counting(size: int, models: int, seed: int) -> None:
    base, rows = drawn(size, models, seed)
    keys = deltas(base, rows)[1].view(np.int32) & 0x7FFFFFFF
    top = np.ones((models, select.TOP_BINS), np.int64)
    assert fused_counts.count_top(base, rows, np.array([0, size]), np.empty((1, models, 0)), top)
    lows, shifts = np.full((models, 2), -1), np.zeros((models, 2), np.int64)
    for k in range(models):
        np.testing.assert_array_equal(top[k] - 1, np.bincount(keys[k] >> 16, minlength=select.TOP_BINS))
        lows[k, k % 2] = keys[k, size // 2] >> 16 << 16
    fine = np.zeros((models, 2, select.FINE_BINS), np.int64)
    assert fused_counts.count_near(base, rows, lows, shifts, fine, NONE[:, :models])
    for k in range(models):
        wanted = keys[k][keys[k] >> 16 << 16 == lows[k, k % 2]] & 0xFFFF
        np.testing.assert_array_equal(fine[k, k % 2], np.bincount(wanted, minlength=select.FINE_BINS))
        assert not fine[k, 1 - k % 2].any()


@given(SIZES, MODELS, st.integers(0, 1000), st.lists(st.integers(1, 6150), max_size=3, unique=True))
def test_counting_with_norms(size: int, models: int, seed: int, inner: list[int]) -> None:
    """Of each block to the same bits as of its deltas; whatever stood in their place before."""
    base, rows = drawn(size, models, seed)
    edges = np.array([0, *sorted(edge for edge in inner if edge < size), size])
    sums, expected = np.full((len(edges) - 1, models, 2), np.nan), np.empty(2)
    counts, alone = np.zeros((2, models, select.TOP_BINS), np.int64)
    assert fused_counts.count_top(base, rows, edges, sums, counts)
    for block, k in np.ndindex(sums.shape[:2]):
        kernels.norms(deltas(base, rows)[1][k][edges[block] : edges[block + 1]], expected)
        np.testing.assert_array_equal(sums[block, k], expected)
    assert fused_counts.count_top(base, rows, np.array([0, size]), np.empty((1, models, 0)), alone)
    np.testing.assert_array_equal(counts, alone)


COUNTERS = st.sampled_from([64, windows.COUNTERS, select.FINE_BINS])


@given(SIZES, MODELS, st.integers(0, 1000), st.integers(0, 4), st.integers(0, 40), COUNTERS, st.integers(0, 9))
def test_windows(size: int, models: int, seed: int, shift: int, apart: int, counters: int, room: int) -> None:
    """Two of each model, which may overlap or be one; some are not wanted."""
    base, rows = drawn(size, models, seed)
    keys = deltas(base, rows)[1].view(np.int32) & 0x7FFFFFFF
    lows = np.array([[int(keys[k, size // 2]) >> 16 << 16] * 2 for k in range(models)])
    lows[:, 1] += apart << 16
    lows[np.random.default_rng(seed).random(lows.shape) < 0.2] = -1
    shifts = np.array([[shift, 4]] * models)
    found = np.zeros((models, 2, counters + 1), np.int64)
    aside = np.zeros((room, models, 2 * fused_counts.ASIDE))
    assert fused_counts.count_near(base, rows, lows, shifts, found, aside)
    for k, r in np.ndindex(lows.shape):
        own = aside[:, k, r * fused_counts.ASIDE : (r + 1) * fused_counts.ASIDE].ravel()
        if lows[k, r] < 0:
            assert not found[k, r].any()
            assert not own.any()
            continue
        places, within = keys[k].astype(np.int64) - lows[k, r], 1 << shifts[k, r]
        inside = places[(places >= 0) & (places < counters * within)]
        assert found[k, r, -1] == (places < 0).sum()
        others = inside[inside % within != 0]
        np.testing.assert_array_equal(own[: others.size], lows[k, r] + others[: own.size])
        assert not own[others.size :].any()
        counts, odd = found[k, r, :-1] % fused_counts.ODD, found[k, r, :-1] // fused_counts.ODD
        counted = np.concatenate([inside[inside % within == 0], others[own.size :]])
        np.testing.assert_array_equal(counts, np.bincount(counted // within, minlength=counters))
        expected = np.bincount(counted // within, counted % within != 0, minlength=counters) > 0
        np.testing.assert_array_equal(odd, expected)


def test_a_sample_is_of_every_column() -> None:
    """Of rows as wide as a strip, whatever lies at the same place of each."""
    base, rows = drawn(64 * fused_counts.STRIP, 1, 0)
    taken = np.zeros(fused_counts.STRIP, bool)
    for column in range(0, fused_counts.STRIP, fused_counts.PIECE):
        marked = rows[0].reshape(-1, fused_counts.STRIP).copy()
        marked[:, column : column + fused_counts.PIECE] = as_bits(1e30)
        counts = np.zeros((1, select.TOP_BINS), np.int64)
        assert fused_counts.sample_top(base, (marked.ravel(),), counts, np.empty(0))
        assert counts.sum() == base.size // 8
        taken[column : column + fused_counts.PIECE] = counts[0, (np.float32(1e30).view(np.int32) >> 16) - 2 :].sum() > 0
    assert taken.all()


LOOPS = list(product([1, 3, 8], [False, True], [False, True]))
"""Numbers of models, whether magnitudes have bounds, and whether deltas are scaled: two loops are compiled for each."""
PAIRS = [(models, bounded, scaled) for models, bounded, scaled in LOOPS if (bounded == scaled) == (models != 3)]
"""Whichever two of these go together, they do in one of those."""


@pytest.mark.parametrize(
    ("models", "bounded", "scaled"),
    [*PAIRS, *(pytest.param(*one, marks=pytest.mark.slow) for one in LOOPS if one not in PAIRS)],
)
@given(SIZES, st.integers(0, 1000), st.booleans(), st.booleans())
def test_agreeing_and_adding(
    models: int, bounded: bool, scaled: bool, size: int, seed: int, normalize: bool, ones: bool
) -> None:
    base, rows = drawn(size, models, seed)
    weights, least, factors = settings_for(models, seed)
    below, values = deltas(base, rows)
    merged, expected, found = np.empty(size, np.float32), np.empty(size, np.uint16), np.empty(size, np.uint16)
    most = None
    if bounded:
        # Bounds that elements lie on, or nothing is between; the general way takes off what is too large beforehand.
        places = np.random.default_rng(seed).integers(0, size, (2, models))
        least, most = (tuple(float(abs(row[i])) for row, i in zip(values, place, strict=True)) for place in places)
        for row, largest in zip(values, most, strict=True):
            row[np.abs(row) > largest] = 0
    if ones or not scaled:
        factors = (1.0,) * models
    scales = factors if scaled else None

    kernels.agree_few(below, tuple(values), weights, least, factors, normalize, 0.7, merged)
    convert.encode(merged, "BF16", expected)
    found.fill(1)
    assert fused.agree(base, rows, None, weights, least, most, scales, normalize, 0.7, found)
    np.testing.assert_array_equal(found, expected)

    for divisor in (1.0, 1.3):
        kernels.add_few(below, tuple(values), weights, least, factors, divisor, 0.7, merged)
        convert.encode(merged, "BF16", expected)
        found.fill(1)
        assert fused.add(base, rows, None, weights, least, most, scales, divisor, 0.7, found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("weight", [1.0, 0.5, fused.LEAST_FACTOR, 2.0, 0.3, -0.5])
@pytest.mark.parametrize("normalize", [True, False])
@given(SIZES, st.sampled_from([1, 3]), st.integers(0, 1000), st.sampled_from([1.0, -0.7, 0.0, 1e-30]), st.booleans())
def test_models_of_one_weight(
    weight: float, normalize: bool, size: int, models: int, seed: int, scale: float, everything: bool
) -> None:
    """Whether the loops multiply by it or not, down to the smallest of numbers; zero agrees with nobody."""
    base, rows = drawn(size, models, seed)
    small = np.random.default_rng(seed).integers(0, 4, (2, size)).astype(np.uint16)
    base[::3], rows[0][::3] = small[0, ::3], small[1, ::3]  # multiples of 2 ** -133
    weights, least = (weight,) * models, (0.0,) * models if everything else settings_for(models, seed)[1]
    below, values = deltas(base, rows)
    merged, expected, found = np.empty(size, np.float32), np.empty(size, np.uint16), np.empty(size, np.uint16)
    ones = (1.0,) * models
    kernels.agree_few(below, tuple(values), weights, least, ones, normalize, scale, merged)
    convert.encode(merged, "BF16", expected)
    assert fused.agree(base, rows, None, weights, least, None, None, normalize, scale, found)
    np.testing.assert_array_equal(found, expected)
    divisor = 1.3 if normalize else 1.0
    kernels.add_few(below, tuple(values), weights, least, ones, divisor, scale, merged)
    convert.encode(merged, "BF16", expected)
    assert fused.add(base, rows, None, weights, least, None, None, divisor, scale, found)
    np.testing.assert_array_equal(found, expected)


def test_a_scale_that_would_lose_digits() -> None:
    base, row, expected, out = as_bits([0.0]), as_bits([2e38]), np.empty(1, np.uint16), np.empty(1, np.uint16)
    merged, weights, scale = np.empty(1, np.float32), (fused.LEAST_FACTOR,), 1.31e-38
    below, values = deltas(base, (row,))
    kernels.add_few(below, tuple(values), weights, (0.0,), (1.0,), 1.0, scale, merged)
    convert.encode(merged, "BF16", expected)
    assert fused.add(base, (row,), None, weights, (0.0,), None, None, 1.0, scale, out)
    assert expected == out != as_bits([0.0])
    assert fused.agree(base, (row,), None, weights, (0.0,), None, None, False, scale, out)
    assert expected == out


def test_terms_that_vanish_are_for_the_general_way() -> None:
    """There they agree with nobody; the loops would count them."""
    for weights, factors in (((1e-6,), None), ((1e3,), (-1e-6,)), ((0.003,), (0.003,))):
        assert fused.vanishes(weights, factors)
    assert not fused.vanishes((0.0, fused.LEAST_FACTOR, -1.0), None)
    for method in ("ties", "task_arithmetic"):
        for weight in (1e-6, 1e-4):
            found, job = make_job(method, (4,), "f4", [{"weight": 1.0}, {"weight": weight}])
            assert (found.stored(job, {"thresholds": np.ones(2), "_factors": np.ones(2)}) is None) == (
                weight < fused.LEAST_FACTOR
            )


@pytest.mark.parametrize("marked", [False, True])
def test_loops_over_most_models_are_vectorised(marked: bool) -> None:
    """One that is not gives the same bits, 20 times slower."""
    words, models = np.zeros(64, np.int32), kernels.FEW
    ones = (1.0,) * models
    marks, most = (np.zeros(64, np.uint16), None) if marked else (None, ones)
    shared = words, (words,) * models, marks, words
    for loop, how, weights in ((fused._agree, True, ones), (fused._agree, True, None), (fused._add, 1.3, ones)):
        assert isinstance(loop, _Kernel)
        loop._made()  # sets the compiler up
        compiled = numba.njit(nogil=True, error_model="numpy")(loop._function)
        compiled(weights, ones, most, ones, how, 1.0, *shared)
        (code,) = compiled.inspect_llvm().values()
        assert re.search(r"fdiv <\d+ x float>", code)


_FEATURES = """
import numba, numpy as np
from mergepipe.tasks import fused_counts, jit
loop = fused_counts._magnitudes
loop._made()  # sets the compiler up
compiled = numba.njit(nogil=True, error_model="numpy")(loop._function)
compiled(np.zeros(64, np.uint16), np.zeros(64, np.uint16), np.zeros(64, np.int32))
features = numba.core.codegen.get_host_cpu_features()
print(features == jit.whole_vectors(features), *compiled.inspect_asm().values())
"""


def test_vectors_are_as_wide_as_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Ice Lake and later; LLVM by itself takes half of them. In a process of its own: the first loop decides."""
    for name in ("NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME", "NUMBA_ENABLE_AVX"):
        monkeypatch.delenv(name, raising=False)
    found = subprocess.run([sys.executable, "-c", _FEATURES], check=True, capture_output=True, text=True).stdout
    by_itself, code = found.split(" ", 1)
    if by_itself == "True":
        pytest.skip("no AVX512-VBMI2 on this machine")
    assert re.search(r"vsubps\s.*%zmm", code)


@pytest.mark.parametrize("size", [1, 2, 64, 3001])
@pytest.mark.parametrize("shifted", ["base", "row", "marks", "out"])
def test_what_does_not_lie_as_words_do(size: int, shifted: str) -> None:
    """A tensor behind one of an odd size begins anywhere."""
    base, rows = drawn(size, 2, 1)
    marks = np.random.default_rng(1).integers(0, 4, size, np.uint8)
    settings = ((0.4, -0.7), (0.001, 0.0), None, None)
    expected, added = np.empty(size, np.uint16), np.empty(size, np.uint16)
    assert fused.agree(base, rows, marks, *settings, True, 1.0, expected)
    assert fused.add(base, rows, marks, *settings, 1.0, 1.0, added)

    def moved(values: Any, name: str) -> Any:
        own = np.zeros(size + 3, values.dtype)
        start = -own.ctypes.data // own.itemsize % 2 + (name == shifted)
        own[start : start + size] = values
        return own[start : start + size]

    given = moved(base, "base"), tuple(moved(row, "row") for row in rows), moved(marks, "marks")
    for found in (moved(np.zeros(size, np.uint16), "out") for _ in range(2)):
        if size > 1:
            assert any(part.ctypes.data % (2 * part.itemsize) for part in (given[0], *given[1], given[2], found))
        around = np.asarray(found.base).copy()
        assert fused.agree(*given, *settings, True, 1.0, found)
        np.testing.assert_array_equal(found, expected)
        assert fused.add(*given, *settings, 1.0, 1.0, found)
        np.testing.assert_array_equal(found, added)
        assert (np.asarray(found.base) != around).sum() <= size


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kept", [(0.3, 0.1), (1.0, 0.1), (0.0, 0.1), (0.6, 0.0)])
@given(SIZES, MODELS, st.integers(0, 1000), st.booleans())
def test_crumbs_go_from_bits_to_bits(
    method: str, normalize: bool, kept: tuple[float, float], size: int, models: int, seed: int, rescale: bool
) -> None:
    """Of the first model; the others keep half and drop a few outliers."""
    base, rows = drawn(size, models, seed)
    below, own = np.empty(size, np.float32), [np.empty(size, np.float32) for _ in rows]
    for bits, values in zip((base, *rows), (below, *own), strict=True):
        convert.decode(bits, "BF16", values)
    each: list[dict[str, Any]] = [{"weight": 0.3, "density": 0.5, "gamma": 0.02} for _ in rows]
    each[0] = {"weight": -0.7, "density": kept[0], "gamma": kept[1], "rescale": rescale}
    params = {"normalize": normalize, "lambda": 0.7}
    merged = merge(method, own, below, each, params)
    found, job = make_job(method, (size,), "f4", each, params)
    run = found.stored(job, merged.state)
    assert run is not None
    expected, out = np.empty(size, np.uint16), np.empty(size, np.uint16)
    convert.encode(merged.out, "BF16", expected)
    assert run([base, *rows], out, (0, job.blocks))
    np.testing.assert_array_equal(out, expected)


def test_a_factor_beyond_the_working_type_is_for_the_general_way() -> None:
    found, job = make_job("breadcrumbs", (4,), "f4", [{"weight": 0.0, "density": 0.5, "rescale": True}])
    state = {"thresholds": np.ones(1), "_uppers": np.ones(1), "_breadcrumbs_factors": np.array([1e30])}
    assert found.stored(job, state) is not None
    assert found.stored(job, {**state, "_breadcrumbs_factors": np.array([1e300])}) is None


@given(SIZES, MODELS, st.integers(0, 1000))
def test_weighing(size: int, models: int, seed: int) -> None:
    _, rows = drawn(size, models, seed)
    weights = settings_for(models, seed)[0]
    values = np.empty((models, size), np.float32)
    for row, out in zip(rows, values, strict=True):
        convert.decode(row, "BF16", out)
    merged, expected, found = np.empty(size, np.float32), np.empty(size, np.uint16), np.empty(size, np.uint16)
    for divisor in (1.0, 1.1):
        kernels.sum_few(tuple(values), weights, divisor, merged)
        convert.encode(merged, "BF16", expected)
        assert fused.weigh(rows, weights, divisor, found)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "sparsify",
    [{"method": "magnitude", "density": 0.3}, {"method": "tadrop"}, {"method": "breadcrumbs", "density": 0.4}],
)
@pytest.mark.parametrize("models", [1, 3])
def test_sweeps_count_stored_bits_as_they_count_tiles(sparsify: dict[str, Any], models: int) -> None:
    """Every sweep that can do without tiles: exact thresholds, from the first histogram to the last."""
    base, rows = drawn(70_001, models, 3)
    below, own = np.empty(base.size, np.float32), [np.empty(base.size, np.float32) for _ in rows]
    for bits, values in zip((base, *rows), (below, *own), strict=True):
        convert.decode(bits, "BF16", values)
    method, job = make_job("ties", base.shape, "f4", [{"weight": 1.0} for _ in rows], sparsify=sparsify)
    state: dict[str, Any] = {}
    by_bits = 0
    for reduction in method.reductions(job):
        if not reduction.needed(job, state):
            continue
        shape, row = reduction.shapes(job)
        assert shape is not None
        assert row is None
        total, found = Accumulator(np.zeros(shape, np.int64)), np.zeros(shape, np.int64)
        for index in range(job.blocks):
            reduction.update(job, state, total, load_tile(method, job, own, below, index))
        stored = stored_sweep(reduction, job, state)
        assert stored is not None, reduction.name
        assert stored([base, *rows], Accumulator(found), (0, job.blocks))
        np.testing.assert_array_equal(found, total.counts)
        state |= reduction.combine(job, state, total)
        by_bits += 1
    assert by_bits == (3 if sparsify["method"] == "tadrop" else 2)
    assert (state["thresholds"] > 0).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2048, 3000])
@pytest.mark.parametrize("model", [-1, 0, 1])
def test_what_is_not_finite_is_not_done(bad: float, place: int, model: int) -> None:
    base, rows = drawn(3001, 2, 0)
    (base if model < 0 else rows[model])[place] = as_bits(bad)
    if model == 1:
        rows[0][place] = as_bits(-bad)  # the two cancel, or don't agree
    out = np.empty(3001, np.uint16)
    weights, zeros, ones = (0.0, 0.0), (0.0, 0.0), (1.0, 1.0)
    top = np.zeros((2, select.TOP_BINS), np.int64)
    assert not fused_counts.count_top(base, rows, np.array([0, 2500, 3001]), np.empty((2, 2, 2)), top)
    zero, counts = np.zeros((2, 1), np.int64), np.zeros((2, 1, select.FINE_BINS), np.int64)
    assert not fused_counts.count_near(base, rows, zero, zero, counts, NONE[:, :2])
    assert not fused.agree(base, rows, None, weights, (0.1, 0.1), ones, None, True, 1.0, out)
    assert not fused.add(base, rows, None, weights, (0.1, 0.1), ones, None, 1.0, 1.0, out)
    none, opposed = np.zeros(3001, np.uint8), (0.3, -0.7)
    for each, marks in ((weights, None), (weights, none), (opposed, None), (opposed, none), (ones, None)):
        assert not fused.agree(base, rows, marks, each, zeros, None, None, True, 1.0, out)
        assert not fused.add(base, rows, marks, each, zeros, None, None, 1.0, 1.0, out)
    for divisor in (1.0, 2.0, np.inf):
        assert fused.weigh(rows, weights, divisor, out) == (model < 0)


def test_what_does_not_fit_is_not_done() -> None:
    base, large = as_bits([0.0]), as_bits([3e38])
    out = np.empty(1, np.uint16)
    ones, zeros = (1.0, 1.0), (0.0, 0.0)
    assert not fused.weigh((large, large), ones, 1.0, out)
    assert not fused.agree(base, (large, large), None, ones, zeros, None, ones, False, 1.0, out)
    assert not fused.add(base, (large, large), None, ones, zeros, None, None, 1.0, 1.0, out)
    assert fused.weigh((large, large), (0.5, 0.5), 1.0, out)
    assert not fused.agree(base, (large,), None, (2.0,), (0.0,), None, None, True, 1.0, out)
    assert not fused.add(base, (large,), None, (2.0,), (0.0,), None, None, 2.0, 1.0, out)


def test_deltas_that_overflow_are_for_the_general_way() -> None:
    """Or add up to an infinity in both, where only norms are asked for."""
    large = np.full(3000, 0x7F7F, np.uint16)  # the largest finite bfloat16
    top, sums = np.zeros((1, select.TOP_BINS), np.int64), np.empty((1, 1, 2))
    assert fused_counts.count_top(large, (large ^ 0x8000,), np.array([0, 3000]), sums, top)
    assert np.isinf(sums).all()
    assert top[0, 0x7F80] == 3000
    counts = np.zeros((1, 1, windows.COUNTERS + 1), np.int64)
    low, shift = np.full((1, 1), 1000), np.zeros((1, 1), np.int64)
    assert fused_counts.count_near(large, (large,), low, shift, counts, NONE[:, :1])
    assert not fused_counts.count_near(large, (large ^ 0x8000,), low, shift, counts, NONE[:, :1])


@given(SIZES, st.integers(0, 1000))
def test_blending_and_dot_products(size: int, seed: int) -> None:
    base, (row,) = drawn(size, 1, seed)
    left, right = np.empty(size, np.float32), np.empty(size, np.float32)
    for bits, out in ((base, left), (row, right)):
        convert.decode(bits, "BF16", out)
    edges = np.array([0, size // 3, size])
    sums, found = np.empty((2, 3)), np.empty((2, 3))
    for block in range(2):
        part = slice(*edges[block : block + 2])
        kernels.dots(left[part], right[part], sums[block])
    assert fused_sums.dots(base, row, edges, found)
    np.testing.assert_array_equal(found, sums)
    merged, expected, blended = np.empty(size, np.float32), np.empty(size, np.uint16), np.empty(size, np.uint16)
    for a, b in ((0.3, 0.7), (1.0, 0.0), (-0.2, 1.4)):
        kernels.blend(left, right, a, b, merged)
        convert.encode(merged, "BF16", expected)
        assert fused.weigh((base, row), (a, b), 1.0, blended)
        np.testing.assert_array_equal(blended, expected)
    base[size // 2] = as_bits([np.inf])[0]
    assert not fused_sums.dots(base, row, edges, found)
    assert not fused.weigh((base, row), (0.0, 1.0), 1.0, blended)


@pytest.mark.parametrize("shape", [(5000,), (130, 1536), (2, 70_000)])
def test_slerp_goes_from_bits_to_bits(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    base, (row,) = drawn(size, 1, 7)
    method, job = make_job("slerp", shape, "f4", [{}], {"t": 0.3})
    values = [np.empty(size, np.float32) for _ in range(2)]
    for bits, out in zip((base, row), values, strict=True):
        convert.decode(bits, "BF16", out)
    whole = merge("slerp", [values[1].reshape(shape)], values[0].reshape(shape), params={"t": 0.3})
    dots = method.reductions(job)[0]
    body, total = stored_sweep(dots, job, {}), Accumulator(None, np.zeros((job.blocks, 3)))
    assert body is not None
    for index in range(job.blocks):
        part = slice(*block_bounds(shape, index))
        assert body([base[part], row[part]], total, (index, index + 1))
    state = dots.combine(job, {}, total)
    np.testing.assert_array_equal(state["dots"], whole.state["dots"])
    kernel, expected, found = method.stored(job, state), np.empty(size, np.uint16), np.empty(size, np.uint16)
    assert kernel is not None
    convert.encode(whole.out.reshape(-1), "BF16", expected)
    assert kernel([base, row], found, (0, job.blocks))
    np.testing.assert_array_equal(found, expected)
