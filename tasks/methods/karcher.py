"""Karcher mean: the mean of the models' directions on the sphere, at the mean of their lengths.

The mean of the sphere is where the tangent vectors towards all models add up to nothing; it is found by going along
their mean, up to `max_iter` times or until a step is shorter than `tol`. All of it happens to coefficients of the
models, with the Gram matrix for lengths and angles. Models no longer than `tol` have no direction and count in the
length only; a model opposite to the mean, which has no tangent vector, does not pull.
"""

from __future__ import annotations

import math

import numpy as np

from mergepipe.tasks.gram import Gram, add_up
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter

OPPOSITE = 1e-7
"""Sine of an angle near pi below which two directions count as opposite."""


def _length(vector: Array, gram: Array) -> float:
    return math.sqrt(max(0.0, float(vector @ gram @ vector)))


def _tangent(mean: Array, units: Array, gram: Array, tol: float) -> Array:
    """Mean of the tangent vectors at `mean` towards each of `units`; all are coefficients."""
    tangent = np.zeros_like(mean)
    for unit in units:
        cosine = min(1.0, max(-1.0, float(mean @ gram @ unit)))
        angle = math.acos(cosine)
        if angle >= tol and math.sin(angle) > OPPOSITE:
            tangent += angle / math.sin(angle) / len(units) * (unit - cosine * mean)
    return tangent


def mean_factors(gram: Array, max_iter: int, tol: float) -> Array:
    """Factors on the models that add up to their Karcher mean.

    Parameters
    ----------
    gram : float64 ndarray, shape (models, models)

    Examples
    --------
    >>> mean_factors(np.array([[1.0, 0.0], [0.0, 9.0]]), 10, 1e-5).round(6).tolist()
    [1.414214, 0.471405]
    """
    lengths = np.sqrt(np.diagonal(gram))
    valid = lengths > tol
    if not valid.any():
        return np.zeros(len(gram))
    units = np.diag(1 / np.where(valid, lengths, 1))[valid]
    mean = units.mean(axis=0)
    length = _length(mean, gram)
    mean = units[0] if length < tol else mean / length
    for _ in range(max_iter):
        tangent = _tangent(mean, units, gram, tol)
        step = _length(tangent, gram)
        if step < tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        mean = mean / _length(mean, gram)
    found: Array = lengths.mean() * mean
    return found


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return () if job.models == 1 else (Gram(),)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    if job.models == 1:
        out[:] = tile.values[0]
    else:
        add_up(job, tile, mean_factors(state["gram"], job.params["max_iter"], job.params["tol"]), out)


METHOD = MergeMethod(
    name="karcher",
    title="Karcher Mean",
    summary="takes the Riemannian mean of the models' directions, at their mean length",
    base="ignored",
    space="weights",
    parameters=(
        Parameter("max_iter", "integer", "steps at most", default=10, minimum=0, maximum=10_000),
        Parameter("tol", "number", "length of a step, of an angle and of a model that counts as nothing", default=1e-5,
                  minimum=0, open_minimum=True),
    ),
    kernel=_apply,
    reductions=_reductions,
    paper=Paper("Karcher mean of models", "https://arxiv.org/abs/2603.04972"),
)  # fmt: skip
