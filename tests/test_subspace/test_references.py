"""Every method against a reference that shares no code with it, for every shape and route."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from support import matrices as whole
from support.gpu import needs_cuda
from support.matrices import Matrix, random_deltas, solve

pytestmark = pytest.mark.usefixtures("device")

REFERENCES: dict[str, tuple[str, dict[str, Any], Callable[[list[Matrix]], Matrix]]] = {
    "mda": ("mda", {}, whole.mda),
    "mda, simplex on both sides": ("mda", {"right_align": "etf"}, lambda d: whole.mda(d, right_align="etf")),
    "mda, right side as it is": ("mda", {"right_align": "none"}, lambda d: whole.mda(d, right_align="none")),
    "mda, projection": ("mda", {"mode": "projection"}, lambda d: whole.mda(d, "projection")),
    "mda, rank 3": ("mda", {"rank": 3}, lambda d: whole.mda(d, rank=3)),
    "mda, rank_cap 2": ("mda", {"rank_cap": 2}, lambda d: whole.mda(d, rank=2)),
    "mda, rank 0.25": ("mda", {"rank": 0.25}, lambda d: whole.mda(d, rank=max(1, min(d[0].shape) // 4))),
    "mda in tsv mode is TSV-M": ("mda", {"mode": "tsv"}, whole.tsv_m),
    "tsv_m": ("tsv_m", {}, whole.tsv_m),
    "iso_c": ("iso_c", {}, whole.iso_c),
    "iso_cts": ("iso_cts", {}, whole.iso_cts),
    "iso_cts, half common": ("iso_cts", {"common_fraction": 0.5}, lambda d: whole.iso_cts(d, 0.5)),
    "dc_merge": ("dc_merge", {}, whole.dc_merge),
}
SHAPES = [(24, 40), (40, 24), (33, 33), (13, 90)]
BOUND = {"full": 1e-10, "gram": 1e-8}
"""The Gram route squares the condition number: what it loses is far below a float32's last bit."""


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", REFERENCES)
def test_reference(case: str, shape: tuple[int, int], svd: str) -> None:
    name, params, reference = REFERENCES[case]
    deltas = random_deltas(*shape, 3, seed=1)
    update, found = solve(name, deltas, {**params, "svd": svd})
    expected = reference(deltas)
    assert np.linalg.norm(update - expected) <= BOUND[svd] * np.linalg.norm(expected)
    assert found["subspace_route"][0] == ("full", "gram").index(svd)


@pytest.mark.parametrize("models", [1, 2, 5])
@pytest.mark.parametrize("name", ["mda", "tsv_m", "iso_c", "iso_cts", "dc_merge", "opcm"])
def test_any_number_of_models(name: str, models: int) -> None:
    reference = {
        "mda": whole.mda,
        "tsv_m": whole.tsv_m,
        "iso_c": whole.iso_c,
        "iso_cts": whole.iso_cts,
        "opcm": whole.opcm,
    }.get(name, whole.dc_merge)
    deltas = random_deltas(20, 31, models)
    expected = reference(deltas)
    assert np.linalg.norm(solve(name, deltas)[0] - expected) <= 1e-10 * np.linalg.norm(expected)


def test_dc_merge_keeps_more_than_one_entry_of_a_larger_matrix() -> None:
    deltas = random_deltas(90, 120, 2)
    expected = whole.dc_merge(deltas)
    assert np.linalg.matrix_rank(expected) > 2
    np.testing.assert_allclose(solve("dc_merge", deltas)[0], expected, atol=1e-10)


@pytest.mark.parametrize("smoothing", ["avg", "linear"])
def test_smoothing_keeps_the_sum(smoothing: str) -> None:
    from mergepipe.tasks.subspace.consistent import _smooth

    values = torch.tensor([4.0, 2.0, 1.0, 8.0, 0.5, 0.5], dtype=torch.float64)
    _smooth(values, [0, 3, 6], smoothing, 5.0)
    assert values[:3].sum() == pytest.approx(7)
    assert values[3:].sum() == pytest.approx(9)
    expected = [7 / 3] * 3 if smoothing == "avg" else [7 * w / 7.5 for w in (4, 2.5, 1)]
    assert values[:3].tolist() == pytest.approx(expected)
    assert smoothing == "avg" or float(values[3] / values[5]) == pytest.approx(5)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)], ids=str)
def test_randomized_is_seeded_and_close(shape: tuple[int, int]) -> None:
    deltas = random_deltas(*shape, 2, rank=6)
    exact, _ = solve("tsv_m", deltas, {"rank": 6})
    once, found = solve("tsv_m", deltas, {"rank": 6, "svd": "randomized"})
    again, _ = solve("tsv_m", deltas, {"rank": 6, "svd": "randomized"})
    assert found["subspace_route"][0] == 2
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(once, exact, atol=1e-9)
    other, _ = solve("tsv_m", random_deltas(*shape, 2), {"rank": 6, "svd": "randomized"}, tensor="a")
    assert np.any(other != solve("tsv_m", random_deltas(*shape, 2), {"rank": 6, "svd": "randomized"}, tensor="b")[0])


def test_randomized_leaves_higher_ranks_to_the_exact_route() -> None:
    deltas = random_deltas(30, 40, 2)
    update, found = solve("mda", deltas, {"svd": "randomized"})
    np.testing.assert_array_equal(update, solve("mda", deltas)[0])
    assert found["subspace_route"][0] == 0


@needs_cuda
@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("name", ["mda", "tsv_m", "iso_c", "iso_cts", "dc_merge", "opcm"])
def test_cuda_agrees_with_the_cpu(name: str, svd: str) -> None:
    deltas = random_deltas(48, 80, 3)
    on_cpu, _ = solve(name, deltas, {"svd": svd}, device="cpu")
    on_gpu, _ = solve(name, deltas, {"svd": svd}, device="cuda:0")
    assert np.linalg.norm(on_gpu - on_cpu) <= 1e-8 * np.linalg.norm(on_cpu)


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("name", ["mda", "tsv_m"])
def test_calibrated_singular_values(name: str, alpha: float, svd: str) -> None:
    deltas = random_deltas(21, 30, 3)
    expected = whole.svc(getattr(whole, name)(deltas), deltas, alpha)
    update, _ = solve(name, deltas, {"svc": alpha, "svd": svd})
    assert np.linalg.norm(update - expected) <= 1e-8 * np.linalg.norm(expected)


@pytest.mark.parametrize("shape", [(21, 30), (30, 21)], ids=str)
@pytest.mark.parametrize("alpha", [0.1, 1.0])
@pytest.mark.parametrize("lam", [1.0, 0.3])
def test_calibrated_sums(shape: tuple[int, int], alpha: float, lam: float) -> None:
    """Of what task arithmetic adds up, weights included, and scaled by lambda afterwards."""
    deltas, weights = random_deltas(*shape, 3), (0.3, 0.5, -0.2)
    total = sum(weight * delta for weight, delta in zip(weights, deltas, strict=True))
    expected = lam * whole.svc(np.asarray(total), deltas, alpha)
    update, found = solve(
        "task_arithmetic", deltas, {"svc": alpha, "lambda": lam}, each=[{"weight": weight} for weight in weights]
    )
    assert np.linalg.norm(update - expected) <= 1e-8 * np.linalg.norm(expected)
    assert found["subspace_lost"][0] == 0


@pytest.mark.parametrize("shape", [(21, 30), (30, 21), (25, 25)], ids=str)
@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.95])
def test_opcm(shape: tuple[int, int], svd: str, alpha: float) -> None:
    deltas = random_deltas(*shape, 4)
    update, found = solve("opcm", deltas, {"alpha": alpha, "svd": svd})
    np.testing.assert_allclose(update, whole.opcm(deltas, alpha), atol=1e-9)
    assert found["subspace_ranks"].tolist() == [0, *[min(shape)] * 3]
    squares = [(delta**2).sum() for delta in deltas]
    np.testing.assert_allclose(found["task_squares"], squares, rtol=1e-12)
    np.testing.assert_allclose(found["merged_square"], [(update**2).sum()], rtol=1e-12)


@pytest.mark.parametrize("svd", ["full", "gram"])
def test_opcm_onto_a_merge_of_low_rank(svd: str) -> None:
    """As a merged adapter leaves it: only directions that are there are closed, by every route the same."""
    first, second = random_deltas(20, 33, 1, rank=4)[0], random_deltas(20, 33, 1, seed=1)[0]
    update, found = solve("opcm", [first, second], {"svd": svd})
    left, values, right = (part[..., :4] for part in _thin_svd(first))
    inside = left.T @ second @ right
    rank = int((np.cumsum(values) / values.sum() > 0.5).argmax())
    mask = np.eye(4, dtype=bool) | (np.arange(4) < min(rank, 4))[:, None] & (np.arange(4) < rank)
    np.testing.assert_allclose(update, first + second - left @ np.where(mask, inside, 0) @ right.T, atol=1e-8)
    assert found["subspace_lost"][0] == 16


def _thin_svd(x: whole.Matrix) -> tuple[whole.Matrix, whole.Matrix, whole.Matrix]:
    left, values, right = np.linalg.svd(x, full_matrices=False)
    return left, values, right.T


@pytest.mark.parametrize("svd", ["full", "gram"])
def test_opcm_cleans_a_model_of_what_is_there(svd: str) -> None:
    """A model seen before adds nothing, nor does a multiple of it; one that is orthogonal is added whole."""
    first, second = random_deltas(18, 30, 2)
    np.testing.assert_allclose(solve("opcm", [first, first.copy()], {"svd": svd})[0], first, atol=1e-8)
    np.testing.assert_allclose(solve("opcm", [first, -3 * first], {"svd": svd})[0], first, atol=1e-8)
    left, _, right = np.linalg.svd(first, full_matrices=False)
    apart = second - second @ right.T @ right
    np.testing.assert_allclose(solve("opcm", [first, apart], {"svd": svd})[0], first + apart, atol=1e-8)
    # What was added lies outside the directions that were closed.
    rank = int(solve("opcm", [first, second], {"svd": svd})[1]["subspace_protected"][1])
    added = left.T @ (solve("opcm", [first, second], {"svd": svd})[0] - first) @ right.T
    assert rank > 0
    np.testing.assert_allclose(np.diag(added), 0, atol=1e-8)
    np.testing.assert_allclose(added[:rank, :rank], 0, atol=1e-8)


def test_calibration_of_one_task_changes_nothing() -> None:
    (delta,) = random_deltas(9, 14, 1)
    np.testing.assert_allclose(solve("mda", [delta], {"mode": "tsv", "svc": 0.1})[0], delta, atol=1e-10)
