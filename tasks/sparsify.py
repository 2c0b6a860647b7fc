"""Sparsifiers: ways to thin a task vector before any method that works on task vectors.

`none` hands it on; `magnitude` keeps the largest elements of each tensor, or with `scope: model` of the whole model
(:mod:`mergepipe.tasks.whole_trim`); `tadrop` (:mod:`mergepipe.tasks.tadrop`) asks each tensor how much it can spare.
How an exact threshold is found is in :mod:`mergepipe.tasks.select`, how it is applied in
:mod:`mergepipe.tasks.thinning`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergepipe.tasks import whole_trim
from mergepipe.tasks.breadcrumbs import BREADCRUMBS
from mergepipe.tasks.della import DELLA
from mergepipe.tasks.guess import guesses
from mergepipe.tasks.method import Array, Bounds, Job, Paper, Reduction, Round, Sparsifier, State, no_reductions
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.random_drop import RANDOM
from mergepipe.tasks.select import Coarse
from mergepipe.tasks.tadrop import TADROP
from mergepipe.tasks.thinning import (
    DROP_ALL,
    KEEP_ALL,
    STAGE,
    TIE_RULE,
    apply_cut,
    plain_cut,
    restored_norms,
    settle,
    start_thresholds,
    threshold_reductions,
    wish,
)

DENSITY = Parameter(
    "density", "number", "fraction of each tensor that is kept, the largest magnitudes", default=1.0, per_model=True,
    minimum=0, maximum=1,
)  # fmt: skip
RESCALE = Parameter(
    "rescale", "flag", "scale what is kept so that the tensor's L1 norm is as before", default=False, per_model=True
)
TRIM_PARAMETERS = (DENSITY, TIE_RULE, RESCALE)
"""What `magnitude` takes; a method that brings it along as its trim declares the same."""


def kept_count(density: float, n: int) -> int:
    """How many of n elements a density keeps; mergekit's rule.

    Examples
    --------
    >>> kept_count(0.2, 1000), kept_count(0.2, 3), kept_count(0.0, 3), kept_count(1.0, 3)
    (200, 1, 0, 3)
    """
    return 0 if density <= 0 else n if density >= 1 else max(1, int(density * n))


def _wanted(job: Job) -> Array:
    size = job.size
    kept = [kept_count(params["density"], size) for params in job.sparsify_params]
    return np.array([KEEP_ALL if count == size else DROP_ALL if count == 0 else size - count for count in kept])


def _start(job: Job, state: State) -> State:
    return start_thresholds(job, state, _wanted(job))


def _rank(job: Job) -> Array:
    return _wanted(job)[:, None]


def _guessed(job: Job, state: State) -> State:
    new = wish(job, _wanted(job))
    return new | settle(job, state | new)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    if all(params["density"] in (0, 1) for params in job.sparsify_params):
        return ()
    if job.scope == "model":
        return whole_trim.reductions(job)
    if any(restored_norms(job)):
        return (Coarse(True, _start), *threshold_reductions(job))
    guess = guesses(job, STAGE, _rank, _guessed)
    # The sure way is there, but hardly ever taken, where a guess comes first.
    reads = 0.0 if guess else 1.0
    return (*guess, Coarse(False, _start, reads), *threshold_reductions(job, reads))


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    return whole_trim.rounds(jobs, kept_count) if jobs[0].scope == "model" else ()


NONE = Sparsifier(
    name="none",
    title="No sparsification",
    summary="hands task vectors on as they are",
    parameters=(),
    reductions=no_reductions,
    mask=lambda job, state, tile: None,
    bounds=lambda job, state: Bounds((0.0,) * job.models, None, (1.0,) * job.models),
)

MAGNITUDE = Sparsifier(
    name="magnitude",
    title="Magnitude trimming",
    summary="keeps the largest elements of each tensor of a task vector",
    parameters=TRIM_PARAMETERS,
    reductions=_reductions,
    mask=apply_cut,
    bounds=plain_cut,
    rounds=_rounds,
    scopes=("tensor", "model"),
    paper=Paper("TIES-Merging: Resolving Interference When Merging Models", "https://arxiv.org/abs/2306.01708"),
)

SPARSIFIERS: dict[str, Sparsifier] = {row.name: row for row in (NONE, MAGNITUDE, RANDOM, BREADCRUMBS, DELLA, TADROP)}
