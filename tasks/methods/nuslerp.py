"""NuSLERP: spherical interpolation of two models, or of their task vectors if there is a base.

``t = w1 / (w0 + w1)``, a half where the weights cancel. Angles are between whole tensors; with ``nuslerp_flatten:
false`` between vectors along the last axis, or with `nuslerp_row_wise` along the first. The factors ``sin((1 - t) *
angle) / sin(angle)`` and ``sin(t * angle) / sin(angle)`` go on the vectors as they are; parallel and opposite vectors
are interpolated linearly. As in mergekit, a length counts as 1e-7 at least.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks import kernels, weighting
from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.columns import ColumnDots, Peaks, blend_columns, column_count
from mergepipe.tasks.gram import Gram, add_up, add_up_rows, row_grams, thin
from mergepipe.tasks.method import Array, Job, MergeMethod, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter

SMALLEST_LENGTH = 1e-7
SMALLEST_TOTAL = 1e-6
PARALLEL = 1e-16


def factors(t: float, dots: Array) -> Array:
    """Factors on the two vectors: shape (..., 2).

    Parameters
    ----------
    t : float
    dots : float64 ndarray, shape (..., 3)
        First squared, second squared, first times second.

    Examples
    --------
    >>> factors(0.25, np.array([[4.0, 9.0, 6.0], [4.0, 9.0, 0.0], [0.0, 0.0, 0.0]])).round(4).tolist()
    [[0.75, 0.25], [0.9239, 0.3827], [0.9239, 0.3827]]
    """
    lengths = np.maximum(np.sqrt(dots[..., :2]), SMALLEST_LENGTH)
    cosine = np.clip(dots[..., 2] / lengths[..., 0] / lengths[..., 1], -1, 1)
    parallel = 1 - cosine * cosine <= PARALLEL
    angle = np.arccos(np.where(parallel, 0.0, cosine))
    shares = np.array([1 - t, t])
    found: Array = np.where(parallel[..., None], shares, np.sin(shares * angle[..., None]) / np.sin(angle)[..., None])
    return found


def _t(job: Job) -> float:
    first, second = (float(params["weight"]) for params in job.model_params)
    return 0.5 if abs(first + second) < SMALLEST_TOTAL else second / (first + second)


def _along(job: Job) -> str:
    if job.params["nuslerp_flatten"] or len(job.shape) < 2:
        return "all"
    return "columns" if job.params["nuslerp_row_wise"] else "rows"


def _dots(gram: Array) -> Array:
    return np.stack([gram[..., 0, 0], gram[..., 1, 1], gram[..., 0, 1]], axis=-1)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    along = _along(job)
    own: tuple[Reduction, ...] = (Peaks(), ColumnDots()) if along == "columns" else (Gram(along == "rows"),)
    return (*family.reductions(job), *own)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    thin(job, state, tile)
    along, t = _along(job), _t(weighting.weighted(job, state))
    if along == "columns":
        left, right = tile.values
        blend_columns(left, right, tile.start % column_count(job), factors(t, state["_columns"]), out)
        if tile.base is not None:
            kernels.put_on_base(tile.base, 1.0, out)
    elif along == "rows":
        add_up_rows(job, tile, factors(t, _dots(row_grams(job, state, tile))), out)
    else:
        add_up(job, tile, factors(t, _dots(state["gram"])), out)


METHOD = MergeMethod(
    name="nuslerp",
    title="NuSLERP",
    summary="interpolates two models, or their task vectors, along the arc between them",
    base="optional",
    space="deltas",
    parameters=(
        weighting.weight("weight of a model; only their ratio counts"),
        *weighting.PARAMETERS,
        Parameter("nuslerp_flatten", "flag", "take each tensor as one vector", default=True),
        Parameter("nuslerp_row_wise", "flag", "without nuslerp_flatten: vectors along the first axis", default=False),
    ),
    kernel=_apply,
    reductions=_reductions,
    rounds=weighting.rounds,
    rounds_read=weighting.READ,
    min_models=2,
    max_models=2,
)
