"""Every method against its float64 reference, for drawn shapes, weights and numbers of models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError, UsageError
from mergepipe.tasks import kernels
from mergepipe.tasks.method import Array
from mergepipe.tasks.methods.slerp import coefficients
from mergepipe.tasks.registry import METHODS, SPARSIFIERS, method, sparsifier
from support import reference
from support.drive import merge

WORKS = st.sampled_from(["f4", "f8"])
SHAPES = st.sampled_from([(), (1,), (7,), (5, 3), (2, 3, 4), (131,), (1025,), (3, 0)])
WEIGHTS = st.sampled_from([-0.5, 0.0, 0.25, 0.3, 1.0, 2.0])


def draw_models(data: Any, work: str, count: int | None = None) -> tuple[list[Array], list[float]]:
    """Models on a coarse grid, so that sums tie and cancel, or anywhere."""
    shape, k = data.draw(SHAPES), count or data.draw(st.integers(1, 11))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    models = rng.normal(0, 1, (k, *shape))
    if data.draw(st.booleans()):
        models = np.round(models * 2) / 8
    return list(models.astype(work)), data.draw(st.lists(WEIGHTS, min_size=k, max_size=k))


def close(out: Array, expected: Array, terms: Array) -> None:
    """Within a few ulp of the largest term of each element's sum."""
    allowed = 4 * np.spacing(np.maximum(np.abs(terms).max(axis=0), np.finfo(out.dtype).tiny).astype(out.dtype))
    np.testing.assert_array_less(np.abs(out - expected), np.maximum(allowed * len(terms), 1e-300) * 1.0001)


@given(data=st.data(), work=WORKS, normalize=st.booleans())
def test_linear(data: Any, work: str, normalize: bool) -> None:
    models, weights = draw_models(data, work)
    weights[0] = 3.0
    each = [{"weight": w} for w in weights]
    total = abs(sum(weights)) if normalize else 1
    if total < 0.1:
        return
    out = merge("linear", models, None, each, {"normalize": normalize}).out
    expected = reference.linear([m.astype("f8") for m in models], weights, normalize)
    close(out, expected, np.array([w * m for w, m in zip(weights, models, strict=True)]) / min(total, 1))


def test_linear_of_one_model_is_that_model() -> None:
    model = np.random.default_rng(0).normal(size=(3, 50_000)).astype("f4")
    assert merge("linear", [model], None, [{"weight": 1}]).out.tobytes() == model.tobytes()


def test_linear_refuses_weights_that_add_up_to_zero() -> None:
    with pytest.raises(RecipeError, match="add up to 0"):
        merge("linear", [np.ones(3)] * 2, None, [{"weight": 1}, {"weight": -1}])
    out = merge("linear", [np.ones(3)] * 2, None, [{"weight": 1}, {"weight": -1}], {"normalize": False}).out
    np.testing.assert_array_equal(out, 0)


@given(data=st.data(), work=WORKS, normalize=st.booleans(), scale=st.sampled_from([1.0, 0.3, -1.0]))
def test_task_arithmetic(data: Any, work: str, normalize: bool, scale: float) -> None:
    (base, *models), (_, *weights) = draw_models(data, work, data.draw(st.integers(2, 12)))
    if normalize and abs(sum(weights)) < 0.1:
        weights[0] += 0.5
    out = merge(
        "task_arithmetic", models, base, [{"weight": w} for w in weights], {"normalize": normalize, "lambda": scale}
    ).out
    deltas = [(m - base).astype("f8") for m in models]
    expected = reference.task_vectors(base.astype("f8"), deltas, weights, "none", normalize, scale)
    close(out, expected, np.array([base, *[4 * w * d for w, d in zip(weights, deltas, strict=True)]]))


@given(
    data=st.data(), work=WORKS, normalize=st.booleans(), consensus=st.sampled_from(["sum", "count", "none"]),
    density=st.sampled_from([0.0, 0.2, 0.5, 1.0]), tie_rule=st.sampled_from(["keep", "index"]), rescale=st.booleans(),
)  # fmt: skip
def test_ties(
    data: Any, work: str, normalize: bool, consensus: str, density: float, tie_rule: str, rescale: bool
) -> None:
    (base, *models), (_, *weights) = draw_models(data, work, data.draw(st.integers(2, 12)))
    if normalize and abs(sum(weights)) < 0.1:
        weights[0] += 0.5
    each = [{"weight": w, "density": density, "tie_rule": tie_rule, "rescale": rescale} for w in weights]
    out = merge("ties", models, base, each, {"normalize": normalize, "consensus": consensus, "lambda": 0.7}).out
    deltas = [reference.magnitude((m - base).astype("f8"), density, tie_rule, rescale) for m in models]
    terms = np.array([w * d for w, d in zip(weights, deltas, strict=True)])
    votes = terms.sum(0)
    # where the votes are within rounding of zero, either sign will do
    unsure = (np.abs(votes) < 1e-5 * np.abs(terms).max(0)) if consensus == "sum" else np.zeros(base.shape, bool)
    divisor = 0.1 if normalize else 1
    bound = np.array([base, *[4 * t / divisor for t in terms]])
    results = []
    for doubt in (None, 1.0, -1.0):
        signs = None if doubt is None else np.where(unsure, doubt, np.where(votes >= 0, 1.0, -1.0))
        if doubt is not None and consensus != "sum":
            continue
        results.append(reference.task_vectors(base.astype("f8"), deltas, weights, consensus, normalize, 0.7, signs))
    nearest = np.take_along_axis(
        np.array(results), np.argmin([np.abs(r - out) for r in results], axis=0)[None], axis=0
    )[0]
    close(out, nearest, bound)


@pytest.mark.parametrize("consensus", ["sum", "none"])
@pytest.mark.parametrize("work", ["f4", "f8"])
def test_many_models_take_the_same_arithmetic(work: str, consensus: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels for few and for many models agree in every bit."""
    rng = np.random.default_rng(1)
    base, *models = rng.normal(size=(9, 3, 40_000)).astype(work)
    each = [{"weight": w, "density": 0.4, "rescale": k % 2 == 0} for k, w in enumerate(rng.normal(0.3, 0.3, 8))]
    params = {"consensus": consensus, "lambda": 0.6}
    few = merge("ties", models, base, each, params).out
    plain = merge("linear", models, None, [{"weight": e["weight"]} for e in each]).out
    monkeypatch.setattr(kernels, "FEW", 0)
    assert merge("ties", models, base, each, params).out.tobytes() == few.tobytes()
    assert merge("linear", models, None, [{"weight": e["weight"]} for e in each]).out.tobytes() == plain.tobytes()


def test_ties_elects_plus_on_a_sum_of_zero() -> None:
    base, up, down = np.zeros(3, "f4"), np.array([1, 2, 0], "f4"), np.array([-1, -1, 0], "f4")
    out = merge("ties", [up, down], base, [{"weight": 1}] * 2).out
    np.testing.assert_array_equal(out, [1, 2, 0])
    counted = merge("ties", [up, down, down], base, [{"weight": 1}] * 3, {"consensus": "count"}).out
    np.testing.assert_array_equal(counted, [-1, -1, 0])


def test_ties_weights_count_in_the_election_after_the_trim() -> None:
    base, a, b = np.zeros(4, "f4"), np.array([4, 1, 3, 0.5], "f4"), np.array([-1, -4, 2, -3], "f4")
    out = merge("ties", [a, b], base, [{"weight": 1, "density": 0.5}, {"weight": 2, "density": 0.5}]).out
    np.testing.assert_array_equal(out, [4, -4, 3, -3])


@given(
    data=st.data(), work=WORKS, t=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    kind=st.sampled_from(["apart", "near", "opposite", "zero base", "zero other"]),
)  # fmt: skip
def test_slerp(data: Any, work: str, t: float, kind: str) -> None:
    (base, other), _ = draw_models(data, work, 2)
    other = base * 1.01 if kind == "near" else -base if kind == "opposite" else other
    base, other = base * (kind != "zero base"), other * (kind != "zero other")
    base, other = base.astype(work), other.astype(work)
    out = merge("slerp", [other], base, params={"t": t}).out
    if not base.size:
        return
    a, b = coefficients(
        t, np.array([np.vdot(x.astype("f8"), y.astype("f8")) for x, y in ((base, base), (other, other), (base, other))])
    )
    assert np.isfinite([a, b]).all()
    close(out, reference.slerp(base.astype("f8"), other.astype("f8"), t), np.array([a * base, b * other, base * 0.1]))


def test_slerp_over_blocks_in_any_order() -> None:
    base, other = np.random.default_rng(2).normal(size=(2, 3, 50_000)).astype("f4")
    one = merge("slerp", [other], base, params={"t": 0.4})
    two = merge("slerp", [other], base, params={"t": 0.4}, order=3, workers=2)
    assert one.state["dots"].tobytes() == two.state["dots"].tobytes()
    assert one.out.tobytes() == two.out.tobytes()
    expected = [np.vdot(x.astype("f8"), y.astype("f8")) for x, y in ((base, base), (other, other), (base, other))]
    np.testing.assert_allclose(one.state["dots"], expected, rtol=1e-12)


def test_passthrough() -> None:
    model = np.array([1.0, -0.0, 3.0], "f4")
    assert merge("passthrough", [model]).out.tobytes() == model.tobytes()
    np.testing.assert_array_equal(merge("passthrough", [model], each=[{"scale": 0.5}]).out, [0.5, -0.0, 1.5])


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("shape", [(3, 50_000), (1, 70_001), (2, 3, 30_000)])
def test_sparsifier_goes_before_any_host(name: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(3)
    base, *models = rng.normal(size=(4, *shape)).astype("f4")
    each = [{"weight": w} for w in (0.2, 0.3, 0.5)]
    merged = merge(name, models, base, each, sparsify={"method": "tadrop"})
    deltas = [reference.tadrop((m - base).astype("f8"), {}) for m in models]
    found = method(name)
    consensus, normalize = (found.parameter(key).default for key in ("consensus", "normalize"))  # type: ignore[union-attr]
    expected = reference.task_vectors(base.astype("f8"), deltas, [0.2, 0.3, 0.5], str(consensus), bool(normalize))
    wrong = np.abs(merged.out - expected) > 1e-5
    assert wrong.sum() <= 2  # elections within rounding of zero
    assert merged.state["histogram"].sum() == 3 * base.size


def test_every_row_is_complete() -> None:
    for name, row in METHODS.items():
        assert (name, row.trim in SPARSIFIERS) == (row.name, True)
        assert row.title
        assert row.summary
        brought = {p.name for p in SPARSIFIERS[row.trim].parameters}
        assert brought <= {p.name for p in row.parameters if p.per_model}
    for row in (*METHODS.values(), *SPARSIFIERS.values()):
        for parameter in row.parameters:
            assert parameter.doc
            assert repr(parameter.default) == "required" or parameter.check(parameter.default) == parameter.default


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'task_arithmetic'"):
        method("task_arithmetics")
    with pytest.raises(UsageError, match="there are breadcrumbs, della, magnitude, none, random, tadrop"):
        sparsifier("xyz")
