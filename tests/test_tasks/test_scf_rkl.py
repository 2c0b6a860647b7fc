"""SCF-RKL against its specification: the printed vectors, an extended-precision reference, and its properties."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import mergepipe
from mergepipe.errors import MemoryBudgetError, RecipeError
from mergepipe.pipeline.resume import decode_state, encode_state
from mergepipe.tasks import exponentials, points, row_sums, rows, scores, stored_rows
from mergepipe.tasks.method import Array
from mergepipe.tasks.select import TOP_BINS, count_top
from support.bits import as_stored
from support.drive import Merged, merge

A = np.array([[-0.5, -0.2, 0.1, 0.4], [0.0, 0.4, -0.3, 0.1], [0.5, -0.1, 0.4, -0.2]])
B = np.array([[-0.62, -0.18, 0.0, 0.44], [-0.06, 0.5, -0.3, 0.0], [0.5, -0.18, 0.5, -0.18]])
REVERSE = [0.0024026359, 0.0034334185, 0.0019697908]
FORWARD = [0.0024229209, 0.0034164493, 0.0019747192]
DELTA_KL = [
    [2.8831630426e-4, 4.8052717376e-5, 2.4026358688e-4, 9.6105434752e-5],
    [2.0600510995e-4, 3.4334184991e-4, 0, 3.4334184991e-4],
    [0, 1.5758326626e-4, 1.9697908282e-4, 3.9395816564e-5],
]
POINTWISE = [
    [6.4876793864e-4, 2.0518411754e-4, 7.4975938357e-4, 7.9892442905e-4],
    [3.7939180742e-4, 1.8961654608e-3, 1.9279366594e-7, 1.1576684372e-3],
    [7.4605653913e-5, 8.8947723913e-4, 1.0056006838e-3, 1.0725137608e-7],
]
WIDE = [(3, 70_001), (1, 152_064), (131_072,)]
SHAPES = [(), (1,), (5,), (7, 1), (40, 5), (3, 4, 50), (300, 129), (2, 40_000), (9, 8_000), *WIDE]


def reference_rows(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """Textbook divergences of rows, reverse and forward, and log(q / p): no noise in extended precision."""
    x, y = (np.atleast_1d(v).astype(np.longdouble) for v in (a, b))
    # The donor as the specification sees it: the primary plus a difference that is rounded to the working type.
    y = x + np.atleast_1d(b - a).astype(np.longdouble)
    log_p, log_q = (v - v.max(-1, keepdims=True) for v in (x, y))
    log_p, log_q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (log_p, log_q))
    ratio = log_q - log_p
    return (np.exp(log_q) * ratio).sum(-1), -(np.exp(log_p) * ratio).sum(-1), np.stack([log_p, ratio])


def weights_of(direction: str) -> tuple[float, float]:
    return {"reverse": (1.0, 0.0), "forward": (0.0, 1.0), "sym": (0.5, 0.5)}[direction]


def reference_scores(
    a: Array, b: Array, direction: str = "reverse", importance: str = "delta_kl", zero_kl: str = "skip"
) -> Array:
    reverse, forward, (log_p, ratio) = reference_rows(a, b)
    v, w = weights_of(direction)
    kl = (v * reverse + w * forward)[..., None]
    delta = np.abs(np.atleast_1d(b - a)).astype(np.longdouble)
    signed = np.atleast_1d(b - a)
    kl = np.where((signed == signed[..., :1]).all(-1, keepdims=True), 0, kl)
    if importance == "delta_kl":
        scores = delta * kl
    else:
        p, q = np.exp(log_p), np.exp(log_p + ratio)
        scores = np.where(kl == 0, 0, v * (q * ratio - q + p) + w * (p * -ratio - p + q))
    if zero_kl == "abs":
        scores = np.where(kl == 0, delta, scores)
    rounded: Array = scores.astype(np.float64)
    return rounded.reshape(np.shape(a))


def reference_mask(scores: Array, quantile: float) -> tuple[Array, float]:
    dropped = min(scores.size - 1, math.floor(quantile * scores.size + 1e-6))
    least = float(np.sort(scores.reshape(-1))[dropped])
    return (scores >= least) & (scores > 0), least


def taken(merged: Merged, a: Array, b: Array) -> Array:
    """Where the output is the donor's; every element is bitwise one's or the other's."""
    out, bits = merged.out, f"u{a.dtype.itemsize}"
    own, other = (out.view(bits) == v.view(bits) for v in (a, b))
    assert (own | other).all()
    found: Array = other & ~own
    return found


def agree(found: Array, scores: Array, expected: Array, least: float, tolerance: float) -> None:
    """Masks are equal but for scores that rounding may put on either side of the threshold."""
    sure = np.abs(scores - least) > tolerance * least
    np.testing.assert_array_equal(found[sure], expected[sure])


def fine_tune(shape: tuple[int, ...], work: str, seed: int = 0, step: float = 1e-3) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    a = np.asarray(rng.normal(0, 0.02, shape)).astype(work)
    return a, (a + np.asarray(rng.normal(0, step, shape)).astype(work) * (np.asarray(rng.random(shape)) < 0.9)).astype(
        work
    )


# -- the printed vectors


@pytest.mark.parametrize(("direction", "expected"), [("reverse", REVERSE), ("forward", FORWARD)])
def test_printed_divergences(direction: str, expected: list[float]) -> None:
    merged = merge("scf_rkl", [B], A, params={"direction": direction})
    np.testing.assert_allclose(merged.state["_rows_0"][0, :, 0], expected, atol=5.1e-11, rtol=0)
    assert merged.state["row_kl"][0] == pytest.approx(np.mean(expected), abs=1e-10)


def test_printed_scores() -> None:
    found, out = np.empty((3, 3)), np.empty(12)
    rows.measure_rows(A.ravel(), B.ravel(), 4, 1.0, 0.0, found)
    scores.score_delta(A.ravel(), B.ravel(), 4, found, False, out)
    np.testing.assert_allclose(out.reshape(3, 4), DELTA_KL, rtol=1e-10, atol=1e-19)
    points.score_points(A.ravel(), B.ravel(), 4, found, 1.0, 0.0, False, out)
    np.testing.assert_allclose(out.reshape(3, 4), POINTWISE, rtol=1e-10)
    np.testing.assert_allclose(out.reshape(3, 4).sum(1), found[:, 0], rtol=1e-12)


def test_printed_quantile() -> None:
    merged = merge("scf_rkl", [B], A, params={"quantile": 0.5})
    assert merged.state["thresholds"][0] == pytest.approx(1.96979082819723e-4, rel=1e-14)
    assert merged.state["densities"][0] == 0.5
    np.testing.assert_array_equal(merged.out, [[-0.62, -0.2, 0, 0.4], [-0.06, 0.5, -0.3, 0], [0.5, -0.1, 0.5, -0.2]])


def test_printed_iqr() -> None:
    merged = merge("scf_rkl", [B], A, params={"threshold": "iqr"})
    assert merged.state["thresholds"][0] == pytest.approx(4.5888492172917e-4, rel=1e-13)
    np.testing.assert_array_equal(merged.out, A)
    assert merged.state["densities"][0] == merged.state["kept_norms"][0] == 0


def test_printed_pointwise() -> None:
    merged = merge("scf_rkl", [B], A, params={"quantile": 0.5, "importance": "pointwise"})
    mask = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]], bool)
    np.testing.assert_array_equal(merged.out, np.where(mask, B, A))


# -- the reference


def test_the_exponential() -> None:
    x = np.concatenate([np.linspace(-699, 30, 3001), np.geomspace(1e-300, 1, 301), -np.geomspace(1e-300, 1, 301)])
    parts = np.array([exponentials.grow((v, v, v, v)) for v in x.tolist()])
    power, rest, q = parts[:, 0, 0], parts[:, 1, 0], parts[:, 2, 0]
    np.testing.assert_allclose(power * (rest + q) + (power - 1.0), np.expm1(x), rtol=1e-15)
    np.testing.assert_allclose([exponentials.exp((v, v, v, v))[0] for v in x.tolist()], np.exp(x), rtol=1e-15)


def test_exponentials_of_small_and_middling_numbers() -> None:
    x = np.concatenate([np.linspace(-1, 1, 2001), np.geomspace(1e-300, 1, 301), -np.geomspace(1e-300, 1, 301)])
    found = [exponentials.small_expm1((v,) * 4, (v * v,) * 4)[0] for v in x.tolist()]
    np.testing.assert_allclose(found, np.expm1(x), rtol=2e-14)
    x = np.linspace(-exponentials.WIDEST, exponentials.WIDEST, 4001)
    found = [exponentials.raised((v,) * 4)[0] for v in x.tolist()]
    np.testing.assert_allclose(found, np.exp(x), rtol=4e-14)
    assert exponentials.raised((0.0,) * 4)[0] == 1.0


@pytest.mark.parametrize("direction", ["reverse", "forward", "sym"])
@pytest.mark.parametrize("work", ["f4", "f8"])
@pytest.mark.parametrize("step", [1e-6, 1e-3, 0.1, 3.0, 300.0])
@pytest.mark.parametrize("shape", [(5, 300), (2, 70_001)])
def test_divergences(shape: tuple[int, ...], step: float, work: str, direction: str) -> None:
    a, b = fine_tune(shape, work, step=step)
    found = merge("scf_rkl", [b], a, params={"direction": direction}).state["_rows_0"][0, :, 0]
    reverse, forward, _ = reference_rows(a, b)
    v, w = weights_of(direction)
    # The reference rounds at 1e-19 of log(p), which is about 10.
    np.testing.assert_allclose(found, np.asarray(v * reverse + w * forward, np.float64), rtol=1e-9, atol=2e-18)


def close_rows(width: int, step: float, reach: float, mean: float = 0.0, limit: float = 1 / 33) -> tuple[Array, Array]:
    """Rows of float32 with weights up to `reach`, and differences around `mean`, up to `limit`."""
    rng = np.random.default_rng(width)
    a = np.clip(rng.normal(0, reach / 3, (6, width)), -reach, reach).astype("f4")
    a[:, 0] = reach
    d = np.clip(rng.normal(mean, step, a.shape), -limit, limit)
    if limit > 1 / 32:
        d[:, -1] = limit
    return a, (a + d).astype("f4")


@pytest.mark.parametrize("direction", ["reverse", "forward", "sym"])
@pytest.mark.parametrize("step", [1e-6, 1e-4, 1e-3, 0.05])
@pytest.mark.parametrize("reach", [0.03, 1.0])
@pytest.mark.parametrize("width", [64, 255, 257, 4096])
@pytest.mark.parametrize(("limit", "kind"), [(1 / 33, row_sums.CLOSE), (1 / 8.1, row_sums.LOOSE)])
def test_divergences_of_close_rows(
    limit: float, kind: int, width: int, reach: float, step: float, direction: str
) -> None:
    """And loose ones, whose series is longer."""
    assert rows.kind_of(reach, limit) == kind
    a, b = close_rows(width, step, reach, limit=limit)
    reverse, forward, _ = reference_rows(a, b)
    v, w = weights_of(direction)
    found = np.empty((6, 3))
    energy = rows.measure_rows(a.ravel(), b.ravel(), width, v, w, found)
    expected = np.asarray(v * reverse + w * forward, np.float64)
    np.testing.assert_allclose(found[:, 0], expected, rtol=2e-12, atol=2e-18)
    assert energy == pytest.approx(float(np.square((b - a).astype("f8")).sum()), rel=1e-13)
    # What makes them close is no more than that: with one weight beyond the limit the others are measured the long way.
    if step < 0.05:
        outside = np.float32(1.01)
        longer = [np.concatenate([x, np.full((6, 1), outside, "f4")], 1) for x in (a, b)]
        long_way = np.empty((6, 1))
        rows.measure_rows(longer[0].ravel(), longer[1].ravel(), width + 1, v, w, long_way)
        x, y, _ = reference_rows(*longer)
        np.testing.assert_allclose(long_way[:, 0], np.asarray(v * x + w * y, np.float64), rtol=1e-9, atol=2e-18)


def rows_of_a_kind(width: int, reach: float, largest: float) -> tuple[Array, Array]:
    """Rows of float32 with weights up to `reach`, and differences up to `largest`, both of which are there."""
    rng = np.random.default_rng(width)
    a, d = (np.clip(rng.normal(0, limit / 3, (4, width)), -limit, limit) for limit in (reach, largest))
    a[:, -1], d[:, 0] = reach, largest
    a = a.astype("f4")
    return a, (a + d).astype("f4")


DIRECTIONS = ("reverse", "forward", "sym")
WIDTHS, REACHES = (5, 63, 64, 257, 1100), (0.5, 3.0, 15.0, 60.0, 250.0, 700.0)
LARGEST = (0.03, 0.12, 0.5, 0.99, 7.0, 250.0, 700.0)
EVERY_KIND = [
    pytest.param(width, reach, largest, direction, marks=[pytest.mark.slow] * ((i + j + k) % 3 != turn))
    for (i, width), (j, reach), (k, largest) in product(*map(enumerate, (WIDTHS, REACHES, LARGEST)))
    for turn, direction in enumerate(DIRECTIONS)
]
"""Each kind in one direction, in turn, so that any two meet; the others weigh the same sums otherwise, and are slow."""


@pytest.mark.parametrize(("width", "reach", "largest", "direction"), EVERY_KIND)
def test_divergences_of_every_kind(width: int, reach: float, largest: float, direction: str) -> None:
    a, b = rows_of_a_kind(width, reach, largest)
    v, w = weights_of(direction)
    reverse, forward, (log_p, ratio) = reference_rows(a, b)
    found = np.empty((4, 3))
    rows.measure_rows(a.ravel(), b.ravel(), width, v, w, found)
    expected = np.asarray(v * reverse + w * forward, np.float64)
    # What is taken from each other is as large as the differences, and a 128th power rounds as often.
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-11, atol=1e-14 * max(1.0, largest))
    d = (b - a).astype(np.longdouble)
    np.testing.assert_allclose(found[:, 1], (a - log_p)[:, -1].astype(float), rtol=1e-11)
    np.testing.assert_allclose(found[:, 2], (d - ratio)[:, -1].astype(float), rtol=1e-11, atol=1e-11)
    scored, p, q = np.empty(a.size, "f4"), np.exp(log_p), np.exp(log_p + ratio)
    points.score_points(a.ravel(), b.ravel(), width, found, v, w, False, scored)
    exact = v * (q * ratio - q + p) + w * (p * -ratio - p + q)
    np.testing.assert_allclose(scored.reshape(4, width), exact.astype(float), rtol=1e-6, atol=1e-12)


def test_donors_of_every_kind_are_measured_together_as_alone() -> None:
    width = 1100
    a, _ = rows_of_a_kind(width, 3.0, 1.0)
    a[1] *= 0.1
    a[2] *= 200
    a[3] = 0.25
    donors = [a + (rows_of_a_kind(width, 3.0, largest)[1] - a) for largest in (0.0, 0.02, 0.8, 7.0, 30.0, 250.0, 600.0)]
    donors.append(a + np.float32(0.5))
    stored = [as_stored((v.view("u4") >> 16).astype("u2")) for v in (a.ravel(), *(b.ravel() for b in donors))]
    x, *others = [(v.astype("u4") << 16).view("f4") for v in stored]
    found, counts = np.empty((1, len(donors), 4 + 1)), np.zeros((len(donors), TOP_BINS), np.int64)
    how = width, 4 * width, 0.5, 0.5, False
    assert stored_rows.measure_and_count(stored[0], tuple(stored[1:]), *how, found, counts)
    uncounted = np.empty_like(found)
    no_counts = np.empty((len(donors), 0), np.int64)
    assert stored_rows.measure_and_count(stored[0], tuple(stored[1:]), *how, uncounted, no_counts)
    np.testing.assert_array_equal(uncounted, found)
    for own, counted, y in zip(found[0], counts, others, strict=True):
        alone, scored, expected = np.empty((4, 1)), np.empty_like(x), np.zeros(TOP_BINS, np.int64)
        energy = rows.measure_rows(x, y, width, 0.5, 0.5, alone)
        assert own.tobytes() == np.append(alone.ravel(), energy).tobytes()
        scores.score_delta(x, y, width, alone, False, scored)
        count_top(scored, expected)
        np.testing.assert_array_equal(counted, expected)


@pytest.mark.parametrize("mean", [0.001, 0.02])
@pytest.mark.parametrize("step", [0.0, 1e-6, 1e-3, 0.004])
def test_rows_that_moved_as_a_whole(step: float, mean: float) -> None:
    """What all elements of a row have moved by cancels, however small the rest."""
    a, b = close_rows(1024, step, 0.1, mean)
    found = np.empty((6, 3))
    rows.measure_rows(a.ravel(), b.ravel(), 1024, 1.0, 0.0, found)
    np.testing.assert_allclose(found[:, 0], np.asarray(reference_rows(a, b)[0], np.float64), rtol=1e-9, atol=2e-18)
    exact = np.full_like(a, 0.5)
    rows.measure_rows(exact.ravel(), (exact + np.float32(1 / 64)).ravel(), 1024, 1.0, 0.0, found)
    assert not found[:, 0].any()


@pytest.mark.parametrize("work", ["f4", "f8"])
@pytest.mark.parametrize("importance", ["delta_kl", "pointwise"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape: tuple[int, ...], importance: str, work: str) -> None:
    a, b = fine_tune(shape, work)
    merged = merge("scf_rkl", [b], a, params={"importance": importance, "quantile": 0.8})
    scores = reference_scores(a, b, importance=importance)
    mask, least = reference_mask(scores, 0.8)
    found = taken(merged, a, b)
    agree(found, scores, mask, least, 1e-6 if work == "f4" else 1e-11)
    if merged.sweeps:
        assert merged.state["densities"][0] == found.sum() / found.size
        delta = (b - a).astype("f8")
        whole = np.linalg.norm(delta.ravel())
        kept = np.linalg.norm((delta * found).ravel()) / whole if whole else 0
        assert merged.state["kept_norms"][0] == pytest.approx(kept, rel=1e-9)


@pytest.mark.parametrize("shape", [(200, 130), (2, 70_001)])
@pytest.mark.parametrize("importance", ["delta_kl", "pointwise"])
@pytest.mark.parametrize("direction", ["forward", "sym"])
def test_every_direction(direction: str, importance: str, shape: tuple[int, ...]) -> None:
    a, b = fine_tune(shape, "f4", step=0.3)
    merged = merge("scf_rkl", [b], a, params={"importance": importance, "direction": direction})
    scores = reference_scores(a, b, direction, importance)
    agree(taken(merged, a, b), scores, *reference_mask(scores, 0.9), 1e-6)


def test_iqr() -> None:
    a, b = fine_tune((300, 129), "f4")
    merged = merge("scf_rkl", [b], a, params={"threshold": "iqr"})
    scores = reference_scores(a, b).astype("f4").astype("f8")
    ranked = np.sort(scores.ravel())
    low, middle, high = (ranked[int(p * (scores.size - 1))] for p in (0.25, 0.5, 0.75))
    least = middle + 1.5 * (high - low)
    assert merged.state["thresholds"][0] == pytest.approx(least, rel=1e-6)
    found = taken(merged, a, b)
    agree(found, scores, scores >= least, least, 1e-6)
    assert merged.state["densities"][0] == found.mean()


def test_sweeps_are_those_of_the_specification() -> None:
    """Row statistics and the first count in one read, the second count in another; then the kernel's."""
    a, b = fine_tune((50, 200), "f4")
    assert len(merge("scf_rkl", [b], a).sweeps) == 2
    a, b = fine_tune((2, 70_000), "f4")
    assert len(merge("scf_rkl", [b], a).sweeps) == 4


# -- properties


@st.composite
def pairs(draw: Any) -> tuple[Array, Array]:
    """Fine-tunes, some on so coarse a grid that scores tie and vanish; with negative zeros and subnormals."""
    shape = draw(st.sampled_from([(1,), (9,), (4, 1), (6, 7), (2, 3, 5), (33, 65), (1, 66_000)]))
    work = draw(st.sampled_from(["f4", "f8"]))
    a, b = fine_tune(shape, work, seed=draw(st.integers(0, 99)), step=draw(st.sampled_from([1e-3, 0.1])))
    if draw(st.booleans()):
        a, b = np.round(a * 64) / 64, np.round(b * 16) / 16
    for v in (a, b):
        v.reshape(-1)[::5] = draw(st.sampled_from([0.0, -0.0, float(np.finfo(work).smallest_subnormal), 0.5]))
    return a.astype(work), b.astype(work)


@given(pair=pairs(), quantile=st.sampled_from([0.0, 0.3, 0.9]), tie_rule=st.sampled_from(["keep", "index"]))
def test_the_output_is_a_mixture_of_stored_values(pair: tuple[Array, Array], quantile: float, tie_rule: str) -> None:
    a, b = pair
    merged = merge("scf_rkl", [b], a, params={"quantile": quantile, "tie_rule": tie_rule})
    found = taken(merged, a, b)
    if not merged.sweeps:
        assert not found.any()
        return
    assert found.sum() == round(float(merged.state["densities"][0]) * a.size)
    scores = reference_scores(a, b).astype(a.dtype)  # differences of subnormals leave no score
    dropped = min(a.size - 1, math.floor(quantile * a.size + 1e-6))
    positive = int((scores > 0).sum())
    if tie_rule == "index":
        assert found.sum() == min(a.size - dropped, positive)
    elif len(np.unique(scores)) == a.size and positive == a.size:
        assert found.sum() == a.size - dropped
    else:
        assert found.sum() >= min(a.size - dropped, positive)
    delta = (b - a).astype("f8").ravel()
    whole = np.linalg.norm(delta)
    kept = np.linalg.norm(delta * found.ravel()) / whole if whole else 0
    assert merged.state["kept_norms"][0] == pytest.approx(kept, rel=1e-9)


@given(pair=pairs(), tie_rule=st.sampled_from(["keep", "index"]))
def test_a_quantile_of_zero_takes_every_positive_score(pair: tuple[Array, Array], tie_rule: str) -> None:
    a, b = pair
    found = taken(merge("scf_rkl", [b], a, params={"quantile": 0.0, "tie_rule": tie_rule}), a, b)
    np.testing.assert_array_equal(found, reference_scores(a, b).astype(a.dtype) > 0)


@given(pair=pairs())
def test_a_donor_that_is_the_primary_changes_nothing(pair: tuple[Array, Array]) -> None:
    a, _ = pair
    for params in ({}, {"quantile": 0.0}, {"zero_kl": "abs"}, {"threshold": "iqr"}, {"importance": "pointwise"}):
        merged = merge("scf_rkl", [a.copy()], a, params=params)
        assert merged.out.tobytes() == a.tobytes()
        if merged.sweeps:
            assert merged.state["densities"][0] == merged.state["kept_norms"][0] == 0


@given(pair=pairs(), constant=st.sampled_from([-0.5, 0.25, 8.0]))
def test_a_constant_on_a_row_of_both_changes_nothing(pair: tuple[Array, Array], constant: float) -> None:
    a, b = (np.round(v * 1024) / 1024 for v in pair)
    before, after = (
        merge("scf_rkl", [y], x) for x, y in ((a, b), (a + a.dtype.type(constant), b + b.dtype.type(constant)))
    )
    scores = reference_scores(a, b)
    least = float(before.state["thresholds"][0]) if before.sweeps else 0.0
    sure = np.abs(scores - least) > 1e-6 * least
    np.testing.assert_array_equal((before.out != a)[sure], (after.out != a + a.dtype.type(constant))[sure])


@given(pair=pairs(), constant=st.sampled_from([-0.5, 0.25]))
def test_a_row_that_moves_as_a_whole_is_never_taken(pair: tuple[Array, Array], constant: float) -> None:
    a = np.round(pair[0] * 1024) / 1024
    b = a + a.dtype.type(constant)
    assert merge("scf_rkl", [b], a, params={"quantile": 0.0}).out.tobytes() == a.tobytes()
    moved = merge("scf_rkl", [b], a, params={"quantile": 0.0, "zero_kl": "abs"})
    assert moved.out.tobytes() == b.tobytes()


@given(pair=pairs())
def test_primary_and_donor_are_not_alike(pair: tuple[Array, Array]) -> None:
    """Whoever is primary keeps what is not taken: together the two outputs hold each element's pair."""
    a, b = pair
    ours, theirs = merge("scf_rkl", [b], a).out, merge("scf_rkl", [a], b).out
    if a.size > 30 and np.count_nonzero(reference_scores(a, b)) > a.size // 2:
        assert ours.tobytes() != theirs.tobytes()


def test_a_factor_on_all_scores_changes_no_mask() -> None:
    """In a tensor of one row the divergence is such a factor: what counts is the size of the difference."""
    a, b = fine_tune((900,), "f8")
    found = taken(merge("scf_rkl", [b], a, params={"quantile": 0.7}), a, b)
    np.testing.assert_array_equal(found, np.abs(b - a) >= np.sort(np.abs(b - a))[630])


def test_divergence_is_half_the_variance_of_small_differences() -> None:
    rng = np.random.default_rng(4)
    a = rng.normal(0, 0.02, (64, 4096)).astype("f4")
    b = a + rng.normal(0, 0.001, a.shape).astype("f4")
    for direction in ("reverse", "forward"):
        found = merge("scf_rkl", [b], a, params={"direction": direction}).state["_rows_0"][0, :, 0]
        np.testing.assert_allclose(found / ((b - a).astype("f8").var(-1) / 2), 1, atol=0.01)


def test_huge_weights_have_a_divergence_too() -> None:
    a = np.array([[3e38, 0, -3e38, 1], [1e4, -1e4, 0, 0], [0, 0, 0, 0]], "f4")
    b = np.array([[3e38, 1, -3e38, 0], [-1e4, 1e4, 0, 1], [3e38, -3e38, 1, 2]], "f4")
    merged = merge("scf_rkl", [b], a, params={"quantile": 0.0})
    kl = merged.state["_rows_0"][0, :, 0]
    assert np.isfinite(kl).all()
    assert kl[1] == pytest.approx(2e4)
    assert taken(merged, a, b)[1].tolist() == [True, True, False, True]
    overflowing = merge("scf_rkl", [-a], a, params={"quantile": 0.0}).state["_rows_0"][0, :, 0]
    assert overflowing[0] == 0


@pytest.mark.parametrize("scale", [0.5, -1.0, 2.0])
def test_scale(scale: float) -> None:
    a, b = fine_tune((30, 40), "f4")
    found = taken(merge("scf_rkl", [b], a), a, b)
    out = merge("scf_rkl", [b], a, params={"scale": scale}).out
    np.testing.assert_array_equal(out, np.where(found, a + np.float32(scale) * (b - a), a))


@pytest.mark.parametrize(
    ("params", "fused"),
    [({"exclude": ["norm", "bias"]}, True), ({"exclude": [r"layer\."]}, False), ({"include": ["lm_head"]}, False),
     ({"include": ["weight$"]}, True), ({"include": ["weight"], "exclude": ["^layer"]}, False)],
)  # fmt: skip
def test_excluded_tensors_are_the_primary(params: dict[str, Any], fused: bool) -> None:
    a, b = fine_tune((30, 40), "f4")
    merged = merge("scf_rkl", [b], a, params=params)
    assert bool(merged.sweeps) is fused
    assert (merged.out.tobytes() != a.tobytes()) is fused


def test_excluded_tensors_can_be_averaged() -> None:
    a, first = fine_tune((30, 40), "f4")
    second = fine_tune((30, 40), "f4", seed=5)[1]
    params = {"exclude": ["layer"], "excluded_from": "average"}
    merged = merge("scf_rkl", [first, second], a, params=params)
    assert not merged.sweeps
    expected = a.astype("f8") + ((first - a).astype("f8") + (second - a)) / 2
    np.testing.assert_allclose(merged.out, expected, rtol=1e-6, atol=1e-8)


# -- several donors


@pytest.mark.parametrize("shape", [(40, 65), (2, 70_001)])
def test_the_highest_score_wins(shape: tuple[int, ...]) -> None:
    a, first = fine_tune(shape, "f8")
    donors = [first, *(a + np.random.default_rng(s).normal(0, 1e-3, shape) for s in (5, 6))]
    params = {"quantile": 0.5}
    alone = [merge("scf_rkl", [b], a, params=params).out for b in donors]
    scores = np.array([np.where(out != a, reference_scores(a, b), 0) for out, b in zip(alone, donors, strict=True)])
    expected = np.where(scores.max(0) > 0, np.choose(scores.argmax(0), donors), a)
    assert merge("scf_rkl", donors, a, params=params).out.tobytes() == expected.tobytes()
    # The order of the donors is immaterial but for ties.
    assert merge("scf_rkl", donors[::-1], a, params=params).out.tobytes() == expected.tobytes()


def test_the_lowest_donor_wins_a_tie() -> None:
    merged = merge("scf_rkl", [B, B + 0.0, B], A, params={"quantile": 0.5})
    assert merged.out.tobytes() == merge("scf_rkl", [B], A, params={"quantile": 0.5}).out.tobytes()
    a, b = np.zeros((1, 4)), np.array([[1.0, -1.0, 0.0, 0.0]])
    out = merge("scf_rkl", [b, -b], a, params={"quantile": 0.0}).out
    np.testing.assert_array_equal(out, b)


@pytest.mark.parametrize("shape", [(40, 65), (2, 70_001)])
@pytest.mark.parametrize(
    "params",
    [{}, {"importance": "pointwise"}, {"threshold": "iqr"}, {"tie_rule": "index", "quantile": 0.5}, {"scale": 0.5}],
)
@pytest.mark.parametrize("work", ["f4", "f8"])
def test_fold_is_one_merge_after_another(shape: tuple[int, ...], params: dict[str, Any], work: str) -> None:
    a, first = fine_tune(shape, work)
    coarse = np.round(np.random.default_rng(7).normal(0, 1e-3, shape) * 2**12) / 2**12
    donors = [first, (a + coarse).astype(work), fine_tune(shape, work, seed=8)[1]]
    expected, densities = a, []
    for b in donors:
        step = merge("scf_rkl", [b], expected, params=params)
        densities.append(step.state["densities"][0])
        expected = step.out
    merged = merge("scf_rkl", donors, a, params={**params, "multi": "fold"})
    assert merged.out.tobytes() == expected.tobytes()
    np.testing.assert_array_equal(merged.state["densities"], densities)


# -- how it is done does not show


@pytest.mark.parametrize("multi", ["winner", "fold"])
@pytest.mark.parametrize("tie_rule", ["keep", "index"])
@pytest.mark.parametrize("shape", [(4, 30_000), (3, 70_001)])
def test_order_and_workers_change_no_bit(shape: tuple[int, ...], tie_rule: str, multi: str) -> None:
    a, first = fine_tune(shape, "f4")
    grid = (a + np.round(np.random.default_rng(1).normal(0, 1e-3, shape) * 512) / 512).astype("f4")
    params = {"tie_rule": tie_rule, "multi": multi, "quantile": 0.6}
    one = merge("scf_rkl", [first, grid], a, params=params)
    other = merge("scf_rkl", [first, grid], a, params=params, order=3, workers=3)
    assert one.out.tobytes() == other.out.tobytes()
    assert {name: value.tobytes() for name, value in one.state.items()} == {
        name: value.tobytes() for name, value in other.state.items()
    }


@pytest.mark.parametrize("multi", ["winner", "fold"])
@pytest.mark.parametrize("params", [{}, {"tie_rule": "index"}, {"threshold": "iqr"}, {"importance": "pointwise"}])
@pytest.mark.parametrize("shape", [(70, 900), (2, 70_001)])
def test_a_state_from_the_journal_is_all_a_kernel_needs(
    shape: tuple[int, ...], params: dict[str, Any], multi: str
) -> None:
    a, first = fine_tune(shape, "f4")
    donors = [first, (a + np.round(np.random.default_rng(1).normal(0, 1e-3, shape) * 512) / 512).astype("f4")]
    one = merge("scf_rkl", donors, a, params={**params, "multi": multi})
    for value in one.state.values():
        value.setflags(write=False)  # workers share it
    kept = decode_state(encode_state(one.state))
    other = merge("scf_rkl", donors, a, params={**params, "multi": multi}, state=kept)
    assert other.sweeps == []
    assert other.out.tobytes() == one.out.tobytes()
    assert all(value.shape == (2,) for name, value in one.state.items() if not name.startswith("_"))
    assert set(one.state) >= {"thresholds", "densities", "row_kl", "kept_norms"}


DTYPES = ["BF16", "F16", "F32", "F64"]


def stored(dtype: str, shape: tuple[int, ...], seed: int) -> Any:
    """Bits as a checkpoint holds them: small numbers, negative zeros, subnormals, the largest ones."""
    import torch

    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}[dtype]
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    value = (base + torch.randn(shape, generator=generator) * 0.002 * (seed > 0)).to(kind)
    tiny = torch.finfo(kind).smallest_normal
    odd = torch.tensor([-0.0, 0.0, tiny / 2, -tiny / 4, tiny, -1.0], dtype=kind)
    flat = value.view(-1)
    at = torch.randint(0, flat.numel(), (flat.numel() // 10,), generator=generator)
    flat[at] = odd[torch.randint(0, len(odd), at.shape, generator=generator)]
    return value


@pytest.mark.parametrize("multi", ["winner", "fold"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_hold_the_bits_of_one_or_the_other(dtype: str, multi: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    shapes = {"a.weight": (37, 53), "b.weight": (2, 66_001), "c.bias": (301,), "d.experts": (3, 5, 40), "e.scale": ()}
    models = []
    for seed in range(3):
        folder = tmp_path / f"model-{seed}"
        folder.mkdir()
        models.append({name: stored(dtype, shape, seed) for name, shape in shapes.items()})
        save_file(models[-1], folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "tiny"}')
    recipe: dict[str, Any] = {
        "merge_method": "scf_rkl", "base_model": str(tmp_path / "model-0"),
        "models": [{"model": str(tmp_path / f"model-{seed}")} for seed in (1, 2)],
        "parameters": {"quantile": 0.5, "multi": multi},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    mergepipe.run(tmp_path / "work", workers=2)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    bits = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32, "F64": torch.int64}[dtype]
    for name, shape in shapes.items():
        assert merged[name].dtype == models[0][name].dtype
        own, *others = (merged[name].view(bits) == model[name].view(bits) for model in models)
        assert (own | others[0] | others[1]).all()
        if shape:
            assert (~own).any()
            assert own.any()
        work = "f8" if dtype == "F64" else "f4"
        a, *donors = (np.asarray(model[name].to(torch.float64).numpy(), work) for model in models)
        expected = merge("scf_rkl", donors, a, params=recipe["parameters"]).out
        assert merged[name].to(torch.float64).numpy().tobytes() == expected.astype("f8").tobytes()


OPTIONS: dict[str, dict[str, Any]] = {
    "winner": {},
    "fold": {"parameters": {"multi": "fold", "scale": 0.5}},
    "iqr": {"parameters": {"threshold": "iqr", "direction": "sym"}},
    "index": {"parameters": {"tie_rule": "index", "quantile": 0.5}},
    "pointwise": {"parameters": {"importance": "pointwise", "zero_kl": "abs"}},
    "model": {"scope": "model", "parameters": {"multi": "fold"}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("fold", "iqr", "index"))) for name in OPTIONS]
)
def test_nothing_about_the_run_changes_a_byte(name: str, tmp_path: Path) -> None:
    """Also of a tensor whose rows are wider than what the smallest ceiling leaves for a unit."""
    from safetensors.torch import save_file

    shapes = {"a.weight": (301, 530), "b.wide": (2, 400_001), "c.bias": (301,), "d.experts": (3, 5, 40)}
    for seed in range(3):
        folder = tmp_path / f"model-{seed}"
        folder.mkdir()
        save_file({key: stored("BF16", shape, seed) for key, shape in shapes.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text('{"model_type": "tiny"}')
    recipe = {
        "merge_method": "scf_rkl", "base_model": str(tmp_path / "model-0"), **OPTIONS[name],
        "models": [{"model": str(tmp_path / f"model-{seed}")} for seed in (1, 2)],
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(MemoryBudgetError) as refused:
        mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "none", memory="1MiB")
    least = re.findall(r"--memory (\d+MiB)", str(refused.value))[0]
    found = set()
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"workers": 1}),
        ({"chunk_size": "8KiB"}, {"workers": 3, "reader": "mmap"}),
        ({"memory": least, "store": "copy"}, {"workers": 1, "reader": "direct"}),
    ]
    for number, (building, running) in enumerate(ways):
        work, out = tmp_path / f"work-{number}", tmp_path / f"out-{number}"
        mergepipe.build(tmp_path / "recipe.yaml", work=work, out=out, **building)
        mergepipe.run(work, **running)
        found.add((out / "model.safetensors").read_bytes())
    assert len(found) == 1
    assert found != {(tmp_path / "model-0" / "model.safetensors").read_bytes()}


# -- one threshold for the whole model


def whole_model(folder: Path, models: list[dict[str, Array]], params: dict[str, Any], **how: Any) -> dict[str, Array]:
    """Merge files of F64 or F32 tensors with one threshold for all of them."""
    from safetensors.numpy import load_file, save_file

    for number, model in enumerate(models):
        (folder / f"model-{number}").mkdir(parents=True)
        save_file(model, folder / f"model-{number}" / "model.safetensors")
        (folder / f"model-{number}" / "config.json").write_text('{"model_type": "tiny"}')
    recipe = {
        "merge_method": "scf_rkl", "base_model": str(folder / "model-0"), "scope": "model", "parameters": params,
        "models": [{"model": str(folder / f"model-{number}")} for number in range(1, len(models))],
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **how)
    mergepipe.run(folder / "work", workers=2)
    return dict(load_file(folder / "merged" / "model.safetensors"))


@pytest.mark.parametrize("threshold", ["quantile", "iqr"])
@pytest.mark.parametrize("multi", ["winner", "fold"])
def test_one_threshold_for_the_whole_model(multi: str, threshold: str, tmp_path: Path) -> None:
    shapes = {"a.weight": (37, 53), "b.wide": (2, 66_001), "c.bias": (301,), "d.column": (40, 1), "e.norm": (60,)}
    primary = {name: fine_tune(shape, "f8", seed=1)[0] for name, shape in shapes.items()}
    steps = {name: 10.0**-at for at, name in zip((2, 4, 3, 3, 2), shapes, strict=True)}
    donors = [
        {name: a + np.random.default_rng(seed).normal(0, steps[name], a.shape) for name, a in primary.items()}
        for seed in (2, 3)
    ]
    params = {"multi": multi, "threshold": threshold, "quantile": 0.99, "exclude": ["norm"]}
    merged = whole_model(tmp_path / "one", [primary, *donors], params)
    fused, masks = dict(primary), []
    for donor in donors:
        start = fused if multi == "fold" else primary
        scores = {name: reference_scores(start[name], donor[name]) for name in shapes if name != "e.norm"}
        ranked = np.sort(np.concatenate([one.ravel() for one in scores.values()]))
        n = ranked.size
        least = ranked[min(n - 1, math.floor(0.99 * n + 1e-6))]
        if threshold == "iqr":
            low, middle, high = (ranked[int(p * (n - 1))] for p in (0.25, 0.5, 0.75))
            least = middle + 1.5 * (high - low)
        masks.append({name: np.where((one >= least) & (one > 0), one, 0) for name, one in scores.items()})
        if multi == "fold":
            fused |= {name: np.where(one > 0, donor[name], fused[name]) for name, one in masks[-1].items()}
    if multi == "winner":
        for name in masks[0]:
            first, second = masks[0][name], masks[1][name]
            winner = np.where(second > first, donors[1][name], donors[0][name])
            fused[name] = np.where(np.maximum(first, second) > 0, winner, primary[name])
    for name in shapes:
        # Scores within rounding of the threshold may fall on either side of it.
        assert np.count_nonzero(merged[name] != fused[name]) <= 2
    assert (merged["e.norm"] == primary["e.norm"]).all()
    assert (merged["a.weight"] != primary["a.weight"]).mean() > (merged["b.wide"] != primary["b.wide"]).mean()
    again = whole_model(tmp_path / "two", [primary, *donors], params, chunk_size="4KiB")
    assert all(again[name].tobytes() == merged[name].tobytes() for name in shapes)


def test_an_exact_count_of_a_whole_model_is_refused(tmp_path: Path) -> None:
    a, b = fine_tune((5, 6), "f4")
    with pytest.raises(RecipeError, match="tie_rule"):
        whole_model(tmp_path, [{"w": a}, {"w": b}], {"tie_rule": "index"})
