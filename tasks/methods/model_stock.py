"""Model Stock: how far to go from the base to the mean of the models, from the angles between their task vectors.

``out = base + t * mean(task vectors)`` with ``t = K * c / (1 + (K - 1) * c)``, c the mean cosine of all pairs; of the
whole tensor, or with `filter_wise` of each row along the last axis. Where the divisor vanishes t is 0. As in mergekit,
a product of two lengths counts as 1e-6 at least.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import Gram, add_up, add_up_rows, row_grams, thin
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter

SMALLEST_PRODUCT = 1e-6
SINGULAR = 1e-6


def ratio(gram: Array) -> Array:
    """How far to go, from Gram matrices of task vectors: shape (..., models, models) to (...).

    Examples
    --------
    >>> ratio(np.array([[1.0, 0.5], [0.5, 1.0]])).round(6), ratio(np.array([[1.0, -1.0], [-1.0, 1.0]]))
    (np.float64(0.666667), array(0.))
    """
    count = gram.shape[-1]
    i, j = np.triu_indices(count, 1)
    lengths = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    products = np.maximum(lengths[..., i] * lengths[..., j], SMALLEST_PRODUCT)
    cosine = np.clip(gram[..., i, j] / products, -1, 1).mean(axis=-1)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < SINGULAR
    found: Array = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return found


def _by_row(job: Job) -> bool:
    return bool(job.params["filter_wise"]) and len(job.shape) > 1


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return (*family.reductions(job), Gram(_by_row(job)))


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    thin(job, state, tile)
    if _by_row(job):
        factors = ratio(row_grams(job, state, tile)) / job.models
        add_up_rows(job, tile, np.repeat(factors[:, None], job.models, axis=1), out)
    else:
        add_up(job, tile, np.full(job.models, ratio(state["gram"]) / job.models), out)


METHOD = MergeMethod(
    name="model_stock",
    title="Model Stock",
    summary="goes from the base towards the mean of the models as far as the angles between them suggest",
    base="required",
    space="deltas",
    parameters=(Parameter("filter_wise", "flag", "decide row by row instead of by tensor", default=False),),
    kernel=_apply,
    reductions=_reductions,
    min_models=2,
    paper=Paper("Model Stock: All we need is just a few fine-tuned models", "https://arxiv.org/abs/2403.19522"),
)
