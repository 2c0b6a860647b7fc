"""Weights from norms (NAN): models that lie farther from where they began, or are larger, weigh less.

``w_k = c * (1 / |x_k|) / sum_s (1 / |x_s|)`` with the Frobenius norms of the task vectors, or of the models themselves
where a method merges those; over the whole model, or tensor by tensor. A model of norm zero has nothing to say and gets
weight zero; where all are zero, all weigh the same. Any method that adds models up with one weight each can take its
weights from here: it declares :data:`PARAMETERS`, its rounds and reductions include those here, and its kernel asks
:func:`weighted` for the job that has the weights in it.

References
----------
NAN: A Training-Free Solution to Coefficient Estimation in Model Merging, arXiv:2505.16148. The formula is a
reconstruction from its abstract.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, Round, Shared, State, Tile
from mergepipe.tasks.parameter import Parameter

WEIGHTING = "weighting"

PARAMETERS = (
    Parameter(
        WEIGHTING, "choice", "weights as given, or from inverse norms (nan)", default="given",
        choices=("given", "nan"),
    ),
    Parameter(
        "nan_norms", "choice", "of what the norms are for `weighting: nan`: the whole model, or each tensor",
        default="model", choices=("model", "tensor"),
    ),
    Parameter(
        "nan_sum", "choice", "what the weights add up to for `weighting: nan`: one, or the number of models",
        default="one", choices=("one", "models"),
    ),
)  # fmt: skip

READ = tuple(parameter.name for parameter in PARAMETERS)
"""What the rounds depend on: tensors that differ in it are not of one group."""


def weight(doc: str) -> Parameter:
    """The parameter `weight` of a method that can take its weights from here."""
    return Parameter("weight", "number", doc, per_model=True, stand_in=(WEIGHTING, "nan", 1.0))


def nan_weights(squares: Array, total: float = 1.0) -> Array:
    """Weights from squared norms, shape (models,), that add up to `total`.

    Examples
    --------
    >>> nan_weights(np.array([1.0, 9.0])).tolist(), nan_weights(np.array([0.0, 4.0])).tolist()
    ([0.75, 0.25], [0.0, 1.0])
    """
    if not squares.any():
        return np.full(len(squares), total / len(squares))
    # Scaled by the smallest norm first, so that no reciprocal overflows.
    least = math.sqrt(squares[squares > 0].min())
    with np.errstate(divide="ignore"):
        inverse = np.where(squares > 0, least / np.sqrt(squares), 0.0)
    found: Array = total * inverse / inverse.sum()
    return found


def _asked(job: Job, norms: str) -> bool:
    return job.params.get(WEIGHTING) == "nan" and job.params["nan_norms"] == norms


def _weights(job: Job, squares: Array) -> State:
    return {"weights": nan_weights(squares, 1.0 if job.params["nan_sum"] == "one" else float(job.models))}


def rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    """The round that takes the norms of whole models."""
    return (NormRound(),) if _asked(jobs[0], "model") else ()


def reductions(job: Job) -> tuple[Reduction, ...]:
    """The sweep that takes the norms of one tensor."""
    return (Norms(),) if _asked(job, "tensor") else ()


def weighted(job: Job, state: State) -> Job:
    """The job with the weights that the kernel is to use."""
    if job.params.get(WEIGHTING) != "nan" or "weights" not in state:
        return job
    found = [float(value) for value in state["weights"]]
    params: list[dict[str, Any]] = [{**given, "weight": w} for given, w in zip(job.model_params, found, strict=True)]
    return replace(job, model_params=tuple(params))


@dataclass(frozen=True, slots=True)
class Norms:
    """``squares``: float64, shape (models,): squared norms; and ``weights``, where these are taken tensor by tensor."""

    name: str = "norms"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to add up, before it is thinned."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block and model, of which one is used."""
        return None, (job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        for k in range(job.models):
            kernels.norms(tile.values[k], accumulator.blocks[tile.index, k])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """Added up, each sum rounded once."""
        assert accumulator.blocks is not None
        squares = kernels.fold(accumulator.blocks)[:, 1]
        return {"squares": squares, **(_weights(job, squares) if _asked(job, "tensor") else {})}


@dataclass(frozen=True, slots=True)
class NormRound:
    """``weights``: float64, shape (models,): from the norms over all tensors of the group."""

    name: str = "norms"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """One sweep."""
        return (Norms(),)

    def counts(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def values(self, job: Job, state: State) -> Array | None:
        """The tensor's squared norms."""
        return state.get("squares")

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """``weights``."""
        squares = [value for value in values if value is not None]
        return Shared(_weights(jobs[0], kernels.fold(np.stack(squares) if squares else np.zeros((1, jobs[0].models)))))
