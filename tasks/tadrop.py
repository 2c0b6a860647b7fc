"""TADrop, reconstruction tadrop-r1: each tensor's own drop rate, from how evenly its magnitudes are distributed.

Density d of a task vector's tensor, in [0, 1], by `metric`; drop rate ``s = clip(s_offset + s_slope * d, 0, s_cap)``;
``min(n - 1, floor(s * n + 1e-6))`` elements are dropped, the smallest ones or random ones; survivors may be rescaled.
A tensor whose magnitudes are alike is redundant and loses more; one whose weight sits in few elements is spared.
With `target_density` keep rates take the place of drop rates, so that the whole has a given density
(:mod:`mergepipe.tasks.calibration`).

The paper's own statistic is not public in the sources this was built from: see `KNOWN` and `CHOSEN`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import calibration, slices
from mergepipe.tasks.guess import Then, guesses
from mergepipe.tasks.method import Array, Job, Paper, Reduction, Round, Sparsifier, State
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.select import Coarse, refinements, selected, start_selection
from mergepipe.tasks.thinning import (
    KEEP_ALL,
    TIE_RULE,
    apply_cut,
    plain_cut,
    restored_norms,
    settle,
    start_thresholds,
    threshold_reductions,
    wish,
)
from mergepipe.tasks.thinning import STAGE as THRESHOLD

STAGE = "quantiles"

KNOWN = (
    "each parameter tensor has its own sparsity, derived from the distribution of its task vector",
    "denser, more redundant tensors are pruned more, sparser ones are preserved",
    "it plugs in before other merging methods and needs no data",
)
CHOSEN = (
    "the statistic (quantile ratio of magnitudes by default) and its linear map to a drop rate",
    "dropping by magnitude, and no rescaling by default",
)


def nearest_rank(p: float, n: int) -> int:
    """0-based rank of the p-quantile of n values, without interpolation.

    Examples
    --------
    >>> nearest_rank(0.5, 20), nearest_rank(0.95, 20), nearest_rank(0.0, 20), nearest_rank(1.0, 20)
    (9, 18, 0, 19)
    """
    return min(max(math.ceil(p * n - 1e-9) - 1, 0), n - 1)


def moment_metric(metric: str, n: int, ones: float, twos: float) -> float:
    """Density by `l1l2`, `participation` or `hoyer`, from the sum of magnitudes and the sum of squares.

    Examples
    --------
    >>> moment_metric("l1l2", 4, 4.0, 4.0), moment_metric("hoyer", 4, 1.0, 1.0)
    (1.0, 0.0)
    """
    if twos == 0 or (metric == "hoyer" and n == 1):
        return 0.0
    ratio = ones / math.sqrt(twos)
    if metric == "hoyer":
        return 1 - (math.sqrt(n) - ratio) / (math.sqrt(n) - 1)
    density = ratio / math.sqrt(n)
    return density * density if metric == "participation" else density


def drop_rate(params: Mapping[str, Any], density: float) -> float:
    """``clip(s_offset + s_slope * density, 0, s_cap)``."""
    return float(min(max(params["s_offset"] + params["s_slope"] * density, 0.0), params["s_cap"]))


def _excluded(job: Job, params: Mapping[str, Any]) -> bool:
    outside = bool(params["include"]) and not any(re.search(pattern, job.name) for pattern in params["include"])
    return outside or any(re.search(pattern, job.name) for pattern in params["exclude"])


def _rescale(params: Mapping[str, Any]) -> str:
    default = "inverse_keep" if params["drop"] == "random" else "none"
    return params["rescale"] or default


def _quantile_ranks(job: Job) -> Array:
    ranks = np.full((job.models, 2), -1)
    for k, params in enumerate(job.sparsify_params):
        if params["metric"] == "quantile_ratio" and not _excluded(job, params):
            ranks[k] = nearest_rank(params["q_lo"], job.size), nearest_rank(params["q_hi"], job.size)
    return ranks


def _after_coarse(job: Job, state: State) -> State:
    """Follow the two quantiles of the models that need them; without any, go on at once."""
    ranks = _quantile_ranks(job)
    if (ranks < 0).all():
        return _after_quantiles(job, state)
    return start_selection(STAGE, ranks, state["histogram"])


def _densities(job: Job, state: State) -> Array:
    """The metric of every model; NaN where the tensor is excluded."""
    found = np.full(job.models, math.nan)
    for k, params in enumerate(job.sparsify_params):
        if _excluded(job, params):
            continue
        if params["metric"] == "quantile_ratio":
            low, high = selected(job, state, STAGE)[k]
            found[k] = low / high if high > 0 else 0.0
        else:
            found[k] = moment_metric(params["metric"], job.size, *state["moments"][k])
    return found


def _after_quantiles(job: Job, state: State) -> State:
    """``metric`` and the thresholds that follow from it."""
    new: State = {"metric": _densities(job, state)}
    return new | _decide(job, state | new)


def _decide(job: Job, state: State) -> State:
    """``drop_rates``, and the thresholds that follow from them."""
    rates, *wished = _wished(job, state)
    new: State = {"drop_rates": rates}
    return new | start_thresholds(job, state | new, *wished)


def _wished(job: Job, state: State) -> tuple[Array, Array, Array, Array]:
    """Drop rates, and what they make of each model: what is wanted, the limit of a random drop, and a factor."""
    metric, keep = state["metric"], np.full(job.models, math.nan)
    if "_by_slice__keep_rates" in state:
        keep = state["_by_slice__keep_rates"][0]  # a tensor is of one slice
    keep = state.get("_keep_rates", keep)
    rates, wanted = np.zeros(job.models), np.full(job.models, KEEP_ALL)
    limits, factors = np.full(job.models, -1), np.ones(job.models)
    for k, params in enumerate(job.sparsify_params):
        if _excluded(job, params):
            continue
        rate = rates[k] = drop_rate(params, metric[k]) if np.isnan(keep[k]) else 1 - keep[k]
        dropped = _dropped(job, rate)
        if dropped <= 0:
            continue  # less than one element: nothing is dropped, at random neither, and nothing is to be made up for
        if params["drop"] == "random":
            limits[k] = math.floor((1 - rate) * 2**32)
        else:
            wanted[k] = dropped
        if _rescale(params) == "inverse_keep" and rate < 1:
            factors[k] = 1 / (1 - rate)
    return rates, wanted, limits, factors


def _dropped(job: Job, rate: float) -> int:
    """How many elements a drop rate drops."""
    return min(job.size - 1, math.floor(rate * job.size + 1e-6))


def _foreseen(job: Job, quantiles: Array) -> Array:
    """About which ranks the thresholds will have, from bounds of the quantiles."""
    found = np.full((job.models, 2), math.nan)
    for k, params in enumerate(job.sparsify_params):
        if _excluded(job, params) or params["drop"] == "random":
            continue
        (least, most), (under, over) = quantiles[k]
        densities = (least / over if over > 0 else 0.0, most / under if under > 0 else 1.0)
        ranks = sorted(_dropped(job, drop_rate(params, density)) for density in densities)
        if ranks[1] > 0:
            found[k] = max(ranks[0], 0), ranks[1]
    return found


def _after_guess(job: Job, state: State) -> State:
    new: State = {"metric": _densities(job, state)}
    rates, *wished = _wished(job, state | new)
    return new | {"drop_rates": rates} | wish(job, *wished)


def _guess(job: Job) -> tuple[Reduction, ...]:
    """The sweeps of a guess of the quantiles, and of the threshold that follows; none where more has to be known."""
    own = [params for params in job.sparsify_params if not _excluded(job, params)]
    if any(params["metric"] != "quantile_ratio" for params in own) or any(restored_norms(job)):
        return ()
    then = Then(THRESHOLD, _foreseen, lambda job, state: state["_wanted"], settle)
    return guesses(job, STAGE, _quantile_ranks, _after_guess, then)


def _measured(job: Job, state: State) -> State:
    return {"metric": _densities(job, state)}


def _measure_after_coarse(job: Job, state: State) -> State:
    ranks = _quantile_ranks(job)
    return _measured(job, state) if (ranks < 0).all() else start_selection(STAGE, ranks, state["histogram"])


def _measure(job: Job) -> tuple[Reduction, ...]:
    """The sweeps that give the metric and nothing else."""
    moments = any(params["metric"] != "quantile_ratio" for params in job.sparsify_params)
    found: tuple[Reduction, ...] = (Coarse(moments, _measure_after_coarse), *refinements(job, STAGE, 2, _measured))
    return tuple(slices.PerSlice(reduction) for reduction in found) if _by_slice(job) else found


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    return calibration.rounds(jobs, _measure)


def _by_slice(job: Job) -> bool:
    asked = {params["unstack_3d"] for params in job.sparsify_params}
    if len(asked) > 1:
        message = "is given for some models and not for others: a stack is taken apart for all of them, or for none"
        raise RecipeError([Fault("$.sparsify.unstack_3d", message)])
    return asked == {True} and slices.is_stack(job)


def _check_quantiles(job: Job) -> None:
    for params in job.sparsify_params:
        if params["metric"] == "quantile_ratio" and params["q_lo"] > params["q_hi"]:
            message = f"is above q_hi ({params['q_lo']} and {params['q_hi']}): their ratio would be no density"
            raise RecipeError([Fault("$.sparsify.q_lo", message)])


def _reductions(job: Job) -> tuple[Reduction, ...]:
    _check_quantiles(job)
    if not _by_slice(job):
        return _of_one(job)
    return tuple(slices.PerSlice(reduction) for reduction in _of_one(slices.slice_job(job)))


def _of_one(job: Job) -> tuple[Reduction, ...]:
    """The sweeps over a tensor, or over a slice of a stack."""
    if all(_excluded(job, params) for params in job.sparsify_params):
        return ()
    if any(params["target_density"] is not None for params in job.sparsify_params):
        # The round has measured it; what is left is the threshold that drops the share it settled.
        return (Coarse(any(restored_norms(job)), _decide), *threshold_reductions(job))
    moments = any(params["metric"] != "quantile_ratio" for params in job.sparsify_params) or any(restored_norms(job))
    guess = _guess(job)
    # The sure way is there, but hardly ever taken, where a guess comes first.
    reads = 0.0 if guess else 1.0
    quantiles = refinements(job, STAGE, 2, _after_quantiles, reads)
    return (*guess, Coarse(moments, _after_coarse, reads), *quantiles, *threshold_reductions(job, reads))


def _share(name: str, doc: str, default: float, **bounds: Any) -> Parameter:
    return Parameter(name, "number", doc, default=default, per_model=True, **bounds)


TADROP = Sparsifier(
    name="tadrop",
    title="TADrop",
    summary="drops from each tensor a share that follows from the distribution of its own task vector",
    parameters=(
        Parameter(
            "metric", "choice", "what measures how dense a task vector is", default="quantile_ratio", per_model=True,
            choices=("quantile_ratio", "l1l2", "participation", "hoyer"),
        ),
        _share("q_lo", "lower quantile of quantile_ratio", 0.5, minimum=0, maximum=1),
        _share("q_hi", "upper quantile of quantile_ratio", 0.95, minimum=0, maximum=1),
        _share("s_offset", "drop rate at density 0", 0.0),
        _share("s_slope", "how much the drop rate rises with the density", 1.0),
        _share("s_cap", "largest drop rate", 0.99, minimum=0, maximum=1),
        Parameter(
            "target_density", "number", "share kept of all tensors together; replaces s_offset, s_slope and s_cap",
            default=None, per_model=True, minimum=0, maximum=1, open_minimum=True,
        ),
        Parameter(
            "calibrate_scope", "choice", "whether target_density holds for each model, or for all together",
            default="task", per_model=True, choices=("task", "all"),
        ),
        Parameter(
            "drop", "choice", "drop the smallest elements, or random ones", default="magnitude", per_model=True,
            choices=("magnitude", "random"),
        ),
        TIE_RULE,
        Parameter(
            "rescale", "choice", "what survivors are scaled to: nothing, the tensor's L1 or L2 norm, or 1/(1 - drop "
            "rate); if not set, none for magnitude and inverse_keep for random",
            default=None, per_model=True, choices=("none", "l1", "l2", "inverse_keep"),
        ),
        Parameter(
            "unstack_3d", "flag", "count each matrix of a 3-D stack of experts as a tensor of its own", default=False,
            per_model=True,
        ),
        Parameter(
            "include", "patterns", "tensors to thin; if empty, all that are not excluded", default=(), per_model=True
        ),
        Parameter("exclude", "patterns", "tensors to hand on as they are", default=(), per_model=True),
    ),
    reductions=_reductions,
    mask=apply_cut,
    bounds=plain_cut,
    rounds=_rounds,
    paper=Paper("One Size Does Not Fit All: A Distribution-Aware Sparsification for More Precise Model Merging", "https://arxiv.org/abs/2508.06163"),
    specification="tadrop-r1",
    known=KNOWN,
    chosen=CHOSEN,
)  # fmt: skip
