"""The family of methods that add task vectors up: thin, weight, agree on signs or not, put the sum on the base.

``out = base + lambda * sum_k w_k * thinned_k / divisor``; with sign consensus only the models that agree with the
elected sign take part, element by element. Which sparsifier thins, and which consensus is the default, is all that
distinguishes the methods of this family; each is a row in :mod:`mergepipe.tasks.methods`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mergepipe.tasks import fused, kernels, weighting
from mergepipe.tasks.majority import Majority, majority_rounds
from mergepipe.tasks.method import Array, Bounds, Job, Reduction, Round, State, StoredKernel, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS
from mergepipe.tasks.thinning import apply_cut, cut

SCRATCH_ROWS = 2

ROUNDS_READ = (*weighting.READ, "consensus")
"""What :func:`rounds` depends on."""

SMALLEST_DIVISOR = 1e-8
"""Weights that add up to less do not divide (mergekit's rule)."""

WEIGHT = weighting.weight("weight of a model's task vector")
WEIGHTS = (WEIGHT, *weighting.PARAMETERS)
LAMBDA = Parameter("lambda", "number", "factor on the merged task vector", default=1.0)
INT8_MASK = Parameter("int8_mask", "flag", "mergekit's choice of mask type", default=False, without_effect=True)


def normalize(default: bool) -> Parameter:
    """The parameter `normalize` with this default."""
    return Parameter("normalize", "flag", "divide by the sum of the weights that take part", default=default)


def consensus(default: str) -> Parameter:
    """The parameter `consensus` with this default."""
    return Parameter(
        "consensus", "choice", "elect a sign per element by the sum or the count of the task vectors, or not at all",
        default=default, choices=("sum", "count", "none"),
    )  # fmt: skip


def reductions(job: Job) -> tuple[Reduction, ...]:
    """Those of the job's sparsifier, and of its weights."""
    return (*SPARSIFIERS[job.sparsify].reductions(job), *weighting.reductions(job))


def rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    """Those of the weights; and for elected signs, of the sign that an element without one takes."""
    elects = jobs[0].params["consensus"] != "none"
    return (*weighting.rounds(jobs), *(majority_rounds(jobs, Majority(_votes, reductions)) if elects else ()))


def _thinning(job: Job, state: State, tile: Tile) -> tuple[kernels.Scalars, kernels.Scalars]:
    """What is left for the kernel to thin: thresholds and factors."""
    sparsifier = SPARSIFIERS[job.sparsify]
    if sparsifier.mask is apply_cut:
        return cut(job, state, tile)
    sparsifier.mask(job, state, tile)
    return (0.0,) * job.models, (1.0,) * job.models


def apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    """The kernel of the family."""
    assert tile.base is not None
    job = weighting.weighted(job, state)
    least, factors = _thinning(job, state, tile)
    weights = tuple(float(params["weight"]) for params in job.model_params)
    consensus, normalized, scale = job.params["consensus"], job.params["normalize"], job.params["lambda"]
    if consensus != "none" and _ties_elect_minus(state):
        # Kernels let a vote of zero elect plus: with all signs turned round, that is minus.
        np.negative(tile.values, out=tile.values)
        scale = -scale
    if job.models > kernels.FEW or consensus == "count":
        for row, smallest, factor in zip(tile.values, least, factors, strict=True):
            kernels.thin(row, smallest, factor)
        _apply_many(job, tile, scale, out)
    elif consensus == "sum":
        kernels.agree_few(tile.base, tuple(tile.values), weights, least, factors, normalized, scale, out)
    else:
        divisor = _divisor(job)
        kernels.add_few(tile.base, tuple(tile.values), weights, least, factors, divisor, scale, out)


def _ties_elect_minus(state: State) -> bool:
    return "majority" in state and bool(state["majority"] < 0)


def _votes(job: Job, state: State, tile: Tile, out: Array) -> None:
    """What the sign of is elected, from a tile as it is read."""
    job = weighting.weighted(job, state)
    least, factors = _thinning(job, state, tile)
    for row, smallest, factor in zip(tile.values, least, factors, strict=True):
        kernels.thin(row, smallest, factor)
    _vote(job, tile.values, out)


def _vote(job: Job, values: Array, out: Array) -> None:
    if job.params["consensus"] == "count":
        kernels.count_votes(values, job.per_model("weight"), out)
    else:
        kernels.sum_many(values, job.per_model("weight"), 1.0, out)


def stored(job: Job, state: State) -> StoredKernel | None:
    """The kernel of the family from bits to bits, where all is said by bounds, chance, factors and weights."""
    bounds = SPARSIFIERS[job.sparsify].bounds(job, state)
    return None if bounds is None else stored_within(job, state, bounds)


def stored_within(job: Job, state: State, bounds: Bounds) -> StoredKernel | None:
    """The same for bounds of any origin."""
    consensus, normalized, scale = job.params["consensus"], job.params["normalize"], job.params["lambda"]
    if consensus == "count" or job.models > kernels.FEW or _ties_elect_minus(state):
        return None
    job = weighting.weighted(job, state)
    weights = tuple(float(params["weight"]) for params in job.model_params)
    least, most, factors, chance = bounds.least, bounds.most, bounds.factors, bounds.draw
    scales = None if set(factors) == {1.0} else factors
    if fused.vanishes(weights, scales):
        return None

    def run(rows: Sequence[Array], out: Array, marks: Array | None = None) -> bool:
        base, models = rows[0], tuple(rows[1:])
        if consensus == "sum":
            return fused.agree(base, models, marks, weights, least, most, scales, normalized, scale, out)
        return fused.add(base, models, marks, weights, least, most, scales, _divisor(job), scale, out)

    if chance is None:
        return lambda rows, out, _: run(rows, out)
    return lambda rows, out, blocks: all(
        run([row[part] for row in rows], out[part], marks) for _, part, marks in chance.marked(job.shape, blocks)
    )


def _apply_many(job: Job, tile: Tile, scale: float, out: Array) -> None:
    """The same for values that are thinned already, one model at a time."""
    assert tile.base is not None
    weights, normalized = job.per_model("weight"), job.params["normalize"]
    if job.params["consensus"] == "none":
        kernels.sum_many(tile.values, weights, _divisor(job), out)
        kernels.put_on_base(tile.base, scale, out)
        return
    _vote(job, tile.values, out)
    sums, divisors = tile.scratch[:SCRATCH_ROWS]
    kernels.agree_many(tile.base, tile.values, weights, normalized, scale, sums, divisors, out)


def _divisor(job: Job) -> float:
    """Without consensus, the sum of all weights, added up in the working type; 1 if that is next to nothing."""
    total = float(sum(job.per_model("weight"), job.work.type(0)))
    return total if job.params["normalize"] and abs(total) >= SMALLEST_DIVISOR else 1.0
