"""The sparsifier `random`: DARE's, drop elements at random and scale the rest.

Which elements stay is a matter of seed, model, tensor and element alone (:mod:`mergepipe.tasks.philox`), so any part of
a merge can be redone alone. Survivors are scaled so that the tensor keeps its L1 norm, as mergekit does, or by
``1 / density``, as in the paper, which needs no sweep.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergepipe.tasks import kernels, philox
from mergepipe.tasks.method import Job, Paper, Parameter, Reduction, Sparsifier, State, Tile
from mergepipe.tasks.shrinkage import Shrinkage, restore

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


def drop(job: Job, tile: Tile, drawn: Sequence[Drawn], stream: str = "") -> None:
    """Drop at random from every row of `tile.values`, and apply ``inverse_keep``. In place.

    Parameters
    ----------
    drawn : sequence of mapping
        One per model.
    stream : str
        Tells apart two thinnings of one tensor; "" is the mask of the specification.
    """
    for k, params in enumerate(drawn):
        density = params["density"]
        if density >= 1:
            continue
        key = np.uint64(philox.mask_key(job.seed, job.offset + k, job.name + stream))
        philox.drop_random(tile.values[k], key, tile.start, math.floor(density * 2**32))
        if params["rescale"] == "inverse_keep" and density > 0:
            kernels.thin(tile.values[k], 0.0, 1 / density)


def restored(drawn: Sequence[Drawn]) -> tuple[bool, ...]:
    """Of which models the L1 norm has to be measured."""
    return tuple(params["rescale"] == "l1" and 0 < params["density"] < 1 for params in drawn)


def _thin(job: Job, state: State, tile: Tile) -> None:
    drop(job, tile, job.sparsify_params)


def _mask(job: Job, state: State, tile: Tile) -> None:
    _thin(job, state, tile)
    restore(job, state, tile, STAGE)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return (Shrinkage(STAGE, lambda job: restored(job.sparsify_params), _thin),)


RANDOM = Sparsifier(
    name="random",
    title="DARE (random dropping)",
    summary="drops random elements of each tensor of a task vector and scales the rest",
    parameters=(DENSITY, RESCALE),
    reductions=_reductions,
    mask=_mask,
    paper=Paper("Language Models are Super Mario", "https://arxiv.org/abs/2311.03099"),
)
