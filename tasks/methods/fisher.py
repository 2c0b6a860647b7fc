"""Fisher-weighted averaging: each element of each model counts by how much that model's task depends on it.

``sum_k w_k F_k W_k / sum_k w_k F_k``, element by element; with a base the same of task vectors, times `lambda`, put on
the base. ``F_k`` is the diagonal of the model's Fisher information, or any other importance that is not negative: a
checkpoint of the model's own names and shapes, which the recipe gives as `importance` beside the model. Where no model
has any importance, the weights alone decide.

``divide_by: importance`` leaves the weights out of the divisor; with `lambda` the number of models, that is DF-Merge
(arXiv:2504.18992) for given weights and importances.
"""

from __future__ import annotations

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import kernels
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS


@kernel
def _average(
    base: Array, values: Array, importance: Array, weights: Array, floor: float, plain: bool, scale: float, out: Array
) -> None:
    """In float64, rounded once. `plain` divides by the importances alone, without the weights."""
    models = values.shape[0]
    total, divisor = np.empty(kernels.STRIP), np.empty(kernels.STRIP)
    shares, everything = np.empty(kernels.STRIP), weights.sum()
    for start in range(0, out.size, kernels.STRIP):
        merged, below = out[start : start + kernels.STRIP], base[start : start + kernels.STRIP]
        total[:] = 0
        divisor[:] = 0
        shares[:] = 0
        for k in range(models):
            weight = weights[k]
            row, own = values[k][start : start + kernels.STRIP], importance[k][start : start + kernels.STRIP]
            for i in range(merged.size):
                counted = max(np.float64(own[i]), floor)
                total[i] += weight * counted * np.float64(row[i])
                shares[i] += weight * np.float64(row[i])
                divisor[i] += counted if plain else weight * counted
        for i in range(merged.size):
            found = total[i] / divisor[i] if divisor[i] > 0.0 else shares[i] / (models if plain else everything)
            merged[i] = np.float64(below[i]) + scale * found


def _reductions(job: Job) -> tuple[Reduction, ...]:
    """Those of the sparsifier; refuses, while planning, weights of which none counts.

    Raises
    ------
    RecipeError
        If all weights of the tensor are zero.
    """
    if not job.per_model("weight").any():
        message = f"all weights of {job.name!r} are 0: nothing is left to average, change one"
        raise RecipeError([Fault("$.models[*].parameters.weight", message)])
    return SPARSIFIERS[job.sparsify].reductions(job)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.importance is not None, "the method declares that it takes them"
    thin(job, state, tile)
    base = tile.base
    if base is None:
        base = tile.scratch[0]
        base[:] = 0
    weights = np.array([params["weight"] for params in job.model_params])
    plain = job.params["divide_by"] == "importance"
    scale = float(job.params["lambda"])
    _average(base, tile.values, tile.importance, weights, float(job.params["floor"]), plain, scale, out)


METHOD = MergeMethod(
    name="fisher",
    title="Fisher-weighted averaging",
    summary="averages the models element by element, by an importance checkpoint beside each (`importance: FOLDER`)",
    base="optional",
    space="deltas",
    parameters=(
        Parameter("weight", "number", "weight of a model, beside its importances", 1.0, per_model=True, minimum=0),
        Parameter("lambda", "number", "factor on the average; on its task vector if there is a base", default=1.0),
        Parameter("floor", "number", "importances below this count as this", default=0.0, minimum=0),
        Parameter(
            "divide_by", "choice", "divide by the weighted importances, or (as DF-Merge) by the importances alone",
            default="weighted", choices=("weighted", "importance"),
        ),
    ),
    kernel=_apply,
    reductions=_reductions,
    scratch_rows=1,
    importance=True,
    paper=Paper("Merging Models with Fisher-Weighted Averaging", "https://arxiv.org/abs/2111.09832"),
)  # fmt: skip
