"""Linear: the weighted mean, or sum, of the models' own weights."""

from __future__ import annotations

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import fused, kernels, weighting
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, State, StoredKernel, Tile
from mergepipe.tasks.parameter import Parameter


def _divisor(job: Job) -> float:
    """What the sum is divided by, added up in the working type and in model order."""
    if not job.params["normalize"]:
        return 1.0
    return float(sum(job.per_model("weight"), job.work.type(0)))


def _reductions(job: Job) -> tuple[Reduction, ...]:
    """The norms, where weights follow from them; refuses, while planning, weights that can't be normalised.

    Raises
    ------
    RecipeError
        If the weights of the tensor add up to zero.
    """
    if _divisor(job) == 0:
        message = (
            f"the weights of {job.name!r} add up to 0, which can't be normalised: change one or set normalize: false"
        )
        raise RecipeError([Fault("$.models[*].parameters.weight", message)])
    return weighting.reductions(job)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    job = weighting.weighted(job, state)
    if job.models <= kernels.FEW:
        weights = tuple(float(params["weight"]) for params in job.model_params)
        kernels.sum_few(tuple(tile.values), weights, _divisor(job), out)
    else:
        kernels.sum_many(tile.values, job.per_model("weight"), _divisor(job), out)


def _stored(job: Job, state: State) -> StoredKernel | None:
    job = weighting.weighted(job, state)
    weights, divisor = tuple(float(params["weight"]) for params in job.model_params), _divisor(job)
    if job.models > kernels.FEW:
        return None
    return lambda rows, out, _: fused.weigh(tuple(rows), weights, divisor, out)


METHOD = MergeMethod(
    name="linear",
    title="Linear (model soup)",
    summary="takes the weighted mean of the models",
    base="ignored",
    space="weights",
    parameters=(
        weighting.weight("weight of a model"),
        *weighting.PARAMETERS,
        Parameter("normalize", "flag", "divide by the sum of the weights", default=True),
    ),
    kernel=_apply,
    stored=_stored,
    reductions=_reductions,
    rounds=weighting.rounds,
    rounds_read=weighting.READ,
    paper=Paper("Model soups: averaging weights of multiple fine-tuned models", "https://arxiv.org/abs/2203.05482"),
)
