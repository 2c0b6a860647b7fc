"""mergekit's further methods once more, in a few lines of NumPy and float64 each: formulas, not our factorisations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from support.reference import F64


def breadcrumbs(delta: F64, density: float, gamma: float, rescale: bool = False) -> F64:
    n = delta.size
    kept, size = int(density * n), np.abs(delta)
    if density >= 1:
        return delta
    if kept == 0:
        return np.zeros_like(delta)
    first = max(0, n - kept - int(gamma * n))
    ranked = np.sort(size.reshape(-1))[first : first + kept]
    thinned = np.where((size >= ranked[0]) & (size <= ranked[-1]), delta, 0)
    after = np.abs(thinned).sum()
    return thinned * size.sum() / after if rescale and after > 0 else thinned


def keep_probabilities(delta: F64, density: float, epsilon: float) -> F64:
    rows = np.abs(delta).reshape(-1, delta.shape[-1]) if delta.ndim else np.abs(delta).reshape(1, 1)
    ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1).reshape(delta.shape)
    n = rows.shape[1]
    return density - epsilon + 2 * epsilon * ranks / (n - 1) if n > 1 else np.full(delta.shape, density)


def nuslerp(a: F64, b: F64, t: float, axis: int | None) -> F64:
    """Of the vectors along `axis`; None takes each array as one vector."""
    if axis is None:
        return nuslerp(a.reshape(-1), b.reshape(-1), t, 0).reshape(a.shape)
    lengths = [np.maximum(np.linalg.norm(x, axis=axis, keepdims=True), 1e-7) for x in (a, b)]
    cosine = np.clip((a / lengths[0] * (b / lengths[1])).sum(axis, keepdims=True), -1, 1)
    flat = 1 - cosine**2 <= 1e-16
    angle = np.arccos(np.where(flat, 0, cosine))
    arc = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.where(flat, (1 - t) * a + t * b, arc)


def fisher(
    base: F64 | None,
    models: Sequence[F64],
    importances: Sequence[F64],
    weights: Sequence[float],
    floor: float = 0.0,
    plain: bool = False,
    scale: float = 1.0,
) -> F64:
    w = np.array(weights, "f8").reshape(-1, *[1] * models[0].ndim)
    counted = np.maximum(np.stack(importances), floor)
    values = np.stack(models) - (0 if base is None else base)
    divisor = (counted if plain else w * counted).sum(0)
    mean = (w * values).sum(0) / (len(models) if plain else w.sum())
    found = np.where(divisor > 0, (w * counted * values).sum(0) / np.where(divisor > 0, divisor, 1), mean)
    return np.asarray(scale * found + (0 if base is None else base))


def robustmerge(
    downs: Sequence[F64], ups: Sequence[F64], mask_ratio: float = 0.2, att_ratio: float = 0.2, scale: float = 2.0
) -> tuple[F64, F64]:
    """A and B of one pair; `downs` are of shape (rank, inputs), `ups` of shape (outputs, rank)."""

    def masked(x: F64) -> F64:
        least = np.sort(np.abs(x).reshape(-1))[x.size - max(1, int(mask_ratio * x.size))]
        return np.where(np.abs(x) >= least, x, 0)

    scales = []
    for down in downs:
        after = np.abs(masked(down)).sum(1)
        own = np.where(after > 0, np.abs(down).sum(1) / np.where(after > 0, after, 1), 0)
        bound = np.sort(own)[min(max(math.ceil((1 - att_ratio) * own.size - 1e-9) - 1, 0), own.size - 1)]
        scales.append(np.maximum(own, bound))
    total = np.sum(scales, axis=0)
    up = np.sum([masked(b) * s for b, s in zip(ups, scales, strict=True)], axis=0) / total
    return scale * np.sum([masked(a) for a in downs], axis=0), scale * up


def multislerp(vectors: Sequence[F64], weights: Sequence[float], eps: float = 1e-8) -> F64:
    """With the way through the tangent space, which leads nowhere."""
    v, w = np.stack(vectors).reshape(len(vectors), -1), np.array(weights)
    lengths = np.linalg.norm(v, axis=1)
    units = v / (lengths + eps)[:, None]
    mean = w @ units
    if len(v) == 1 or np.linalg.norm(mean) < eps:
        return ((w if len(v) > 1 else np.ones(1)) @ v).reshape(vectors[0].shape)
    mean /= np.linalg.norm(mean)
    tangent = w @ (units - (units @ mean)[:, None] * mean)
    far = np.linalg.norm(tangent) + eps
    return ((mean * math.cos(far) + tangent * math.sin(far) / far) * (w @ lengths)).reshape(vectors[0].shape)


def karcher(vectors: Sequence[F64], max_iter: int = 10, tol: float = 1e-5) -> F64:
    v = np.stack(vectors).reshape(len(vectors), -1)
    lengths = np.linalg.norm(v, axis=1)
    units = [x / n for x, n in zip(v, lengths, strict=True) if n > tol]
    if not units:
        return np.zeros_like(vectors[0])
    mean = np.mean(units, axis=0)
    mean = units[0] if np.linalg.norm(mean) < tol else mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        angles = [math.acos(min(1, max(-1, mean @ u))) for u in units]
        pulls = [a / math.sin(a) * (u - (mean @ u) * mean) for a, u in zip(angles, units, strict=True) if a >= tol]
        tangent = sum(pulls, np.zeros_like(mean)) / len(units)
        step = float(np.linalg.norm(tangent))
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
        mean /= np.linalg.norm(mean)
    return (lengths.mean() * mean).reshape(vectors[0].shape)


def model_stock(base: F64, models: Sequence[F64], by_row: bool = False) -> F64:
    if not by_row or base.ndim < 2:
        return model_stock(base.reshape(1, -1), [m.reshape(1, -1) for m in models], True).reshape(base.shape)
    deltas, k, cosines = [m - base for m in models], len(models), []
    for i, a in enumerate(deltas):
        for b in deltas[i + 1 :]:
            product = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
            cosines.append(np.clip((a * b).sum(-1) / np.maximum(product, 1e-6), -1, 1))
    c = np.mean(cosines, axis=0)[..., None]
    divisor = 1 + (k - 1) * c
    t = np.where(np.abs(divisor) < 1e-6, 0, k * c / np.where(np.abs(divisor) < 1e-6, 1, divisor))
    return t * sum(models) / k + (1 - t) * base  # type: ignore[return-value]


def nearswap(base: F64, other: F64, t: float) -> F64:
    w = np.clip(t / np.maximum(np.abs(base - other), 1e-6), 0, 1)
    return w * other + (1 - w) * base


def sce(base: F64, deltas: Sequence[F64], topk: float = 1.0, equal_below: float = 1e-6) -> F64:
    d = np.stack(deltas)
    if topk < 1:
        score = d.var(axis=0).astype("f4").astype("f8")
        kept = int(np.count_nonzero(score) * topk)
        d = d * (score >= np.sort(score.reshape(-1))[score.size - kept]) if kept else d * 0
    energy = (d**2).reshape(len(d), -1).mean(1)
    weights = np.full(len(d), 1 / len(d)) if energy.sum() < equal_below or not energy.sum() else energy / energy.sum()
    w = weights.reshape(-1, *[1] * base.ndim) * (np.sign(d) == np.where(d.sum(0) >= 0, 1, -1))
    return base + (w * d).sum(0) / np.maximum(w.sum(0), 1e-6)


def ram(base: F64, deltas: Sequence[F64], epsilon: float = 1e-5, r: float = 0.0, alpha: float = 0.0) -> F64:
    d = np.stack(deltas)
    changed = np.abs(d) > epsilon
    count = changed.sum(0)
    axes: Any = tuple(range(1, d.ndim))
    shared, alone = ((changed & which).sum(axes) for which in (count > 1, count == 1))
    factor = 1 + r * np.clip(shared / np.maximum(alone, epsilon), 0, alpha)
    factor = factor.reshape(-1, *[1] * base.ndim)
    return base + (d * changed * np.where(count == 1, factor, 1 / np.maximum(count, 1))).sum(0)
