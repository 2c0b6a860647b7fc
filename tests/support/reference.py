"""Every method once more, in a few lines of NumPy and float64: what the kernels are held against."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def linear(models: Sequence[F64], weights: Sequence[float], normalize: bool = True) -> F64:
    total: F64 = np.sum([w * x for w, x in zip(weights, models, strict=True)], axis=0)
    return total / sum(weights) if normalize else total


def slerp(base: F64, other: F64, t: float) -> F64:
    a, b = np.linalg.norm(base), np.linalg.norm(other)
    cosine = float(np.vdot(base, other) / a / b) if min(a, b) > 1e-8 else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * base + t * other
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * base + math.sin(t * angle) * other) / math.sin(angle)


def keep_largest(delta: F64, dropped: int, tie_rule: str = "keep") -> F64:
    """Zero the `dropped` smallest magnitudes: as a mask by threshold, or exactly, by a stable descending sort."""
    flat = delta.reshape(-1)
    if dropped >= flat.size:
        return np.zeros_like(delta)
    if tie_rule == "keep":
        return np.where(np.abs(delta) >= np.sort(np.abs(flat))[dropped], delta, 0)
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-np.abs(flat), kind="stable")[: flat.size - dropped]] = True
    return np.where(mask.reshape(delta.shape), delta, 0)


def magnitude(delta: F64, density: float, tie_rule: str = "keep", rescale: bool = False) -> F64:
    n = delta.size
    kept = 0 if density <= 0 else n if density >= 1 else min(n, max(1, int(density * n)))
    thinned = keep_largest(delta, n - kept, tie_rule)
    after = np.abs(thinned).sum()
    return thinned * np.abs(delta).sum() / after if rescale and after > 0 else thinned


def density_of(delta: F64, metric: str = "quantile_ratio", q_lo: float = 0.5, q_hi: float = 0.95) -> float:
    a = np.sort(np.abs(delta).reshape(-1))
    n, ones, twos = a.size, a.sum(), math.sqrt((a * a).sum())
    if metric == "quantile_ratio":
        low, high = (a[min(max(math.ceil(p * n - 1e-9) - 1, 0), n - 1)] for p in (q_lo, q_hi))
        return float(low / high) if high else 0.0
    if twos == 0 or (metric == "hoyer" and n == 1):
        return 0.0
    if metric == "hoyer":
        return float(1 - (math.sqrt(n) - ones / twos) / (math.sqrt(n) - 1))
    return float((ones / twos / math.sqrt(n)) ** (2 if metric == "participation" else 1))


def tadrop(delta: F64, options: Mapping[str, Any], rate: float | None = None) -> F64:
    """By magnitude; `rate` where it is given, instead of the one that follows from the metric."""
    n = delta.size
    if rate is None:
        d = density_of(delta, options.get("metric", "quantile_ratio"))
        rate = min(max(options.get("s_offset", 0) + options.get("s_slope", 1) * d, 0), options.get("s_cap", 0.99))
    thinned = keep_largest(delta, min(n - 1, math.floor(rate * n + 1e-6)), options.get("tie_rule", "keep"))
    order = {"l1": 1, "l2": 2}.get(options.get("rescale", "none"))
    after = np.linalg.norm(thinned.reshape(-1), order) if order else 0
    return thinned * np.linalg.norm(delta.reshape(-1), order) / after if after else thinned


def task_vectors(
    base: F64,
    deltas: Sequence[F64],
    weights: Sequence[float],
    consensus: str,
    normalize: bool,
    scale: float = 1.0,
    signs: F64 | None = None,
) -> F64:
    """Deltas are thinned already; `signs` overrides the elected ones."""
    terms = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    w = np.array(weights).reshape(-1, *[1] * base.ndim)
    if consensus == "none":
        divisor: Any = sum(weights) if normalize and abs(sum(weights)) >= 1e-8 else 1
        return np.asarray(base + scale * terms.sum(0) / divisor)
    if signs is None:
        signs = np.where((terms if consensus == "sum" else np.sign(terms)).sum(0) >= 0, 1.0, -1.0)
    agrees = np.sign(terms) == signs
    divisor = (w * agrees).sum(0)
    divisor = np.where((divisor == 0) | (not normalize), 1, divisor)
    return np.asarray(base + scale * (terms * agrees).sum(0) / divisor)
