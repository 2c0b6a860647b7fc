"""Arcee Fusion: its published rule, with exact quartiles and a divergence that is no noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergepipe.tasks.method import Array
from mergepipe.tasks.registry import method
from support.drive import merge


def published(a: Array, b: Array) -> tuple[Array, float]:
    """The rule as it is published, in float64: scores with 1e-8 on the probabilities, and their fence."""
    p, q = (np.exp(v - v.max(-1, keepdims=True)) for v in (b, a))
    p, q = (v / v.sum(-1, keepdims=True) + 1e-8 for v in (p, q))
    scores = np.abs(b - a) * (p * np.log(p / q)).sum(-1, keepdims=True)
    ranked = np.sort(scores.ravel())
    low, middle, high = (ranked[int(share * (scores.size - 1))] for share in (0.25, 0.5, 0.75))
    return scores, middle + 1.5 * (high - low)


@pytest.mark.parametrize("shape", [(40, 65), (3, 7, 20), (500,), (2, 70_001)])
def test_takes_what_the_published_rule_takes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(0, 0.02, shape)
    b = a + rng.normal(0, 1e-3, shape) * rng.uniform(0, 2, (*shape[:-1], 1))
    scores, fence = published(a, b)
    merged = merge("arcee_fusion", [b], a)
    taken = merged.out != a
    # 1e-8 beside probabilities of 1/70,000 is what the two differ by.
    assert merged.state["thresholds"][0] == pytest.approx(fence, rel=5e-3)
    sure = np.abs(scores - fence) > 1e-2 * fence
    np.testing.assert_array_equal(taken[sure], (scores >= fence)[sure])
    np.testing.assert_array_equal(merged.out, np.where(taken, b, a))
    assert merged.state["densities"][0] == taken.mean()
    assert 0 < taken.mean() < 0.4


def test_is_scf_rkl_with_the_other_threshold() -> None:
    rng = np.random.default_rng(1)
    a = rng.normal(0, 0.02, (300, 40)).astype("f4")
    b = (a + rng.normal(0, 1e-3, a.shape)).astype("f4")
    theirs = merge("arcee_fusion", [b], a)
    ours = merge("scf_rkl", [b], a, params={"threshold": "iqr"})
    assert theirs.out.tobytes() == ours.out.tobytes()
    assert theirs.state.keys() == ours.state.keys()


def test_quartiles_are_those_of_the_whole_tensor() -> None:
    """Above a million elements the published code samples; here it is the exact threshold, always the same."""
    rng = np.random.default_rng(2)
    a = rng.normal(0, 0.02, (1100, 1000))
    b = a + rng.normal(0, 1e-3, a.shape)
    _, fence = published(a, b)
    found: Any = [merge("arcee_fusion", [b], a, order=order).state["thresholds"][0] for order in (None, 1)]
    assert found[0] == found[1] == pytest.approx(fence, rel=1e-4)


def test_takes_one_model() -> None:
    assert method("arcee_fusion").max_models == 1
    assert method("arcee_fusion").base == "primary"
