"""What must hold for any matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError
from mergepipe.tasks.registry import METHODS
from mergepipe.tasks.subspace import directional, panels
from mergepipe.tasks.subspace.factor import factorize
from mergepipe.tasks.subspace.frames import nearest, truncated_polar
from mergepipe.tasks.subspace.panels import Made
from support import matrices as whole
from support.drive import make_job
from support.matrices import random_deltas, solve

pytestmark = pytest.mark.usefixtures("device")

WHOLE = sorted(name for name, method in METHODS.items() if method.matrix is not None and method.parameter("svd"))
"""Methods of matrices; others only calibrate them."""


def tensor(x: whole.Matrix) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).clone()


@pytest.mark.parametrize("way", ["full", "gram"])
@given(rows=st.integers(4, 40), count=st.integers(2, 12), seed=st.integers(0, 99))
def test_simplex_frame_is_one(way: str, rows: int, count: int, seed: int) -> None:
    count = min(count, rows)
    x = np.random.default_rng(seed).standard_normal((rows, count))
    frame = nearest(tensor(x), "etf", way, 1e-10)  # type: ignore[arg-type]
    vectors = frame.dense().numpy()
    expected = np.eye(count) * count / (count - 1) - 1 / (count - 1)
    np.testing.assert_allclose(vectors.T @ vectors, expected, atol=1e-10)
    np.testing.assert_allclose(vectors.sum(1), 0, atol=1e-10)
    turned = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((rows, rows)))[0] @ vectors
    assert np.linalg.norm(vectors - x) <= np.linalg.norm(turned - x) + 1e-12


def test_rank_of_the_update_is_one_less_than_the_directions() -> None:
    update, _ = solve("mda", random_deltas(30, 50, 3))
    assert np.linalg.matrix_rank(update) <= 29


@given(seed=st.integers(0, 99))
def test_signs_of_singular_vectors_do_not_matter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((9, 4)), rng.standard_normal((7, 4))
    flips = rng.choice([-1.0, 1.0], 4)
    for rule in ("maxabs", "balanced"):
        pairs = [(tensor(left), tensor(right)), (tensor(left * flips), tensor(right * flips))]
        for pair in pairs:
            directional._fix_signs(*pair, rule)
        for one, other in zip(*pairs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert all(pairs[0][0].abs().flatten().tolist() == np.abs(left).flatten().tolist() for _ in [0])


def test_balanced_signs_pull_the_sum_to_zero() -> None:
    left = np.random.default_rng(3).standard_normal((50, 12)) + 0.3
    right = np.ones((3, 12))
    by_rule = {}
    for rule in ("maxabs", "balanced"):
        columns = tensor(left)
        directional._fix_signs(columns, tensor(right), rule)
        by_rule[rule] = float(torch.linalg.norm(columns.sum(1)))
    assert by_rule["balanced"] < by_rule["maxabs"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("svd", ["full", "gram"])
def test_scaling_the_task_vectors_scales_the_update(name: str, svd: str) -> None:
    deltas = random_deltas(12, 19, 3)
    update, _ = solve(name, deltas, {"svd": svd})
    scaled, _ = solve(name, [4 * delta for delta in deltas], {"svd": svd})
    np.testing.assert_allclose(scaled, 4 * update, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("svd", ["full", "gram"])
def test_one_model_in_tsv_mode_comes_back(svd: str) -> None:
    (delta,) = random_deltas(12, 19, 1)
    np.testing.assert_allclose(solve("mda", [delta], {"mode": "tsv", "svd": svd})[0], delta, atol=1e-10)


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("shape", [(12, 19), (19, 12)], ids=str)
def test_identical_models_are_defined(name: str, svd: str, shape: tuple[int, int]) -> None:
    (delta,) = random_deltas(*shape, 1)
    update, found = solve(name, [delta, delta.copy()], {"svd": svd})
    assert np.isfinite(update).all()
    # The sum of twins, and the merge that one is projected on, have all their directions.
    whole_rank = name in ("iso_c", "opcm")
    assert found["subspace_lost"][0] > 0 or whole_rank
    assert found["subspace_repeated"][0] > 0 or svd == "full" or whole_rank
    full, _ = solve(name, [delta, delta.copy()], {"svd": "full"})
    np.testing.assert_allclose(update, full, atol=1e-6)


def test_identical_models_in_tsv_mode_split_the_model() -> None:
    # The polar factor of [U U] is [U U] / sqrt(2), on both sides: each copy counts half, together once.
    (delta,) = random_deltas(12, 12, 1)
    left, values, right = np.linalg.svd(delta)
    expected = (left[:, :6] * values[:6]) @ right[:6]
    for svd in ("full", "gram"):
        np.testing.assert_allclose(solve("tsv_m", [delta, delta], {"svd": svd})[0], expected, atol=1e-7)


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("name", WHOLE)
def test_models_equal_to_the_base(name: str, svd: str) -> None:
    zero = np.zeros((8, 11))
    update, found = solve(name, [zero, zero], {"svd": svd})
    np.testing.assert_array_equal(update, zero)
    assert found["subspace_lost"][0] > 0
    one, _ = solve(name, [random_deltas(8, 11, 1)[0], zero], {"svd": svd})
    assert np.isfinite(one).all()
    assert np.abs(one).max() > 0


@pytest.mark.parametrize("shape", [(40, 60), (60, 40)], ids=str)
@pytest.mark.parametrize("name", ["mda", "tsv_m"])
def test_low_rank_task_vectors(name: str, shape: tuple[int, int]) -> None:
    """As merged adapters have them: the Gram route finds the few components there are, no noise beside them."""
    deltas = random_deltas(*shape, 3, rank=4)
    by_gram, found = solve(name, deltas, {"svd": "gram"})
    assert found["subspace_ranks"].tolist() == [4, 4, 4]
    by_svd, _ = solve(name, deltas, {"svd": "full"})
    np.testing.assert_allclose(by_gram, by_svd, atol=1e-8)
    np.testing.assert_allclose(by_gram, whole.mda(deltas, "etf" if name == "mda" else "tsv", rank=4), atol=1e-8)


@pytest.mark.parametrize("target", ["polar", "etf"])
@pytest.mark.parametrize("spread", [3, 6, 7.5])
def test_ill_conditioned_frames(target: str, spread: float) -> None:
    """Singular values down to 10**-spread: beyond 1e-5 the Gram step is repeated, and nothing is lost."""
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.standard_normal((n, 20)))[0] for n in (50, 20))
    x = (left * np.logspace(0, -spread, 20)) @ right.T
    by_svd = nearest(tensor(x), target, "full", 1e-10)  # type: ignore[arg-type]
    by_gram = nearest(tensor(x), target, "gram", 1e-10)  # type: ignore[arg-type]
    assert by_gram.repeated == (spread > 5)
    assert by_gram.rank == by_svd.rank
    np.testing.assert_allclose(by_gram.dense(), by_svd.dense(), atol=1e-6 if spread > 5 else 1e-9)


@given(count=st.integers(1, 12), rank=st.integers(1, 12), seed=st.integers(0, 99))
def test_truncated_polar(count: int, rank: int, seed: int) -> None:
    rank = min(rank, count)
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.standard_normal((count, count)))[0][:, :rank] for _ in range(2))
    values = rng.uniform(0.01, 1, rank)
    noise = 1e-14 * rng.standard_normal((count, count))
    factor, found, ratio = truncated_polar(tensor((left * values) @ right.T + noise), 1e-10)
    assert found == rank
    np.testing.assert_allclose(factor, left @ right.T, atol=1e-9)
    assert ratio == pytest.approx((values.min() / values.max()) ** 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 300_000), (300_000, 40), (70_000, 60), (5, 5)], ids=str)
def test_panels_add_up(shape: tuple[int, int]) -> None:
    """Several panels, a last one that is short, rows wider than a block."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    made = Made(shape, lambda span: x[span[0] : span[1]].clone())
    spans = panels.spans(shape)
    assert [first for first, _ in spans[1:]] == [last for _, last in spans[:-1]]
    assert spans[-1][1] == shape[0]
    small = x.T @ x if shape[1] <= shape[0] else x @ x.T
    torch.testing.assert_close(panels.gram(made, x), small)
    torch.testing.assert_close(
        panels.times(made, torch.ones(shape[1], 3, dtype=x.dtype)), x.sum(1)[:, None].expand(-1, 3)
    )
    torch.testing.assert_close(panels.transposed_times(made, torch.ones(shape[0], 2, dtype=x.dtype))[:, 1], x.sum(0))
    for span in spans:
        assert panels.rows_of(shape, panels.blocks_of(shape, span)) == span


def test_gram_factors_of_several_panels() -> None:
    x = torch.randn(30, 400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for whole_matrix in (x, x.T.contiguous()):
        shape = (whole_matrix.shape[0], whole_matrix.shape[1])
        made = Made(shape, lambda span, of=whole_matrix: of[span[0] : span[1]].clone())
        found = factorize(made, 30, "gram", x)
        torch.testing.assert_close((found.left * found.values) @ found.right.T, whole_matrix)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("mda", {"rank": 9}, "rank 9 is larger than 'layer.weight'"),
        ("dc_merge", {"rank": 9}, "larger"),
        ("mda", {"rank": 8}, "room for a simplex frame of 9"),
        ("mda", {"rank": 1.0, "mode": "projection"}, "at most 4"),
        ("mda", {"rank": 7, "mode": "tsv", "right_align": "etf"}, "room for a simplex frame of 12"),
    ],
)
def test_too_many_components(name: str, params: dict[str, object], message: str) -> None:
    method, job = make_job(name, (8, 11), np.float32, [{}, {}], params)
    assert method.matrix is not None
    with pytest.raises(RecipeError, match=message):
        method.matrix.peak(job)


@pytest.mark.parametrize(
    ("tensor_name", "shape", "taken"),
    [
        ("model.layers.0.up_proj.weight", (8, 11), True),
        ("model.embed_tokens.weight", (8, 11), False),
        ("lm_head.weight", (8, 11), False),
        ("norm.weight", (8,), False),
        ("experts", (2, 8, 11), False),
        ("empty", (0, 8), False),
        ("scale", (), False),
    ],
)
def test_which_tensors_are_matrices(tensor_name: str, shape: tuple[int, ...], taken: bool) -> None:
    for name in WHOLE:
        method, job = make_job(name, shape, np.float32, [{}, {}], tensor=tensor_name)
        assert (method.whole(job) is not None) == taken
