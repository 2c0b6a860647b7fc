"""Random drops of stored bits give the bits of the general way, whatever the cut, and say when they can't."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.tasks import convert, fused, fused_sums, kernels, philox
from mergepipe.tasks.blocks import Blocks, block_bounds
from mergepipe.tasks.method import Accumulator, Job, MergeMethod, stored_sweep
from support.bits import U16, as_bits, deltas, drawn, settings_for
from support.drive import load_tile, make_job, merge

SIZES = st.sampled_from([1, 3, 63, 64, 65, 2047, 2048, 2049, 6151])
MODELS = st.sampled_from([1, 4, kernels.FEW])

Units = tuple[Blocks, ...]

UNITS: dict[tuple[int, ...], Units] = {
    (5, 30_001): ((0, 2), (2, 3)),
    (2, 70_001): ((0, 1), (1, 4)),
    (9, 65_536): ((0, 1), (1, 7), (7, 9)),
    (): ((0, 1),),
}
"""Shapes, and the blocks of their units: some begin at no multiple of four, one has more than are marked at once."""


@given(SIZES, MODELS, st.integers(0, 1000), st.booleans())
def test_agreeing_and_adding_what_stays(size: int, models: int, seed: int, normalize: bool) -> None:
    base, rows = drawn(size, models, seed)
    weights, least, factors = settings_for(models, seed)
    marks = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    below, values = deltas(base, rows)
    for k, row in enumerate(values):
        row[marks >> k & 1 == 0] = 0
    merged, expected, found = np.empty(size, np.float32), np.empty(size, np.uint16), np.empty(size, np.uint16)
    kernels.agree_few(below, tuple(values), weights, least, factors, normalize, 0.7, merged)
    convert.encode(merged, "BF16", expected)
    assert fused.agree(base, rows, marks, weights, least, None, factors, normalize, 0.7, found)
    np.testing.assert_array_equal(found, expected)
    for divisor in (1.0, 1.3):
        kernels.add_few(below, tuple(values), weights, least, factors, divisor, 0.7, merged)
        convert.encode(merged, "BF16", expected)
        assert fused.add(base, rows, marks, weights, least, None, factors, divisor, 0.7, found)
        np.testing.assert_array_equal(found, expected)


@given(SIZES, MODELS, st.integers(0, 1000))
def test_norms_of_blocks(size: int, models: int, seed: int) -> None:
    base, rows = drawn(size, models, seed)
    rng = np.random.default_rng(seed)
    marks = rng.integers(0, 256, size, np.uint8)
    edges = np.unique([0, *rng.integers(0, size, 2), size])
    found = np.empty((len(edges) - 1, 2, models, 2))
    assert fused_sums.norms_around(base, rows, marks, edges, found)
    values, expected = deltas(base, rows)[1], np.empty(2)
    for block, (start, stop) in enumerate(pairwise(edges)):
        for k, row in enumerate(values):
            kernels.norms(row[start:stop], expected)
            np.testing.assert_array_equal(found[block, 0, k], expected)
            kernels.norms(np.where(marks >> k & 1, row, np.float32(0))[start:stop], expected)
            np.testing.assert_array_equal(found[block, 1, k], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 2048, 3000])
@pytest.mark.parametrize("model", [-1, 0, 1])
def test_what_is_not_finite_is_not_done(bad: float, place: int, model: int) -> None:
    """Where it is dropped neither."""
    base, rows = drawn(3001, 2, 0)
    (base if model < 0 else rows[model])[place] = as_bits(bad)
    marks, out = np.zeros(3001, np.uint8), np.empty(3001, np.uint16)
    zeros, ones = (0.0, 0.0), (1.0, 1.0)
    assert not fused.agree(base, rows, marks, ones, zeros, None, ones, True, 1.0, out)
    assert not fused.add(base, rows, marks, ones, zeros, None, ones, 1.0, 1.0, out)
    assert not fused_sums.norms_around(base, rows, marks, np.array([0, 1000, 3001]), np.empty((2, 2, 2, 2)))


def test_what_does_not_fit_is_not_done() -> None:
    base, large, out = as_bits([0.0]), as_bits([3e38]), np.empty(1, np.uint16)
    ones, zeros, both, one = (1.0, 1.0), (0.0, 0.0), np.full(1, 3, np.uint8), np.full(1, 2, np.uint8)
    assert not fused.agree(base, (large, large), both, ones, zeros, None, ones, False, 1.0, out)
    assert not fused.add(base, (large, large), both, ones, zeros, None, ones, 1.0, 1.0, out)
    assert fused.add(base, (large, large), one, ones, zeros, None, ones, 1.0, 1.0, out)
    assert out == large


@pytest.mark.parametrize("shape", UNITS)
def test_marks_are_those_of_single_draws(shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    limits = [2**31, philox.ALL, 0, 2**30]
    _, job = make_job("ties", shape, "f4", [{"weight": 1.0}] * 4, seed=3)
    chance = philox.draw(job, limits)
    expected = np.zeros(size, np.uint8)
    for k, (key, limit) in enumerate(zip(chance.keys, limits, strict=True)):
        values = np.ones(size, np.float32)
        philox.drop_random(values, key, 0, limit)
        expected |= (values != 0).astype(np.uint8) << k
    for unit in UNITS[shape]:
        begin = block_bounds(shape, unit[0])[0]
        seen = begin
        for (first, after), part, marks in chance.marked(shape, unit):
            assert (begin + part.start, block_bounds(shape, after - 1)[1]) == (seen, begin + part.stop)
            assert block_bounds(shape, first)[0] == seen
            np.testing.assert_array_equal(marks, expected[seen : begin + part.stop])
            seen = begin + part.stop
        assert seen == block_bounds(shape, unit[1] - 1)[1]


def compare(method: MergeMethod, job: Job, base: U16, rows: tuple[U16, ...], units: Units) -> int:
    """Hold the ways over stored bits to the general ones; how many sweeps had one."""
    own = [np.empty(base.size, np.float32) for _ in (base, *rows)]
    for bits, values in zip((base, *rows), own, strict=True):
        convert.decode(bits, "BF16", values)
    state: dict[str, Any] = {}
    by_bits = 0
    for reduction in method.reductions(job):
        if not reduction.needed(job, state):
            continue
        counts, row = reduction.shapes(job)
        total, found = (
            Accumulator(
                None if counts is None else np.zeros(counts, np.int64),
                None if row is None else np.zeros((job.blocks, *row)),
            )
            for _ in range(2)
        )
        for index in range(job.blocks):
            reduction.update(job, state, total, load_tile(method, job, own[1:], own[0], index))
        sweep = stored_sweep(reduction, job, state)
        if sweep is not None and total.blocks is not None and found.blocks is not None:
            for unit in units:
                assert sweep([stream[span(job, unit)] for stream in (base, *rows)], found, unit)
            np.testing.assert_array_equal(found.blocks, total.blocks)
            if counts is not None:
                np.testing.assert_array_equal(found.counted, total.counted)
            by_bits += 1
        state |= reduction.combine(job, state, total)
    stored = method.stored(job, state)
    assert stored is not None
    out, expected = np.empty(base.size, np.uint16), np.empty(base.size, np.uint16)
    for unit in units:
        part = span(job, unit)
        assert stored([stream[part] for stream in (base, *rows)], out[part], unit)
    for index in range(job.blocks):
        start, stop = block_bounds(job.shape, index)
        merged = np.empty(stop - start, np.float32)
        method.kernel(job, state, load_tile(method, job, own[1:], own[0], index), merged)
        convert.encode(merged, "BF16", expected[start:stop])
    np.testing.assert_array_equal(out, expected)
    assert (out != base).any()
    return by_bits


def span(job: Job, unit: Blocks) -> slice:
    return slice(block_bounds(job.shape, unit[0])[0], block_bounds(job.shape, unit[1] - 1)[1])


@pytest.mark.parametrize("host", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("shape", UNITS)
@pytest.mark.parametrize("rescale", [{}, {"rescale": False}, {"rescale_by": "inverse_keep"}], ids=str)
def test_hosts(host: str, shape: tuple[int, ...], rescale: Mapping[str, Any]) -> None:
    base, rows = drawn(int(np.prod(shape)), 3, 7)
    each = [{"weight": w, "density": d} for w, d in ((0.4, 0.3), (-0.7, 0.8), (0.3, 1.0))]
    method, job = make_job(host, shape, "f4", each, {"normalize": True, "lambda": 1.1, **rescale}, seed=5)
    assert compare(method, job, base, rows, UNITS[shape]) == (0 if rescale else 1)


@pytest.mark.parametrize("host", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("models", [4, 5, kernels.FEW])
def test_more_models(host: str, models: int) -> None:
    shape = (5, 30_001)
    base, rows = drawn(5 * 30_001, models, 9)
    method, job = make_job(host, shape, "f4", [{"weight": 0.4, "density": 0.3 + 0.1 * k} for k in range(models)])
    assert compare(method, job, base, rows, UNITS[shape]) == 1


THINNED: list[list[dict[str, Any]]] = [
    [{"method": "random", "density": d, "rescale": r} for d, r in ((0.3, "l1"), (0.5, "inverse_keep"), (0.0, "l1"))],
    [{"method": "random", "density": d, "rescale": "none"} for d in (0.3, 0.5, 1.0)],
    [{"method": "tadrop", "drop": "random", "metric": "l1l2"}] * 3,
    [{"method": "tadrop", "drop": drop} for drop in ("random", "magnitude", "random")],
]


@pytest.mark.parametrize("host", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("sparsify", THINNED, ids=lambda given: "-".join(map(str, given[0].values())))
def test_sparsifiers(host: str, sparsify: list[dict[str, Any]]) -> None:
    shape = (5, 30_001)
    base, rows = drawn(5 * 30_001, 3, 8)
    method, job = make_job(host, shape, "f4", [{"weight": 0.6}] * 3, None, sparsify)
    assert compare(method, job, base, rows, UNITS[shape]) == bool({"l1", "l1l2"} & set(sparsify[0].values()))


@pytest.mark.parametrize(("host", "params", "sparsify", "models"), [
    ("dare_linear", {}, None, kernels.FEW + 1),
    ("dare_ties", {"consensus": "count"}, None, 2),
    ("dare_ties", {}, {"method": "random", "density": 0.5}, 2),
    ("dare_ties", {}, {"method": "magnitude", "density": 0.5}, 2),
    ("della", {}, None, 2),
], ids=str)  # fmt: skip
def test_what_has_no_short_way(host: str, params: dict[str, Any], sparsify: dict[str, Any] | None, models: int) -> None:
    each = [{"weight": 0.5, "density": 0.5}] * models
    method, job = make_job(host, (3, 5), "f4", each, params, sparsify)
    values = [np.arange(15, dtype="f4").reshape(3, 5) + k for k in range(models)]
    state = merge(host, values, np.zeros((3, 5), "f4"), each, params, sparsify).state
    assert method.stored(job, state) is None
    if host != "dare_linear" and params == {}:
        assert all(stored_sweep(sweep, job, {}) is None for sweep in method.reductions(job)[-1:])
