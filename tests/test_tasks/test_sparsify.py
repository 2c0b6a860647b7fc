"""Magnitude trimming and TADrop: the specification's test vector, tie rules, and properties."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergepipe.errors import RecipeError
from mergepipe.tasks.method import Array
from support import reference
from support.drive import Merged, merge

VECTOR = np.array([[-11, -8, -5, -2, 1], [-4, 0, 4, 8, -11], [3, 8, -10, -5, 0], [10, -7, -1, 5, 11]]) / 128
KEPT = np.array([[-11, -8, -5, 0, 0], [0, 0, 0, 8, -11], [0, 8, -10, -5, 0], [10, -7, 0, 5, 11]]) / 128
METRICS = ("quantile_ratio", "l1l2", "participation", "hoyer")
LONG = (3, 50_000)  # three blocks


def thinned(delta: Array, method: str = "tadrop", work: str = "f4", **options: Any) -> tuple[Array, Merged]:
    """The sparsified task vector alone: task arithmetic with weight 1 on a base of zeros."""
    driven = {key: options.pop(key) for key in ("workers", "order", "seed", "tensor") if key in options}
    base = np.zeros(delta.shape, work)
    merged = merge(
        "task_arithmetic", [delta.astype(work)], base, [{"weight": 1}], sparsify={"method": method, **options}, **driven
    )
    return merged.out, merged


@pytest.mark.parametrize("work", ["f4", "f8"])
@pytest.mark.parametrize("tie_rule", ["keep", "index"])
def test_vector_of_the_specification(work: str, tie_rule: str) -> None:
    expected = KEPT.copy()
    if tie_rule == "index":
        expected[3, 3] = 0
    out, merged = thinned(VECTOR, work=work, tie_rule=tie_rule)
    np.testing.assert_array_equal(out, expected)
    assert merged.state["metric"][0] == pytest.approx(5 / 11)
    assert merged.state["drop_rates"][0] == pytest.approx(5 / 11)
    assert merged.state["thresholds"][0] == 5 / 128
    assert merged.state["densities"][0] == (12 if tie_rule == "keep" else 11) / 20


@pytest.mark.parametrize(("rescale", "factor"), [("l1", 1.1515151515151516), ("l2", 1.0263867945880172)])
def test_vector_rescaled(rescale: str, factor: float) -> None:
    out, merged = thinned(VECTOR, work="f8", rescale=rescale)
    np.testing.assert_allclose(out, KEPT * factor, rtol=1e-15)
    assert merged.state["_factors"][0] == pytest.approx(factor, rel=1e-15)
    assert merged.state["kept_norms"][0] == pytest.approx(1 / 1.0263867945880172, rel=1e-15)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [("l1l2", 0.8376919850225727), ("participation", 0.7017278617710585), ("hoyer", 0.790946115309805)],
)
def test_vector_by_other_metrics(metric: str, expected: float) -> None:
    out, merged = thinned(VECTOR, metric=metric)
    assert merged.state["metric"][0] == pytest.approx(expected, rel=1e-14)
    np.testing.assert_array_equal(out, reference.tadrop(VECTOR, {"metric": metric}))
    assert "fine histogram 1 (quantiles)" not in merged.sweeps


@given(
    data=st.data(),
    work=st.sampled_from(["f4", "f8"]),
    density=st.one_of(st.floats(0, 1), st.sampled_from([0.0, 1.0])),
    tie_rule=st.sampled_from(["keep", "index"]),
)
def test_magnitude_against_reference(data: Any, work: str, density: float, tie_rule: str) -> None:
    few = st.integers(-3, 3).map(float)
    delta = data.draw(
        hnp.arrays(work, hnp.array_shapes(max_dims=3, max_side=9), elements=few | st.floats(-2, 2, width=32))
    )
    out, merged = thinned(delta, "magnitude", work, density=density, tie_rule=tie_rule)
    np.testing.assert_array_equal(out, reference.magnitude(delta.astype("f8"), density, tie_rule))
    if "densities" in merged.state:
        kept = np.abs(delta) >= merged.state["thresholds"][0]
        if tie_rule == "keep":
            assert merged.state["densities"][0] == pytest.approx(kept.mean(), abs=1e-12)
        else:
            assert round(merged.state["densities"][0] * delta.size) == max(1, int(density * delta.size))


@given(
    data=st.data(),
    work=st.sampled_from(["f4", "f8"]),
    metric=st.sampled_from(["quantile_ratio", "l1l2", "participation", "hoyer"]),
    tie_rule=st.sampled_from(["keep", "index"]),
    rescale=st.sampled_from(["none", "l1", "l2"]),
    offset=st.sampled_from([-0.2, 0.0, 0.3]),
    cap=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_tadrop_against_reference(
    data: Any, work: str, metric: str, tie_rule: str, rescale: str, offset: float, cap: float
) -> None:
    whole = st.integers(-6, 6).map(float)
    delta = data.draw(hnp.arrays(work, hnp.array_shapes(max_dims=2, max_side=12), elements=whole))
    options = {"metric": metric, "tie_rule": tie_rule, "rescale": rescale, "s_offset": offset, "s_cap": cap}
    out, merged = thinned(delta, work=work, **options)
    assert merged.state["metric"][0] == pytest.approx(reference.density_of(delta.astype("f8"), metric), abs=1e-12)
    expected = reference.tadrop(delta.astype("f8"), options, merged.state["drop_rates"][0])
    np.testing.assert_allclose(out, expected, rtol=1e-6 if work == "f4" else 1e-14)


@pytest.mark.parametrize("tie_rule", ["keep", "index"])
@pytest.mark.parametrize("method", ["magnitude", "tadrop"])
@pytest.mark.parametrize("work", ["f4", "f8"])
def test_many_blocks_any_order_any_workers(method: str, tie_rule: str, work: str) -> None:
    """Heavily tied magnitudes over several blocks, so that the block where the ties run out lies in the middle."""
    delta = np.round(np.random.default_rng(0).normal(0, 4, LONG)) / 64
    options: dict[str, Any] = {"tie_rule": tie_rule}
    options |= {"density": 0.37} if method == "magnitude" else {"rescale": "l2"}
    out, merged = thinned(delta, method, work, **options)
    if method == "magnitude":
        np.testing.assert_array_equal(out, reference.magnitude(delta, 0.37, tie_rule))
    else:
        np.testing.assert_allclose(out, reference.tadrop(delta, options), rtol=1e-6)
    again, other = thinned(delta, method, work, workers=3, order=5, **options)
    assert again.tobytes() == out.tobytes()
    assert other.sweeps == merged.sweeps
    for name, value in merged.state.items():
        assert value.tobytes() == other.state[name].tobytes(), name


def test_uniform_rate_equals_magnitude() -> None:
    delta = np.random.default_rng(1).normal(size=(40, 25))
    rate, _ = thinned(delta, s_slope=0.0, s_offset=0.75)
    np.testing.assert_array_equal(rate, thinned(delta, "magnitude", density=0.25)[0])


@pytest.mark.parametrize("metric", METRICS)
def test_scale_sign_and_permutation(metric: str) -> None:
    rng = np.random.default_rng(2)
    delta = rng.normal(size=1001).astype("f4")
    out, merged = thinned(delta, metric=metric)
    scaled, other = thinned(delta * 0.125, metric=metric)
    np.testing.assert_array_equal(scaled, out * 0.125)
    assert other.state["metric"] == merged.state["metric"]
    np.testing.assert_array_equal(thinned(-delta, metric=metric)[0], -out)
    order = rng.permutation(1001)
    np.testing.assert_array_equal(thinned(delta[order], metric=metric)[0], out[order])


@pytest.mark.parametrize("drop", ["magnitude", "random"])
def test_masks_are_nested(drop: str) -> None:
    delta = np.random.default_rng(3).normal(size=500)
    masks = [thinned(delta, s_slope=0.0, s_offset=c, drop=drop)[0] != 0 for c in (0.0, 0.2, 0.5, 0.9, 1.0)]
    for wider, narrower in pairwise(masks):
        assert not (narrower & ~wider).any()
    assert masks[-1].sum() == 5 or drop == "random"  # s_cap


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("gaussian", (0.344, 0.798, 0.636, 0.798)),
        ("laplace", (0.232, 0.707, 0.500, 0.707)),
        ("uniform", (0.526, 0.866, 0.750, 0.866)),
        ("student", (0.241, 0.637, 0.405, 0.636)),
        ("sparse", (0.0, 0.504, 0.254, 0.504)),
    ],
)
def test_densities_of_known_distributions(kind: str, expected: tuple[float, ...]) -> None:
    """The specification's table, all metrics at once: the more alike the magnitudes, the denser."""
    rng, n = np.random.default_rng(8), 400_000
    draw = {"gaussian": rng.normal, "laplace": rng.laplace, "uniform": lambda size: rng.uniform(-1, 1, size)}.get(kind)
    values = draw(size=n) if draw else rng.standard_t(3, n) if kind == "student" else rng.normal(size=n)
    values *= 1 if kind != "sparse" else rng.random(n) >= 0.6
    delta = values.astype("f4")
    each = [{"method": "tadrop", "metric": metric} for metric in METRICS]
    base = np.zeros(n, "f4")
    found = merge("task_arithmetic", [delta] * 4, base, [{"weight": 1}] * 4, sparsify=each).state["metric"]
    np.testing.assert_allclose(found, expected, atol=0.02 if kind == "student" else 0.004)


@pytest.mark.parametrize("drop", ["magnitude", "random"])
def test_less_than_one_element_is_none(drop: str) -> None:
    """Rates of up to 0.99 of one element, or of 0.24 of four: nothing goes, and nothing is made up for."""
    for delta, rate in ((np.array([0.5]), 0.99), (np.array([1.0, -2.0, 3.0, 4.0]), 0.24)):
        for seed in range(20):
            out, merged = thinned(
                delta, drop=drop, rescale="inverse_keep", s_slope=0.0, s_offset=rate, seed=seed, work="f8"
            )
            np.testing.assert_array_equal(out, delta)
        assert merged.state["densities"][0] == 1


def test_quantiles_the_wrong_way_round() -> None:
    with pytest.raises(RecipeError, match=r"q_lo.*is above q_hi \(0.9 and 0.2\)"):
        thinned(VECTOR, q_lo=0.9, q_hi=0.2)


@pytest.mark.parametrize("rescale", ["l1", "l2"])
def test_rescale_restores_the_norm(rescale: str) -> None:
    delta = np.random.default_rng(4).normal(size=LONG)
    out, _ = thinned(delta, work="f8", rescale=rescale)
    order = int(rescale[1])
    before, after = (np.linalg.norm(x.reshape(-1), order) for x in (delta, out))
    assert after == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("metric", ["quantile_ratio", "l1l2", "participation", "hoyer"])
@pytest.mark.parametrize("shape", [(), (1,), (7, 3)])
def test_zero_task_vector_is_left_alone(metric: str, shape: tuple[int, ...]) -> None:
    out, merged = thinned(np.zeros(shape), metric=metric, rescale="l2")
    np.testing.assert_array_equal(out, np.zeros(shape))
    assert merged.state["drop_rates"][0] == 0
    assert merged.state["_factors"][0] == 1


@pytest.mark.parametrize("method", ["none", "magnitude", "tadrop"])
def test_empty_tensor(method: str) -> None:
    options = {"density": 0.5} if method == "magnitude" else {}
    out, merged = thinned(np.zeros((0, 5)), method, **options)
    assert out.shape == (0, 5)
    assert merged.sweeps == []


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_or_nothing_reads_nothing(density: float) -> None:
    delta = np.arange(1.0, 9)
    out, merged = thinned(delta, "magnitude", density=density)
    np.testing.assert_array_equal(out, delta * density)
    assert merged.sweeps == []


def test_every_model_has_its_own_parameters() -> None:
    rng = np.random.default_rng(5)
    deltas = [rng.normal(size=LONG).astype("f4") for _ in range(5)]
    each = [
        {"metric": "quantile_ratio"}, {"metric": "l1l2", "tie_rule": "index"}, {"exclude": ["layer"]},
        {"metric": "hoyer", "rescale": "l1"}, {"s_cap": 0.0},
    ]  # fmt: skip
    for k, options in enumerate(each):
        sparsify = [{"method": "tadrop", **one} for one in each]
        weights = [{"weight": float(j == k)} for j in range(5)]
        out = merge("task_arithmetic", deltas, np.zeros(LONG, "f4"), weights, sparsify=sparsify).out
        expected = deltas[k] if k in (2, 4) else reference.tadrop(deltas[k].astype("f8"), options)
        np.testing.assert_allclose(out, expected, rtol=1e-6, err_msg=str(options))


def test_random_drop_is_scaled_and_reproducible() -> None:
    delta = np.random.default_rng(6).normal(size=LONG)
    options: dict[str, Any] = {"drop": "random", "s_slope": 0.0, "s_offset": 0.7, "work": "f8"}
    out, merged = thinned(delta, seed=9, **options)
    kept = out != 0
    assert kept.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(out[kept], delta[kept] / 0.3, rtol=1e-12)
    assert merged.state["densities"][0] == pytest.approx(0.3, abs=1e-9)
    assert thinned(delta, seed=9, order=1, workers=2, **options)[0].tobytes() == out.tobytes()
    for changed in ({"seed": 8}, {"seed": 9, "tensor": "other.weight"}):
        assert ((thinned(delta, **options, **changed)[0] != 0) != kept).mean() > 0.3
    exact, _ = thinned(delta, seed=9, rescale="l1", **options)
    assert np.abs(exact).sum() == pytest.approx(np.abs(delta).sum(), rel=1e-12)
    np.testing.assert_array_equal(exact != 0, kept)


def test_known_thresholds_skip_every_sweep() -> None:
    delta, base = np.random.default_rng(7).normal(size=(2, *LONG)).astype("f4")
    options: dict[str, Any] = {"sparsify": {"method": "tadrop", "tie_rule": "index", "rescale": "l1"}}
    first = merge("ties", [delta], base, [{"weight": 1}], **options)
    again = merge("ties", [delta], base, [{"weight": 1}], state=first.state, **options)
    assert first.sweeps
    assert again.sweeps == []
    assert again.out.tobytes() == first.out.tobytes()
