"""Multi-SLERP: the weighted mean direction of any number of models, at their weighted mean length.

mergekit goes on to correct the mean in the tangent space around it; the correction is zero for every input (the
weighted tangent vectors at the weighted mean add up to nothing), so that what it adds is rounding and ``cos(eps)``.
Here the direction is normalised and that is all.

Where the weighted directions cancel, or a tensor is zero in all models (frozen, with a base), there is no direction:
the plain weighted sum is taken, which mergekit does for two models and not for more, where it stops.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import task_vectors as family
from mergepipe.tasks import weighting
from mergepipe.tasks.gram import Gram, add_up, thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter

CANCELLING = 1e-3
"""Length of the mean direction, relative to the weights, below which it is measured in a sweep of its own."""


def _weights(job: Job) -> Array:
    weights = np.array([params["weight"] for params in job.model_params], np.float64)
    return weights / weights.sum() if job.params["normalize_weights"] else weights


def _directions(job: Job, gram: Array) -> tuple[Array, float]:
    """Factors that add up to the mean direction, and the mean length."""
    weights, lengths = _weights(job), np.sqrt(np.diagonal(gram))
    return weights / (lengths + job.params["eps"]), float(weights @ lengths)


def _length(factors: Array, gram: Array) -> float:
    return math.sqrt(max(0.0, float(factors @ gram @ factors)))


@kernel
def _square(values: Array, factors: Array) -> float:
    total = 0.0
    for i in range(values.shape[1]):
        mean = 0.0
        for k in range(values.shape[0]):
            mean += factors[k] * np.float64(values[k, i])
        total += mean * mean
    return total


@dataclass(frozen=True, slots=True)
class MeanLength:
    """``mean_square``: float64, shape (1,), where the Gram matrix leaves too few digits of it."""

    name: str = "length of the mean direction"

    def needed(self, job: Job, state: State) -> bool:
        """Whether the directions nearly cancel."""
        if "gram" not in state or "mean_square" in state or job.models == 1:
            return False
        job = weighting.weighted(job, state)
        factors, _ = _directions(job, state["gram"])
        whole = float(np.abs(factors) @ np.sqrt(np.diagonal(state["gram"])))
        return whole > 0 and _length(factors, state["gram"]) < CANCELLING * whole

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """One sum per block."""
        return None, (1,)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        thin(job, state, tile)
        job = weighting.weighted(job, state)
        accumulator.blocks[tile.index, 0] = _square(tile.values, _directions(job, state["gram"])[0])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``mean_square``."""
        assert accumulator.blocks is not None
        return {"mean_square": np.array([math.fsum(accumulator.blocks[:, 0])])}


def _factors(job: Job, state: State) -> Array:
    if job.models == 1:
        return np.ones(1)
    factors, mean_length = _directions(job, state["gram"])
    found = _length(factors, state["gram"])
    if "mean_square" in state:
        found = math.sqrt(state["mean_square"][0])
    if found < job.params["eps"] or found == 0:
        return _weights(job)
    return factors * (mean_length / found)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    """The Gram matrix; refuses, while planning, weights that can't be normalised.

    Raises
    ------
    RecipeError
        If the weights of the tensor add up to zero.
    """
    if job.params["normalize_weights"] and sum(params["weight"] for params in job.model_params) == 0:
        message = (
            f"the weights of {job.name!r} add up to 0, which can't be normalised: change one or set "
            "normalize_weights: false"
        )
        raise RecipeError([Fault("$.models[*].parameters.weight", message)])
    return (*family.reductions(job), Gram(), MeanLength())


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    thin(job, state, tile)
    add_up(job, tile, _factors(weighting.weighted(job, state), state), out)


METHOD = MergeMethod(
    name="multislerp",
    title="Multi-SLERP",
    summary="takes the weighted mean direction of the models, or of their task vectors, at their mean length",
    base="optional",
    space="deltas",
    parameters=(
        weighting.weight("weight of a model"),
        *weighting.PARAMETERS,
        Parameter("normalize_weights", "flag", "divide the weights by their sum", default=True),
        Parameter("eps", "number", "length below which there is no direction", default=1e-8, minimum=0),
    ),
    kernel=_apply,
    reductions=_reductions,
    rounds=weighting.rounds,
    rounds_read=weighting.READ,
    paper=Paper("Multi-SLERP", "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"),
)
