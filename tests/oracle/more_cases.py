"""Recipes of mergekit's further methods, and what float64 says about them.

Random masks differ between the tools by design, so `dare_*` and `della*` are compared at density 1. Without a base
`nuslerp` and `multislerp` merge weights. `multislerp` of three stops in mergekit at a tensor that is frozen in all
models: with a base it is compared with two. Its step through the tangent space, zero but for rounding, puts a common
factor of up to 1 + 1e-6 on a tensor of weights: hence 32 units there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from oracle.expected import Array, Outcome, ulp
from support import reference_more as reference
from support.checkpoints import Family

Possible = Callable[[Array, list[Array]], Iterator[Outcome]]
"""From base and models, float32, to every right answer."""


@dataclass(frozen=True)
class MoreCase:
    """One recipe.

    Attributes
    ----------
    spherical : bool
        The two may be 4 units in the last place apart instead of 2, and ours as far from float64.
    apart : float
        How far mergekit may be from ours: more than that where it rounds directions, lengths, cosines or weights to
        float32 on the way.
    unstable : bool
        True if mergekit's arbitrary choice among equals also shifts the weights of a whole tensor: of bf16 checkpoints,
        where such ties abound, only ours is held against float64.
    rounded : bool
        True for sums of weighted task vectors in float32, as mergekit's: up to 3 units from float64.
    """

    name: str
    method: str
    possible: Possible
    parameters: dict[str, Any] = field(default_factory=dict)
    per_model: tuple[dict[str, Any], ...] = ({}, {}, {})
    base: bool = True
    spherical: bool = False
    apart: float = 2.0
    unstable: bool = False
    rounded: bool = False

    def recipe(self, family: Family, dtype: str) -> dict[str, Any]:
        """The recipe for a family; bf16 checkpoints are merged in float32 and rounded once by both tools."""
        models = [
            {"model": str(path), **({"parameters": own} if own else {})}
            for path, own in zip(family.experts, self.per_model, strict=False)
        ]
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "out_dtype": dtype, "models": models}
        if self.base:
            recipe["base_model"] = str(family.base)
        if self.method == "nearswap":
            models.insert(0, {"model": str(family.base)})
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        return recipe


def _wide(arrays: list[Array]) -> list[Array]:
    return [np.asarray(a, np.float64) for a in arrays]


def _of(value: Array, *terms: Array) -> Outcome:
    sizes = [np.abs(value), *(np.abs(np.broadcast_to(t, value.shape)) for t in terms)]
    return Outcome(value, np.max(sizes, axis=0).astype(np.float64))


def _vectors(base: Array, models: list[Array], based: bool) -> tuple[Array, list[Array]]:
    """The origin, and the vectors from it."""
    if based:
        return base.astype(np.float64), _wide([m - base for m in models])
    return np.zeros(base.shape), _wide(models)


def _nuslerp(t: float, along: str, based: bool) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        origin, (a, b) = _vectors(base, models, based)
        axis = None if along == "all" or base.ndim < 2 else -1 if along == "rows" else 0
        yield _of(origin + reference.nuslerp(a, b, t, axis), origin, a, b)

    return possible


def _multislerp(weights: tuple[float, ...], based: bool) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        origin, vectors = _vectors(base, models, based)
        whole = [w / sum(weights) for w in weights]
        yield _of(origin + reference.multislerp(vectors, whole), origin, *vectors)

    return possible


def _karcher(base: Array, models: list[Array]) -> Iterator[Outcome]:
    yield _of(reference.karcher(_wide(models)), *(m / len(models) for m in models))


def _model_stock(by_row: bool) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        yield _of(reference.model_stock(base.astype(np.float64), _wide(models), by_row), base, *models)

    return possible


def _nearswap(t: float) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        yield _of(reference.nearswap(base.astype(np.float64), models[0].astype(np.float64), t), base, models[0])

    return possible


def _ram(**options: float) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        origin, vectors = _vectors(base, models, True)
        yield _of(reference.ram(origin, vectors, **options), origin, *vectors)

    return possible


def _elected(vectors: Array, votes: Array) -> Iterator[Array]:
    """The elected signs, either one where the votes are within their own rounding of zero."""
    doubt = np.abs(votes) <= 2 * ulp(np.abs(vectors).max(0))
    for sign in (1.0, -1.0):
        yield np.where(doubt, sign, np.where(votes >= 0, 1.0, -1.0))


def _sce(topk: float) -> Possible:
    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        origin, vectors = _vectors(base, models, True)
        d = np.stack(vectors)
        score = d.var(axis=0)
        kept = int(np.count_nonzero(score) * topk)
        least = np.sort(score, axis=None)[score.size - kept] if kept else np.inf
        for slack in (0.0, 1e-5, -1e-5) if topk < 1 else (1.0,):
            chosen = d * (score >= least * (1 - slack))
            energy = (chosen**2).reshape(len(d), -1).mean(1)
            weights = np.full(len(d), 1 / len(d)) if energy.sum() < 1e-6 else energy / energy.sum()
            for signs in _elected(chosen, chosen.sum(0)):
                w = weights.reshape(-1, *[1] * base.ndim) * (np.sign(chosen) == signs)
                yield _of(origin + (w * chosen).sum(0) / np.maximum(w.sum(0), 1e-6), origin, *chosen)

    return possible


def _task_vectors(
    weights: tuple[float, ...], agree: bool, normalize: bool, trim: tuple[float, float] | None = None
) -> Possible:
    """Sums of task vectors; trimmed as `breadcrumbs` does if density and gamma are given."""

    def trimmed(delta: Array) -> Iterator[Array]:
        if trim is None:
            yield delta
            return
        size = np.abs(delta)
        kept = int(trim[0] * delta.size)
        first = max(0, delta.size - kept - int(trim[1] * delta.size))
        low, high = np.sort(size, axis=None)[[first, first + kept - 1]]
        for above, below in itertools.product((size >= low, size > low), (size <= high, size < high)):
            yield np.where(above & below, delta, 0)

    def possible(base: Array, models: list[Array]) -> Iterator[Outcome]:
        origin, vectors = _vectors(base, models, True)
        w = np.array(weights, np.float32).astype(np.float64).reshape(-1, *[1] * base.ndim)
        for chosen in itertools.product(*(list(trimmed(v)) for v in vectors)):
            terms = w * np.stack(chosen)
            for signs in _elected(terms, terms.sum(0)) if agree else [np.sign(terms)]:
                mask = np.sign(terms) == signs if agree else np.ones(terms.shape, bool)
                divisor = (w * mask).sum(0) if normalize else np.ones(base.shape)
                divisor = np.where(np.abs(divisor) < 1e-8, 1, divisor)
                value = origin + (terms * mask).sum(0) / divisor
                yield _of(value, origin, *terms, (terms * mask).sum(0))

    return possible


W2, W3 = (0.6, 0.3), (0.6, 0.3, 0.45)


def _weights(values: tuple[float, ...], **more: float) -> tuple[dict[str, Any], ...]:
    return tuple({"weight": w, **more} for w in values)


def _nuslerp_case(along: str, based: bool) -> MoreCase:
    parameters = {} if along == "all" else {"nuslerp_flatten": False, "nuslerp_row_wise": along == "columns"}
    name = f"nuslerp-{along}" + ("" if based else "-weights")
    possible = _nuslerp(0.3 / 0.9, along, based)
    return MoreCase(name, "nuslerp", possible, parameters, _weights(W2), based, spherical=True, apart=8.0)


CASES = (
    *(_nuslerp_case(along, based) for along in ("all", "rows", "columns") for based in (True, False)),
    MoreCase("multislerp", "multislerp", _multislerp(W2, True), {}, _weights(W2), spherical=True, apart=8.0),
    MoreCase(
        "multislerp-weights", "multislerp", _multislerp(W3, False), {}, _weights(W3), False, spherical=True, apart=32.0
    ),
    MoreCase("karcher", "karcher", _karcher, {}, base=False, spherical=True, apart=32.0),
    MoreCase("model-stock", "model_stock", _model_stock(False)),
    MoreCase("model-stock-rows", "model_stock", _model_stock(True), {"filter_wise": True}, apart=8.0),
    MoreCase("nearswap", "nearswap", _nearswap(0.001), {"t": 0.001}, ({},), apart=4.0),
    MoreCase("ram", "ram", _ram(epsilon=2e-3), {"epsilon": 2e-3}),
    MoreCase(
        "ramplus",
        "ramplus_tl",
        _ram(epsilon=2e-3, r=0.3, alpha=5.0),
        {"epsilon": 2e-3, "r": 0.3, "alpha": 5.0},
    ),
    MoreCase("ram-defaults", "ramplus_tl", _ram(epsilon=1e-5, r=0.1, alpha=0.2)),
    MoreCase("sce", "sce", _sce(1.0), apart=4.0),
    MoreCase("sce-selected", "sce", _sce(0.35), {"select_topk": 0.35}, apart=4.0, unstable=True),
    MoreCase(
        "breadcrumbs", "breadcrumbs", _task_vectors(W2, False, False, (0.6, 0.05)), {},
        _weights(W2, density=0.6, gamma=0.05), rounded=True,
    ),
    MoreCase(
        "breadcrumbs-ties", "breadcrumbs_ties", _task_vectors(W2, True, True, (0.7, 0.01)), {"normalize": True},
        _weights(W2, density=0.7), rounded=True,
    ),
    MoreCase("dare-linear-whole", "dare_linear", _task_vectors(W3, False, False), {}, _weights(W3), rounded=True),
    MoreCase("dare-ties-whole", "dare_ties", _task_vectors(W3, True, False), {}, _weights(W3), rounded=True),
    MoreCase("della-whole", "della", _task_vectors(W3, True, True), {}, _weights(W3), rounded=True),
    MoreCase("della-linear-whole", "della_linear", _task_vectors(W3, False, False), {}, _weights(W3), rounded=True),
)  # fmt: skip
