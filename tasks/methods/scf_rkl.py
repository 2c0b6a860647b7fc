"""SCF-RKL, reconstruction scf-rkl-r1: take a donor's elements where they differ most and their rows diverge most.

Row by row along the last axis, the reverse KL divergence of the softmax of the donor from that of the primary says how
much the row has changed; ``abs(B - A)`` times it is an element's score. In each tensor, or with ``scope: model`` in all
together, the elements of highest score are taken from the donor, stored bits and all. No common ancestor is needed:
`base_model` is the primary, whose behaviour is kept, the models are donors. Formulas and their numerics are in
:mod:`mergepipe.tasks.rows`, the selection in :mod:`mergepipe.tasks.fusion`.

The paper's own formulas are not public in the sources this was built from: see `known` and `chosen`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mergepipe.tasks import fusion, fusion_rounds, fusion_sweeps, kernels
from mergepipe.tasks.fusion import Settings
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, Round, State, StoredKernel, Tile
from mergepipe.tasks.parameter import Parameter

READ = ("direction", "importance", "threshold", "quantile", "multi", "tie_rule", "zero_kl")
"""Parameters that thresholds depend on. (So they do on `scale` where donors are folded in.)"""


def _excluded(job: Job) -> bool:
    """Whether nothing of the tensor is selected."""
    include, exclude = job.params["include"], job.params["exclude"]
    outside = bool(include) and not any(re.search(pattern, job.name) for pattern in include)
    return outside or any(re.search(pattern, job.name) for pattern in exclude)


def _settings(job: Job) -> Settings:
    return Settings(scope=job.scope, scale=job.params["scale"], **{name: job.params[name] for name in READ})


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return () if _excluded(job) else fusion_sweeps.reductions(_settings(job), job)


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    return fusion_rounds.rounds(_settings(jobs[0]), jobs, _excluded)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    if _excluded(job):
        _leave_out(job, tile, out)
    else:
        fusion.apply(_settings(job), job, state, tile, out)


def _stored(job: Job, state: State) -> StoredKernel | None:
    return None if _excluded(job) else fusion.stored(_settings(job), job, state)


def _leave_out(job: Job, tile: Tile, out: Array) -> None:
    """An excluded tensor: the primary's own, or that moved by the mean of the donors' differences."""
    assert tile.base is not None
    if job.params["excluded_from"] == "primary":
        out[:] = tile.base
        return
    np.subtract(tile.values, tile.base, out=tile.values)
    kernels.sum_many(tile.values, np.ones(job.models, job.work), float(job.models), out)
    kernels.put_on_base(tile.base, 1.0, out)


METHOD = MergeMethod(
    name="scf_rkl",
    title="SCF-RKL",
    summary="takes from each donor the elements that differ most in the rows that diverge most from the primary's",
    base="primary",
    space="weights",
    parameters=(
        Parameter(
            "direction", "choice", "KL divergence of donor from primary, of primary from donor, or their mean",
            default="reverse", choices=("reverse", "forward", "sym"),
        ),
        Parameter(
            "importance", "choice", "score: difference times divergence of the row, or an element's own share of it",
            default="delta_kl", choices=("delta_kl", "pointwise"),
        ),
        Parameter(
            "threshold", "choice", "least score that is taken: a quantile, or median plus 1.5 interquartile ranges",
            default="quantile", choices=("quantile", "iqr"),
        ),
        Parameter(
            "quantile", "number", "fraction of a tensor that stays the primary's",
            default=0.9, minimum=0, maximum=1, open_maximum=True,
        ),
        Parameter("scale", "number", "1 takes the donor's value, less goes part of the way", default=1.0),
        Parameter(
            "multi", "choice", "several donors: the highest score wins, or they are put in one after another",
            default="winner", choices=("winner", "fold"),
        ),
        Parameter(
            "tie_rule", "choice", "scores equal to the quantile: take them all, or the exact count, lower index first",
            default="keep", choices=("keep", "index"),
        ),
        Parameter(
            "zero_kl", "choice", "rows without divergence: never taken, or scored by the difference alone",
            default="skip", choices=("skip", "abs"),
        ),
        Parameter("include", "patterns", "tensors to fuse; if empty, all that are not excluded", default=()),
        Parameter("exclude", "patterns", "tensors to leave out", default=()),
        Parameter(
            "excluded_from", "choice", "excluded tensors: the primary's, or with the mean of the donors' differences",
            default="primary", choices=("primary", "average"),
        ),
    ),
    kernel=_apply,
    stored=_stored,
    reductions=_reductions,
    rounds=_rounds,
    rounds_read=(*READ, "scale"),
    scopes=("tensor", "model"),
    scratch_rows=fusion.SCRATCH_ROWS,
    paper=Paper("Beyond Parameter Arithmetic: Sparse Complementary Fusion for Distribution-Aware Model Merging", "https://arxiv.org/abs/2602.11717"),
    specification="scf-rkl-r1",
    known=(
        "the reverse KL divergence between models finds elements of high information, without data",
        "a threshold by quantile gives a binary mask, and only masked elements are taken",
        "the same authors' Arcee Fusion scores by difference times KL divergence of softmaxed rows",
    ),
    chosen=(
        "divergence per row, difference times divergence as the score, one threshold per tensor",
        "the quantile 0.9, ties that are all kept, a scale of 1 that copies the donor's bits",
        "what several donors do: the highest score wins",
    ),
)  # fmt: skip
