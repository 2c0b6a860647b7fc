"""Breadcrumbs, random dropping and DELLA: ranks, probabilities, rescaling, and masks that depend on no cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergepipe.errors import RecipeError
from mergepipe.tasks import philox
from mergepipe.tasks.della import ascending
from mergepipe.tasks.method import Array
from support import reference, reference_more
from support.drive import Merged, merge

LONG = (3, 50_000)
TENSOR = "layer.weight"


def words(n: int, model: int = 0, seed: int = 0, stream: str = "") -> Array:
    out = np.empty(n, np.uint32)
    philox.words(np.uint64(philox.mask_key(seed, model, TENSOR + stream)), 0, out)
    return out


def thinned(delta: Array, options: dict[str, Any], **driven: Any) -> tuple[Array, Merged]:
    """The task vector alone: task arithmetic on a base of zeros."""
    merged = merge("task_arithmetic", [delta], np.zeros_like(delta), [{"weight": 1}], sparsify=options, **driven)
    return merged.out, merged


@given(
    data=st.data(), work=st.sampled_from(["f4", "f8"]), density=st.sampled_from([0.0, 0.01, 0.3, 0.7, 0.95, 1.0]),
    gamma=st.sampled_from([0.0, 0.01, 0.2, 1.0]), rescale=st.booleans(),
)  # fmt: skip
def test_breadcrumbs_against_reference(data: Any, work: str, density: float, gamma: float, rescale: bool) -> None:
    few = st.integers(-3, 3).map(float)
    delta = data.draw(
        hnp.arrays(work, hnp.array_shapes(max_dims=2, max_side=12), elements=few | st.floats(-2, 2, width=32))
    )
    left = np.abs(reference_more.breadcrumbs(delta.astype("f8"), density, gamma, False)).sum()
    # A factor beyond the working type makes a result that is not finite, which is an error of its own.
    assume(left == 0 or np.abs(delta.astype("f8")).sum() / float(np.finfo(work).max) <= left / 2)
    out, _ = thinned(delta, {"method": "breadcrumbs", "density": density, "gamma": gamma, "rescale": rescale})
    expected = reference_more.breadcrumbs(delta.astype("f8"), density, gamma, rescale)
    np.testing.assert_allclose(out, expected, rtol=1e-6 if work == "f4" else 1e-14)


def test_breadcrumbs_without_outliers_is_not_empty() -> None:
    """An older mergekit zeroed tensors so small that gamma takes none of their elements."""
    delta = np.arange(1.0, 11).astype("f4")
    out, merged = thinned(delta, {"method": "breadcrumbs", "density": 0.5, "gamma": 0.01})
    np.testing.assert_array_equal(out, [0] * 5 + [6, 7, 8, 9, 10])
    assert merged.state["densities"][0] == 0.5
    out, _ = thinned(delta, {"method": "breadcrumbs", "density": 0.5, "gamma": 0.2})
    np.testing.assert_array_equal(out, [0, 0, 0, 4, 5, 6, 7, 8, 0, 0])


@pytest.mark.parametrize("options", [
    {"method": "breadcrumbs", "density": 0.4, "gamma": 0.05, "rescale": True},
    {"method": "random", "density": 0.4},
    {"method": "della", "density": 0.4},
], ids=lambda options: options["method"])  # fmt: skip
def test_any_order_any_workers(options: dict[str, Any]) -> None:
    delta = np.random.default_rng(0).normal(size=LONG).astype("f4")
    out, _ = thinned(delta, options)
    again, _ = thinned(delta, options, workers=3, order=4)
    assert out.tobytes() == again.tobytes()
    assert np.abs(out, dtype="f8").sum() == pytest.approx(np.abs(delta, dtype="f8").sum(), rel=1e-6)


@pytest.mark.parametrize("rescale", ["none", "l1", "inverse_keep"])
@pytest.mark.parametrize("work", ["f4", "f8"])
def test_random_keeps_what_the_generator_says(work: str, rescale: str) -> None:
    delta = np.random.default_rng(1).normal(size=(2, 70_001)).astype(work)
    out, merged = thinned(delta, {"method": "random", "density": 0.3, "rescale": rescale}, seed=5)
    keep = (words(delta.size, seed=5) < math.floor(0.3 * 2**32)).reshape(delta.shape)
    np.testing.assert_array_equal(out != 0, keep)
    kept = np.where(keep, delta.astype("f8"), 0)
    factor = {"none": 1, "l1": np.abs(delta, dtype="f8").sum() / np.abs(kept).sum(), "inverse_keep": 1 / 0.3}[rescale]
    np.testing.assert_allclose(out, kept * factor, rtol=1e-6 if work == "f4" else 1e-14)
    assert abs(keep.mean() - 0.3) < 4 * math.sqrt(0.21 / keep.size)
    assert merged.sweeps == (["norms around random"] if rescale == "l1" else [])


@pytest.mark.parametrize("method", ["random", "della"])
def test_density_of_one_and_of_nothing(method: str) -> None:
    delta = np.random.default_rng(2).normal(size=(4, 9)).astype("f4")
    out, merged = thinned(delta, {"method": method, "density": 1})
    assert (out.tobytes(), merged.sweeps) == (delta.tobytes(), [])
    np.testing.assert_array_equal(thinned(delta, {"method": method, "density": 0})[0], 0)


@given(data=st.data(), work=st.sampled_from(["f4", "f8"]))
def test_rows_are_ranked_by_a_stable_sort(data: Any, work: str) -> None:
    rows = data.draw(hnp.arrays(work, hnp.array_shapes(min_dims=2, max_dims=2), elements=st.integers(-3, 3).map(float)))
    np.testing.assert_array_equal(ascending(rows), np.argsort(np.abs(rows), axis=1, kind="stable"))


@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (300, 301), (2, 3, 400), (65_536,)])
@pytest.mark.parametrize("rescale", ["none", "l1", "inverse_keep"])
def test_della_against_reference(shape: tuple[int, ...], rescale: str) -> None:
    delta = np.round(np.random.default_rng(3).normal(1, 2, shape) * 4).astype("f4") + 0.125  # ties, no zero
    delta = np.asarray(delta, "f4")
    out, _ = thinned(delta, {"method": "della", "density": 0.4, "epsilon": 0.3, "rescale": rescale})
    p = reference_more.keep_probabilities(delta.astype("f8"), 0.4, 0.3)
    keep = words(delta.size).reshape(shape) < np.floor(p * 2**32)
    kept = np.where(keep, delta.astype("f8"), 0)
    if rescale == "l1" and keep.any():
        kept *= np.abs(delta, dtype="f8").sum() / np.abs(kept).sum()
    np.testing.assert_allclose(out, kept / p if rescale == "inverse_keep" else kept, rtol=1e-6)


def test_della_drops_small_elements_more_often() -> None:
    delta = np.sort(np.random.default_rng(4).uniform(1, 2, (400, 200)), axis=1).astype("f4")
    out, _ = thinned(delta, {"method": "della", "density": 0.5, "epsilon": 0.2, "rescale": "none"})
    kept = (out != 0).mean(axis=0)
    assert abs(kept.mean() - 0.5) < 0.01
    np.testing.assert_allclose([kept[:20].mean(), kept[-20:].mean()], [0.32, 0.68], atol=0.02)


def test_della_refuses_what_it_cannot_do() -> None:
    delta = np.ones((2, 4), "f4")
    with pytest.raises(RecipeError, match="must lie between 0 and 1"):
        thinned(delta, {"method": "della", "density": 0.1, "epsilon": 0.15})
    with pytest.raises(RecipeError, match="rows of 65,537 elements"):
        thinned(np.ones((1, 65_537), "f4"), {"method": "della", "density": 0.5})
    thinned(np.ones((1, 65_537), "f4"), {"method": "della", "density": 1})


HOSTS = [("dare_linear", "random", "none"), ("dare_ties", "random", "sum"), ("della_linear", "della", "none"),
         ("della", "della", "sum")]  # fmt: skip


@pytest.mark.parametrize(("host", "kind", "consensus"), HOSTS)
@pytest.mark.parametrize("rescale", [(True, "l1", "l1"), (False, "l1", "none"), (True, "inverse_keep", "inverse_keep")])
def test_host_alone_is_its_sparsifier_and_its_consensus(
    host: str, kind: str, consensus: str, rescale: tuple[bool, str, str]
) -> None:
    rng = np.random.default_rng(5)
    base, *models = rng.normal(size=(4, *LONG)).astype("f4")
    weights, densities = (0.4, 0.3, 0.6), (0.3, 0.5, 1.0)
    normalize = host == "della"
    each = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    out = merge(host, models, base, each, {"rescale": rescale[0], "rescale_by": rescale[1]}).out
    options = [{"method": kind, "density": d, "rescale": rescale[2]} for d in densities]
    params = {"consensus": consensus, "normalize": normalize}
    same = merge("ties", models, base, [{"weight": w} for w in weights], params, options).out
    np.testing.assert_array_equal(out, same)


def norm_kept(delta: Array, options: dict[str, Any]) -> float:
    """Of the same thinning without a rescale."""
    left, _ = thinned(delta, {**options, "rescale": False if options["method"] == "breadcrumbs" else "none"})
    return float(np.linalg.norm(left.astype("f8")) / np.linalg.norm(delta.astype("f8")))


@pytest.mark.parametrize("method", ["random", "della", "breadcrumbs"])
def test_the_norm_that_is_kept(method: str) -> None:
    """It comes with the norms that a rescale takes, and is that of the elements before they are scaled."""
    delta = np.random.default_rng(8).normal(size=(31, 2111)).astype("f4")
    options = {"method": method, "density": 0.4, "rescale": True if method == "breadcrumbs" else "l1"}
    found = thinned(delta, options)[1].state["kept_norms"][0]
    assert found == pytest.approx(norm_kept(delta, options), rel=1e-12)
    assert thinned(np.zeros((3, 5), "f4"), options)[1].state["kept_norms"][0] == 0


def test_the_norm_that_two_thinnings_keep() -> None:
    rng = np.random.default_rng(5)
    base, model = rng.normal(size=(2, *LONG)).astype("f4")
    first = {"method": "magnitude", "density": 0.5}
    known = merge("dare_linear", [model], base, [{"weight": 1.0, "density": 0.5}], None, [{**first, "rescale": True}])
    plain = {"rescale": False}
    left = merge("dare_linear", [model], base, [{"weight": 1.0, "density": 0.5}], plain, [first]).out - base
    expected = np.linalg.norm(left.astype("f8")) / np.linalg.norm((model - base).astype("f8"))
    assert known.state["kept_norms"][0] == pytest.approx(expected, rel=1e-5)
    unknown = merge("dare_linear", [model], base, [{"weight": 1.0, "density": 0.5}], None, [first])
    assert "kept_norms" not in unknown.state, "what the first thinning has kept is not measured"


@pytest.mark.parametrize(("host", "kind", "consensus"), HOSTS)
def test_host_thins_what_a_sparsifier_leaves(host: str, kind: str, consensus: str) -> None:
    """Magnitude first; then the host's own mask, drawn from a stream of its own, and its L1 ratio."""
    rng = np.random.default_rng(6)
    base, model = np.zeros((200, 300), "f4"), rng.normal(size=(200, 300)).astype("f4")
    out = merge(
        host, [model], base, [{"weight": 1, "density": 0.5}], sparsify={"method": "magnitude", "density": 0.6}
    ).out
    first = reference.magnitude(model.astype("f8"), 0.6)
    p = np.full(model.shape, 0.5) if kind == "random" else reference_more.keep_probabilities(first, 0.5, 0.15)
    keep = words(model.size, stream="\0host").reshape(model.shape) < np.floor(p * 2**32)
    expected = np.where(keep, first, 0)
    expected *= np.abs(first).sum() / np.abs(expected).sum()
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert consensus in ("none", "sum")


def test_two_random_masks_are_independent() -> None:
    model = np.random.default_rng(7).normal(size=(300, 300)).astype("f4")
    each = [{"weight": 1, "density": 0.5}]
    out = merge("dare_linear", [model], np.zeros_like(model), each, sparsify={"method": "random", "density": 0.5}).out
    assert abs(np.count_nonzero(out) / out.size - 0.25) < 0.01


def test_masks_of_tensors_models_and_seeds_differ() -> None:
    model = np.random.default_rng(8).normal(size=(100, 100)).astype("f4")
    each = [{"weight": 1, "density": 0.5}]
    base = np.zeros_like(model)
    masks = [
        merge("dare_linear", [model], base, each, tensor=t, seed=s).out != 0 for t, s in [("a", 0), ("b", 0), ("a", 1)]
    ]
    for i in range(3):
        assert abs((masks[i] == masks[i - 1]).mean() - 0.5) < 0.03
    two = merge("dare_linear", [model, model], base, each * 2, {"rescale": False}).out
    assert {0.0, 1.0, 2.0} == set(np.round(two / model, 3).ravel().tolist())


@pytest.mark.parametrize(("host", "consensus"), [("breadcrumbs", "none"), ("breadcrumbs_ties", "sum")])
def test_breadcrumbs_hosts(host: str, consensus: str) -> None:
    rng = np.random.default_rng(9)
    base, *models = rng.normal(size=(4, *LONG)).astype("f4")
    each = [{"weight": w, "density": 0.4, "gamma": 0.1} for w in (0.5, 0.3, 0.4)]
    out = merge(host, models, base, each, {"lambda": 0.5}).out
    deltas = [reference_more.breadcrumbs((m - base).astype("f8"), 0.4, 0.1) for m in models]
    expected = reference.task_vectors(base.astype("f8"), deltas, [0.5, 0.3, 0.4], consensus, False, 0.5)
    assert (np.abs(out - expected) > 1e-5).sum() <= 2  # elections within rounding of zero
    replaced = merge(host, models, base, [{"weight": 1}] * 3, sparsify={"method": "magnitude", "density": 0.5}).out
    ties = merge(
        "ties", models, base, [{"weight": 1, "density": 0.5}] * 3, {"consensus": consensus, "normalize": False}
    ).out
    np.testing.assert_array_equal(replaced, ties)
