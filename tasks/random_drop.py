"""The sparsifier `random`: DARE's, drop elements at random and scale the rest.

Which elements stay is a matter of seed, model, tensor and element alone (:mod:`mergepipe.tasks.philox`), so any part of
a merge can be redone alone. Survivors are scaled so that the tensor keeps its L1 norm, as mergekit does, or by
``1 / density``, as in the paper, which needs no sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergepipe.tasks import kernels, philox
from mergepipe.tasks.method import Bounds, Job, Paper, Reduction, Sparsifier, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.shrinkage import Shrinkage, factors, restore

STAGE = "random"

DENSITY = Parameter(
    "density", "number", "probability of an element to be kept", default=1.0, per_model=True, minimum=0, maximum=1
)
RESCALE = Parameter(
    "rescale", "choice", "scale survivors so that the tensor keeps its L1 norm, by 1/(probability to be kept), or not",
    default="l1", per_model=True, choices=("none", "l1", "inverse_keep"),
)  # fmt: skip

Drawn = Mapping[str, Any]
"""One model's `density` and `rescale`, and whatever else its thinning takes."""


def draw(job: Job, drawn: Sequence[Drawn], stream: str = "") -> philox.Draw:
    """Which elements stay; parameters as of :func:`drop`."""
    return philox.draw(job, [math.floor(params["density"] * philox.ALL) for params in drawn], stream)


def drop(job: Job, tile: Tile, drawn: Sequence[Drawn], stream: str = "") -> None:
    """Drop at random from every row of `tile.values`, and apply ``inverse_keep``. In place.

    Parameters
    ----------
    drawn : sequence of mapping
        One per model.
    stream : str
        Tells apart two thinnings of one tensor; "" is the mask of the specification.
    """
    draw(job, drawn, stream).drop(tile)
    for row, params in zip(tile.values, drawn, strict=True):
        if _inverse_keep(params) != 1:
            kernels.thin(row, 0.0, _inverse_keep(params))


def _inverse_keep(params: Drawn) -> float:
    density: float = params["density"]
    return 1 / density if params["rescale"] == "inverse_keep" and 0 < density < 1 else 1.0


def scales(job: Job, state: State, drawn: Sequence[Drawn], stage: str = STAGE) -> kernels.Scalars:
    """What survivors are multiplied by in all: by ``inverse_keep``, or to restore the norm before a stage."""
    return tuple(own * _inverse_keep(params) for own, params in zip(factors(job, state, stage), drawn, strict=True))


def restored(drawn: Sequence[Drawn]) -> tuple[bool, ...]:
    """Of which models the L1 norm has to be measured."""
    return tuple(params["rescale"] == "l1" and 0 < params["density"] < 1 for params in drawn)


def _draw(job: Job) -> philox.Draw:
    return draw(job, job.sparsify_params)


def _thin(job: Job, state: State, tile: Tile) -> None:
    drop(job, tile, job.sparsify_params)


def _mask(job: Job, state: State, tile: Tile) -> None:
    _thin(job, state, tile)
    restore(job, state, tile, STAGE)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return (Shrinkage(STAGE, lambda job: restored(job.sparsify_params), _thin, draw=_draw),)


def _bounds(job: Job, state: State) -> Bounds:
    return Bounds((0.0,) * job.models, None, scales(job, state, job.sparsify_params), _draw(job))


RANDOM = Sparsifier(
    name="random",
    title="DARE (random dropping)",
    summary="drops random elements of each tensor of a task vector and scales the rest",
    parameters=(DENSITY, RESCALE),
    reductions=_reductions,
    mask=_mask,
    bounds=_bounds,
    paper=Paper("Language Models are Super Mario", "https://arxiv.org/abs/2311.03099"),
)
