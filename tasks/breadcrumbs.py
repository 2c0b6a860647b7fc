"""The sparsifier `breadcrumbs`: drops the largest elements of each tensor, as outliers, and the smallest.

Of n elements in ascending order of magnitude those of ranks ``n_bot`` to ``n_bot + int(density * n) - 1`` stay, with
``n_bot = max(0, n - int(density * n) - int(gamma * n))``: mergekit's ranks. Elements equal to the smallest or to the
largest of these stay, too: no order of equals decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mergepipe.tasks.guess import guesses
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Bounds, Job, Paper, Reduction, Sparsifier, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.select import Coarse, refinements, selected, start_selection
from mergepipe.tasks.shrinkage import Shrinkage, restore

STAGE = "breadcrumbs"

PARAMETERS = (
    Parameter(
        "density", "number", "fraction of each tensor that is kept", default=1.0, per_model=True, minimum=0, maximum=1
    ),
    Parameter(
        "gamma", "number", "fraction of each tensor that is dropped as outliers, the largest magnitudes", default=0.01,
        per_model=True, minimum=0, maximum=1,
    ),
    Parameter(
        "rescale", "flag", "scale what is kept so that the tensor's L1 norm is as before", default=False, per_model=True
    ),
)  # fmt: skip
"""What `breadcrumbs` takes; a method that brings it along as its trim declares the same."""


def kept_ranks(density: float, gamma: float, n: int) -> tuple[int, int]:
    """First and last of the ascending ranks that are kept; the last below the first if none is.

    Examples
    --------
    >>> kept_ranks(0.5, 0.1, 100), kept_ranks(0.95, 0.2, 100), kept_ranks(0.1, 0.0, 5)
    ((40, 89), (0, 94), (5, 4))
    """
    kept = int(density * n)
    first = max(0, n - kept - int(gamma * n))
    return first, first + kept - 1


def _whole(params: Mapping[str, Any]) -> bool:
    return bool(params["density"] >= 1)


def _ranks(job: Job) -> Array:
    """Of each model the first and the last rank that is kept; -1 where all are, or none is."""
    ranks = np.full((job.models, 2), -1)
    for k, params in enumerate(job.sparsify_params):
        first, last = kept_ranks(params["density"], params["gamma"], job.size)
        if not _whole(params) and first <= last:
            ranks[k] = first, last
    return ranks


def _start(job: Job, state: State) -> State:
    ranks = _ranks(job)
    new = start_selection(STAGE, ranks, state["histogram"])
    return new | _settle(job, state | new) if (ranks < 0).all() else new


def _settle(job: Job, state: State) -> State:
    """Smallest and largest kept magnitude of each model, and the fraction kept where no magnitudes tie."""
    found = selected(job, state, STAGE)
    whole = np.array([_whole(params) for params in job.sparsify_params])
    none = np.isnan(found[:, 0])
    ranks = [kept_ranks(params["density"], params["gamma"], job.size) for params in job.sparsify_params]
    kept = np.array([last - first + 1 for first, last in ranks]) / max(job.size, 1)
    return {
        "thresholds": np.where(whole, 0.0, np.where(none, math.inf, found[:, 0])),
        "_uppers": np.where(none, math.inf, found[:, 1]),
        "densities": np.where(whole, 1.0, kept),
    }


@kernel
def _keep_between(values: Array, low: Any, high: Any) -> None:
    zero = values.dtype.type(0)
    for i in range(values.size):
        size = abs(values[i])
        values[i] = values[i] if (size >= low) & (size <= high) else zero


def _thin(job: Job, state: State, tile: Tile) -> None:
    if "thresholds" not in state:  # every model is kept whole
        return
    low, high = state["thresholds"].astype(job.work), state["_uppers"].astype(job.work)
    for k in range(job.models):
        if low[k] > 0 or high[k] < math.inf:
            _keep_between(tile.values[k], low[k], high[k])


def _mask(job: Job, state: State, tile: Tile) -> None:
    _thin(job, state, tile)
    restore(job, state, tile, STAGE)


def _bounds(job: Job, state: State) -> Bounds | None:
    ones = (1.0,) * job.models
    if "thresholds" not in state:
        return Bounds((0.0,) * job.models, None, ones)
    factors = tuple(state[f"_{STAGE}_factors"].tolist()) if f"_{STAGE}_factors" in state else ones
    # A factor too large for the working type makes NaN of what is dropped, in `restore`.
    if max(factors) >= float(np.finfo(job.work).max):
        return None
    return Bounds(tuple(state["thresholds"].tolist()), tuple(state["_uppers"].tolist()), factors)


def _restored(job: Job) -> tuple[bool, ...]:
    return tuple(params["rescale"] and not _whole(params) for params in job.sparsify_params)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    if all(_whole(params) for params in job.sparsify_params):
        return ()
    guess = guesses(job, STAGE, _ranks, _settle)
    # The sure way is there, but hardly ever taken, where a guess comes first.
    reads = 0.0 if guess else 1.0
    sure = (Coarse(False, _start, reads), *refinements(job, STAGE, 2, _settle, reads))
    norms = (Shrinkage(STAGE, _restored, _thin),) if any(_restored(job)) else ()
    return (*guess, *sure, *norms)


BREADCRUMBS = Sparsifier(
    name="breadcrumbs",
    title="Model Breadcrumbs",
    summary="drops the largest and the smallest elements of each tensor of a task vector",
    parameters=PARAMETERS,
    reductions=_reductions,
    mask=_mask,
    bounds=_bounds,
    paper=Paper("Model Breadcrumbs", "https://arxiv.org/abs/2312.06795"),
)
