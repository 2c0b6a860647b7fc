"""mergekit's further methods against their float64 formulas, and what they make of degenerate tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError
from mergepipe.tasks.method import Array
from mergepipe.tasks.registry import METHODS
from support import reference, reference_more
from support.drive import merge

SHAPES = [(), (1,), (7,), (5, 3), (2, 3, 4), (131,), (20, 70), (3, 0), (3, 50_000), (2, 70_001), (70_001,)]
WORKS = pytest.mark.parametrize("work", ["f4", "f8"])


def draw(
    shape: tuple[int, ...], work: str, count: int, spread: float = 0.1, seed: int = 0
) -> tuple[Array, list[Array]]:
    """A base and models around it."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape)
    models = [base + spread * rng.normal(size=shape) for _ in range(count)]
    return np.asarray(base, work), [np.asarray(m, work) for m in models]


def f8(arrays: list[Array]) -> list[Array]:
    return [a.astype("f8") for a in arrays]


def deltas(base: Array, models: list[Array]) -> list[Array]:
    """Task vectors as the tile holds them: subtracted in the working type."""
    return [(m - base).astype("f8") for m in models]


def close(out: Array, expected: Array, *terms: Array, ulps: float = 4) -> None:
    """Within a few ulp of the largest of `terms`, and of the expected value, of each element.

    In float64, within 1e-10 of it: an angle near 0 or pi, from a cosine, has lost as much in the reference, too.
    """
    largest = np.max([np.abs(expected), *(np.broadcast_to(np.abs(t), expected.shape) for t in terms)], axis=0)
    allowed = 1e-10 * largest if out.dtype == "f8" else ulps * np.spacing(largest.astype(out.dtype)).astype("f8")
    wrong = np.abs(out - expected) > allowed
    assert not wrong.any(), (np.abs(out - expected) / allowed)[wrong].max()


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("t", [0.0, 0.05, 3.0])
def test_nearswap(shape: tuple[int, ...], work: str, t: float) -> None:
    base, (other,) = draw(shape, work, 1)
    out = merge("nearswap", [other], base, params={"t": t}).out
    close(out, reference_more.nearswap(base.astype("f8"), other.astype("f8"), t), base, other)


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("along", ["all", "rows", "columns"])
@pytest.mark.parametrize("based", [True, False])
def test_nuslerp(shape: tuple[int, ...], work: str, along: str, based: bool) -> None:
    base, models = draw(shape, work, 2)
    params = {"nuslerp_flatten": along == "all", "nuslerp_row_wise": along == "columns"}
    each = [{"weight": 0.6}, {"weight": 0.2}]
    merged = merge("nuslerp", models, base if based else None, each, params)
    again = merge("nuslerp", models, base if based else None, each, params, order=3, workers=2)
    assert merged.out.tobytes() == again.out.tobytes()
    if not base.size:
        return
    a, b = deltas(base, models) if based else f8(models)
    axis = None if along == "all" or len(shape) < 2 else -1 if along == "rows" else 0
    expected = reference_more.nuslerp(a, b, 0.25, axis)
    if based:
        expected += base
    if len(shape) > 1 and along != "all":
        # next to opposite directions every rounding grows as one over the sine of the angle
        dots = [(x * y).sum(axis, keepdims=True) for x, y in ((a, b), (a, a), (b, b))]
        opposite = dots[0] ** 2 / (dots[1] * dots[2]) > 0.99
        expected = np.where(opposite, merged.out, expected)
    close(merged.out, expected, 10 * a, 10 * b, base)


@pytest.mark.parametrize("along", ["all", "rows", "columns"])
def test_nuslerp_of_vectors_without_an_angle(along: str) -> None:
    base = np.ones((4, 4), "f4")
    params = {"nuslerp_flatten": along == "all", "nuslerp_row_wise": along == "columns"}
    each = [{"weight": 1}, {"weight": 1}]
    np.testing.assert_array_equal(merge("nuslerp", [base, base], base, each, params).out, base)
    near = merge("nuslerp", [base, 3 * base], None, each, params).out
    np.testing.assert_allclose(near, 2 * base, rtol=1e-6)
    np.testing.assert_allclose(merge("nuslerp", [base, -3 * base], None, each, params).out, -base, rtol=1e-6)
    cancelling = merge("nuslerp", [base, 3 * base], None, [{"weight": 1}, {"weight": -1}], params).out
    np.testing.assert_allclose(cancelling, 2 * base, rtol=1e-6)


def test_dot_products_of_columns_are_exact_in_any_order() -> None:
    """Also where one column is 1e-9 of the others."""
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 500, 300)).astype("f4") * np.where(np.arange(300) % 7, 1, 1e-9).astype("f4")
    params = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
    merged = merge("nuslerp", [a, b], None, [{"weight": 1}] * 2, params, order=1, workers=3)
    x, y = a.astype("f8"), b.astype("f8")
    np.testing.assert_allclose(merged.state["_columns"][:, 0], (x * x).sum(0), rtol=1e-14)
    np.testing.assert_allclose(merged.state["_columns"][:, 2], (x * y).sum(0), rtol=1e-10)


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 2, 3, 10])
@pytest.mark.parametrize("based", [True, False])
def test_multislerp(shape: tuple[int, ...], work: str, count: int, based: bool) -> None:
    base, models = draw(shape, work, count)
    weights = np.linspace(0.2, 1, count)
    each = [{"weight": w} for w in weights]
    out = merge("multislerp", models, base if based else None, each, {"normalize_weights": based}).out
    vectors = deltas(base, models) if based else f8(models)
    expected = reference_more.multislerp(vectors, weights / weights.sum() if based else weights) if base.size else out
    close(out, base + expected if based else expected, *vectors, base if based else expected, ulps=4 + 3 * count)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_multislerp_where_there_is_no_direction(count: int) -> None:
    """A tensor that all models left as it was, and directions that cancel."""
    base = np.random.default_rng(2).normal(size=(4, 5)).astype("f4")
    each = [{"weight": 1}] * count
    np.testing.assert_array_equal(merge("multislerp", [base] * count, base, each).out, base)
    a = np.zeros(8, "f4")
    a[0] = 1
    models = [a, -a] + [a * 0] * (count - 2)
    np.testing.assert_array_equal(merge("multislerp", models, None, each).out, 0)


def test_multislerp_where_directions_nearly_cancel() -> None:
    """The length of the mean is measured anew, where the Gram matrix has lost its digits."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 3, 50_000))
    models = [a, -a + 1e-6 * b]
    merged = merge("multislerp", models, None, [{"weight": 1}] * 2)
    assert merged.sweeps == ["dot products", "length of the mean direction"]
    np.testing.assert_allclose(merged.out, reference_more.multislerp(models, [0.5, 0.5]), rtol=1e-6, atol=1e-9)


def test_multislerp_refuses_weights_that_add_up_to_zero() -> None:
    with pytest.raises(RecipeError, match="add up to 0"):
        merge("multislerp", [np.ones(3)] * 2, None, [{"weight": 1}, {"weight": -1}])


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("count", "spread"), [(1, 1), (2, 0.1), (3, 0.001), (3, 2.0), (10, 2.0)])
def test_karcher(shape: tuple[int, ...], work: str, count: int, spread: float) -> None:
    _, models = draw(shape, work, count, spread)
    out = merge("karcher", models).out
    if not out.size or len(shape) == 0 or shape == (1,):  # a sphere of two points has no mean to speak of
        return
    close(out, reference_more.karcher(f8(models)), *models, ulps=8 + 3 * count)


def test_karcher_of_degenerate_models() -> None:
    zero, a = np.zeros(6, "f4"), np.arange(6, dtype="f4")
    np.testing.assert_array_equal(merge("karcher", [zero, zero]).out, 0)
    np.testing.assert_allclose(merge("karcher", [zero, a]).out, a / 2, rtol=1e-6)  # half the mean length
    np.testing.assert_allclose(merge("karcher", [a, a, a]).out, a, rtol=1e-6)
    np.testing.assert_allclose(merge("karcher", [a, -a]).out, a, rtol=1e-6)


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_model_stock(shape: tuple[int, ...], work: str, by_row: bool, count: int) -> None:
    base, models = draw(shape, work, count, seed=4)
    models = [m + 0.1 * (models[0] - base) for m in models]
    out = merge("model_stock", models, base, params={"filter_wise": by_row}).out
    if not base.size:
        return
    expected = reference_more.model_stock(base.astype("f8"), f8(models), by_row)
    close(out, expected, base, *models, ulps=6)


def test_model_stock_stays_at_the_base_where_there_is_no_answer() -> None:
    base, d = np.ones((2, 3), "f4"), np.array([[1, 2, 3], [0, 0, 0]], "f4")
    for params in ({"filter_wise": True}, {"filter_wise": False}):
        for models in ([base + d, base - d], [base, base]):
            np.testing.assert_array_equal(merge("model_stock", models, base, params=params).out, base)


@given(
    data=st.data(), work=st.sampled_from(["f4", "f8"]), topk=st.sampled_from([0.0, 0.05, 0.3, 0.9, 1.0]),
    count=st.integers(1, 10), equal_below=st.sampled_from([0.0, 1e-6, 1e9]),
)  # fmt: skip
def test_sce(data: Any, work: str, topk: float, count: int, equal_below: float) -> None:
    shape = data.draw(st.sampled_from([(), (1,), (7,), (9, 11), (2, 3, 4), (3, 0)]))
    base, models = draw(shape, work, count, seed=data.draw(st.integers(0, 50)))
    models[0] = base.copy() if data.draw(st.booleans()) else models[0]
    out = merge("sce", models, base, params={"select_topk": topk, "equal_below": equal_below}).out
    if not base.size:
        return
    vectors = deltas(base, models)
    expected = reference_more.sce(base.astype("f8"), vectors, topk, equal_below)
    off = np.abs(out - expected) > 1e-5
    if work == "f8":
        # the reference ranks variances rounded to float32, so may select another set where they tie there
        assert off.mean() <= 0.5
    else:
        assert not off.any()


def test_sce_over_blocks_in_any_order() -> None:
    base, models = draw((3, 50_000), "f4", 3, seed=5)
    one = merge("sce", models, base, params={"select_topk": 0.2})
    two = merge("sce", models, base, params={"select_topk": 0.2}, order=2, workers=3)
    assert one.out.tobytes() == two.out.tobytes()
    assert one.sweeps == ["coarse histogram of variances", "fine histogram 1 (variance) of variances", "energies"]
    assert 0.19 < np.mean(one.out != base) <= 0.2
    expected = reference_more.sce(base.astype("f8"), deltas(base, models), 0.2)
    assert (np.abs(one.out - expected) > 1e-5).sum() <= 2  # elections within rounding of zero


def test_sce_counts_elements_in_which_models_differ() -> None:
    base, up = np.zeros(10, "f4"), np.arange(10, dtype="f4") * (np.arange(10) >= 6)
    out = merge("sce", [up, base], base, params={"select_topk": 0.5}).out
    np.testing.assert_array_equal(out, [0] * 8 + [8, 9])
    np.testing.assert_array_equal(merge("sce", [up, up], base, params={"select_topk": 0.5}).out, base)


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["ram", "ramplus_tl"])
@pytest.mark.parametrize("count", [1, 3, 10])
def test_ram(name: str, shape: tuple[int, ...], work: str, count: int) -> None:
    base, models = draw(shape, work, count, seed=6)
    options = {"epsilon": 0.1} | ({"r": 0.7, "alpha": 0.5} if name == "ramplus_tl" else {})
    merged = merge(name, models, base, params=options)
    assert merged.out.tobytes() == merge(name, models, base, params=options, order=1, workers=2).out.tobytes()
    if not base.size:
        return
    vectors = deltas(base, models)
    expected = reference_more.ram(base.astype("f8"), vectors, **options)
    tied = np.any([np.abs(np.abs(d) - 0.1) < 1e-7 for d in vectors], axis=0)
    close(np.where(tied, expected, merged.out).astype(work), expected, base, *vectors, ulps=4 + count)


def test_ram_by_hand() -> None:
    base = np.zeros(4, "f4")
    models = [np.array([1, 2, 0, 4], "f4"), np.array([0, 4, 0, 0], "f4")]
    np.testing.assert_array_equal(merge("ram", models, base).out, [1, 3, 0, 4])
    # the first shares 1 and has 2 alone, a ratio of 0.5; the second has nothing alone
    plus = merge("ramplus_tl", models, base, params={"r": 0.5, "alpha": 0.4}).out
    np.testing.assert_allclose(plus, [1.2, 3, 0, 4.8], rtol=1e-6)


@pytest.mark.parametrize("name", ["nuslerp", "multislerp", "model_stock", "sce", "ram", "ramplus_tl"])
def test_sparsifiers_go_before_these_too(name: str) -> None:
    base, models = draw((3, 50_000), "f4", 2, seed=7)
    each = [{"weight": 1} if METHODS[name].parameter("weight") else {}] * 2
    out = merge(name, models, base, each, sparsify={"method": "magnitude", "density": 0.3}).out
    thinned = [base + reference.magnitude((m - base).astype("f8"), 0.3).astype("f4") for m in models]
    np.testing.assert_allclose(out, merge(name, thinned, base, each).out, atol=2e-5)


@WORKS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1, 3, 10])
@pytest.mark.parametrize("based", [True, False])
@pytest.mark.parametrize("plain", [True, False])
def test_fisher(shape: tuple[int, ...], work: str, count: int, based: bool, plain: bool) -> None:
    base, models = draw(shape, work, count, seed=8)
    rng = np.random.default_rng(9)
    # over many orders of magnitude, and some elements that matter to nobody
    importances = [(10.0 ** rng.uniform(-30, 2, shape) * (rng.random(shape) > 0.3)).astype(work) for _ in models]
    weights = np.linspace(0.2, 1, count)
    each = [{"weight": w} for w in weights]
    params = {"divide_by": "importance" if plain else "weighted", "lambda": 0.7}
    merged = merge("fisher", models, base if based else None, each, params, importances=importances)
    again = merge("fisher", models, base if based else None, each, params, importances=importances, order=4)
    assert merged.out.tobytes() == again.out.tobytes()
    if not base.size:
        return
    vectors = [base.astype("f8") + d for d in deltas(base, models)] if based else f8(models)
    expected = reference_more.fisher(
        base.astype("f8") if based else None, vectors, f8(importances), weights, plain=plain, scale=0.7
    )
    close(merged.out, expected, base if based else expected, *models, ulps=2)


def test_fisher_takes_what_matters_to_one_model_from_it() -> None:
    models = [np.full(4, 1, "f4"), np.full(4, 3, "f4")]
    importances = [np.array([1, 0, 1, 0], "f4"), np.array([0, 1, 1, 0], "f4")]
    each = [{"weight": 1}, {"weight": 3}]
    out = merge("fisher", models, None, each, importances=importances).out
    np.testing.assert_array_equal(out, [1, 3, 2.5, 2.5])
    floored = merge("fisher", models, None, each, {"floor": 1.0}, importances=importances).out
    np.testing.assert_array_equal(floored, [2.5] * 4)
    with pytest.raises(RecipeError, match="all weights of"):
        merge("fisher", models, None, [{"weight": 0}] * 2, importances=importances)


def test_fisher_as_df_merge() -> None:
    """W0 + T sum F w tau / sum F, by `divide_by: importance` and `lambda: T`."""
    rng = np.random.default_rng(10)
    base, *models = rng.normal(size=(4, 30))
    importances = rng.random((3, 30))
    weights = [0.3, 0.9, 0.5]
    each = [{"weight": w} for w in weights]
    params = {"divide_by": "importance", "lambda": 3.0}
    out = merge("fisher", models, base, each, params, importances=list(importances)).out
    top = sum(f * w * (m - base) for f, w, m in zip(importances, weights, models, strict=True))
    np.testing.assert_allclose(out, base + 3 * top / importances.sum(0), rtol=1e-12)
