"""PCB: balances how much each element matters within its task against how far the tasks agree on it.

Over the flattened model, per task with N tasks: magnitudes are clipped to their range without the outermost 1e-4 on
both sides, and scaled to [0, 1]; ``beta = exp(N * scaled**2) * tanh(tau_k * sum_s tau_s)``. What lies below the ``1 -
pcb_ratio`` quantile of beta is raised to it, and beta scaled to [0, 1] becomes the weight of the clipped element: ``out
= base + lambda * sum_k(w_k * tau_k) / max(sum_k w_k, 1e-12)``. The ranks are those of the authors' code. Where a range
is a single value, scaled magnitudes are 0, and weights are 1 from the quantile on and 0 below it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, Round, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS
from mergepipe.tasks.whole_select import magnitude_scores, selection

CLIPPED = 1e-4
SMALLEST_SUM = 1e-12


@inlined
def _beta(value: float, total: float, models: int, low: float, high: float) -> float:
    clipped = min(max(abs(value), low), high)
    scaled = (clipped - low) / (high - low) if high > low else 0.0
    return math.exp(models * scaled * scaled) * math.tanh(value * total)


@kernel
def _score(values: Array, clips: Array) -> None:
    """Beta in place of `values`, in float64 and rounded once."""
    models = values.shape[0]
    for i in range(values.shape[1]):
        total = 0.0
        for k in range(models):
            total += np.float64(values[k, i])
        for k in range(models):
            values[k, i] = _beta(np.float64(values[k, i]), total, models, clips[k, 0], clips[k, 1])


@kernel
def _merge(base: Array, values: Array, clips: Array, betas: Array, scale: float, smallest: float, out: Array) -> None:
    """In float64, rounded once; beta rounded as :func:`_score` does."""
    models = values.shape[0]
    work = out.dtype.type
    for i in range(out.size):
        total, weighted, weights = 0.0, 0.0, 0.0
        for k in range(models):
            total += np.float64(values[k, i])
        for k in range(models):
            value = np.float64(values[k, i])
            beta = np.float64(work(_beta(value, total, models, clips[k, 0], clips[k, 1])))
            low, high = betas[k, 0], betas[k, 1]
            weight = (max(beta, low) - low) / (high - low) if high > low else (1.0 if beta >= low else 0.0)
            clipped = min(max(abs(value), clips[k, 0]), clips[k, 1])
            weighted += weight * (clipped if value > 0 else (-clipped if value < 0 else 0.0))
            weights += weight
        out[i] = np.float64(base[i]) + scale * (weighted / max(weights, smallest))


def _magnitudes(job: Job, state: State, tile: Tile) -> Array:
    thin(job, state, tile)
    return magnitude_scores(job, state, tile)


def _betas(job: Job, state: State, tile: Tile) -> Array:
    thin(job, state, tile)
    _score(tile.values, state["_clip_values"])
    return tile.values


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return SPARSIFIERS[job.sparsify].reductions(job)


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    """The ranks of the clipped range, then those of the quantile and the maximum of beta."""
    n, models = sum(job.size for job in jobs), jobs[0].models
    if not n:
        return ()
    inner = [min(int(n * CLIPPED), n - 1), max(0, int(n * (1 - CLIPPED) - 1))]
    top = [min(int(n * (1 - jobs[0].params["pcb_ratio"])), n - 1), n - 1]
    return (
        *selection(jobs, "clip", np.tile(inner, (models, 1)), _magnitudes, _reductions),
        *selection(jobs, "beta", np.tile(top, (models, 1)), _betas, _reductions),
    )


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    thin(job, state, tile)
    clips, betas = state["_clip_values"], state["_beta_values"]
    _merge(tile.base, tile.values, clips, betas, job.params["lambda"], SMALLEST_SUM, out)


METHOD = MergeMethod(
    name="pcb",
    title="PCB-Merging",
    summary="weights each element by how much it matters to its own task and how far the tasks agree on it",
    base="required",
    space="deltas",
    parameters=(
        Parameter(
            "pcb_ratio", "number", "fraction of all elements that get a weight above zero", default=0.1, minimum=0,
            maximum=1, open_minimum=True,
        ),
        family.LAMBDA,
    ),
    kernel=_apply,
    reductions=_reductions,
    rounds=_rounds,
    rounds_read=("pcb_ratio",),
    paper=Paper("Parameter Competition Balancing for Model Merging", "https://arxiv.org/abs/2410.02396"),
)  # fmt: skip
