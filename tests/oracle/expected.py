"""What one tensor of a merge may be: float64 results, and the largest number each element's sum goes through.

That number is the largest of the terms (before they are divided by the sum of weights), of the partial sums and of the
result: what float32 arithmetic rounds to, whichever of the usual orders it adds in.

`ties` keeps the k largest of a tensor. Where several elements have the k-th largest size, mergekit keeps an arbitrary
choice of them and mergepipe all: at such an element every choice counts as right, and nowhere else. Likewise where the
deltas cancel to within their own rounding, so that the elected sign is a matter of the last bit, either sign is right.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from oracle.cases import Values

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Outcome:
    """One right answer for every element, float64, with the size of the largest number its sum goes through."""

    value: Array
    largest: Array


def outcomes(method: str, values: Values, base: Array, models: list[Array]) -> list[Outcome]:
    """Every right answer. The first is the one that keeps all elements at the threshold.

    Parameters
    ----------
    method : str
    values : Values
    base : float32 ndarray
        For `slerp`, the first of the two models; not used by `linear` and `passthrough`.
    models : list of float32 ndarray
    """
    if method == "linear":
        return [_sum(_weighted(models, values), divisor=_total(values))]
    if method == "passthrough":
        return [_sum([models[0].astype(np.float64) * np.float32(values.scale)])]
    if method == "slerp":
        return [_slerp(values.t, base.astype(np.float64), models[0].astype(np.float64))]
    deltas = [model - base for model in models]
    if method == "task_arithmetic":
        return [_sum(_weighted(deltas, values), _total(values), base, values.lam)]
    choices = itertools.product((1.0, -1.0), itertools.product((True, False), repeat=len(deltas)))
    return [_ties(values, base, deltas, keep_tied, sign) for sign, keep_tied in choices]


def at_threshold(values: Values, base: Array, models: list[Array]) -> Array:
    """Where some model's delta has exactly the size of its `ties` threshold, and some other element has it too."""
    tied = np.zeros(base.shape, bool)
    for model, density in zip(models, values.density, strict=True):
        size = np.abs(model - base)
        here = size == _threshold(size, density)
        tied |= here & (np.count_nonzero(here) > 1)
    return tied


def _weighted(arrays: list[Array], values: Values) -> list[Array]:
    return [a.astype(np.float64) * float(np.float32(w)) for a, w in zip(arrays, values.weight, strict=True)]


def _total(values: Values) -> float:
    return sum(float(np.float32(w)) for w in values.weight) if values.normalize else 1.0


def _sum(terms: list[Array], divisor: Any = 1.0, base: Any = 0.0, scale: float = 1.0) -> Outcome:
    """``base + scale * (sum of terms) / divisor``."""
    partial = np.cumsum(terms, axis=0)
    value = base + float(np.float32(scale)) * partial[-1] / divisor
    sizes = [np.abs(terms).max(0), np.abs(partial).max(0), np.abs(value), np.abs(np.broadcast_to(base, value.shape))]
    return Outcome(value, np.max(sizes, axis=0))


def _threshold(size: Array, density: float) -> float:
    k = max(1, int(density * size.size))
    return float(np.sort(size, axis=None)[size.size - k])


def _ties(
    values: Values, base: Array, deltas: list[Array], keep_tied: tuple[bool, ...], sign_of_doubt: float
) -> Outcome:
    kept = []
    for delta, density, inclusive in zip(deltas, values.density, keep_tied, strict=True):
        size = np.abs(delta)
        threshold = _threshold(size, density)
        mask = (size >= threshold) if inclusive or density >= 1 else (size > threshold)
        kept.append(np.where(mask, delta, 0))
    weights = [float(np.float32(w)) for w in values.weight]
    terms = np.stack([delta.astype(np.float64) * weight for delta, weight in zip(kept, weights, strict=True)])
    votes = terms.sum(0)
    doubt = np.abs(votes) <= 2 * ulp(np.abs(terms).max(0))
    elected = np.where(doubt, sign_of_doubt, np.where(votes >= 0, 1.0, -1.0))
    agree = np.sign(terms) == elected
    total = np.tensordot(weights, agree, 1) if values.normalize else np.ones(base.shape)
    return _sum(list(np.where(agree, terms, 0)), np.where(total == 0, 1, total), base, values.lam)


def _slerp(t: float, a: Array, b: Array) -> Outcome:
    lengths = [math.sqrt(float(np.sum(x * x))) for x in (a, b)]
    cosine = float(np.sum(a * b)) / (lengths[0] * lengths[1]) if min(lengths) > 0 else 0.0
    if abs(cosine) > 0.9995:
        return _sum([(1 - t) * a, t * b])
    angle = math.acos(cosine)
    return _sum([math.sin((1 - t) * angle) / math.sin(angle) * a, math.sin(t * angle) / math.sin(angle) * b])


def ulp(size: Array) -> Array:
    """Spacing of float32 numbers at each size, as float64."""
    return np.spacing(size.astype(np.float32)).astype(np.float64)


def distance(result: Array, possible: list[Outcome]) -> Array:
    """How far each element is from the nearest right answer."""
    nearest: Array = np.min([np.abs(result.astype(np.float64) - outcome.value) for outcome in possible], axis=0)
    return nearest


def agrees(result: Array, possible: list[Outcome], ulps: float) -> Array:
    """Where `result` is one of the possible answers, given `ulps` of error in float32 before the last rounding.

    Parameters
    ----------
    result : float32 or bfloat16 ndarray
        A bfloat16 result may be the rounding of any float32 number within the allowed error.
    """
    right = np.zeros(result.shape, bool)
    for outcome in possible:
        error = ulps * ulp(outcome.largest)
        low, high = outcome.value - error, outcome.value + error
        if result.dtype == ml_dtypes.bfloat16:
            low, high = (x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for x in (low, high))
        right |= (result.astype(np.float64) >= low) & (result.astype(np.float64) <= high)
    return right
