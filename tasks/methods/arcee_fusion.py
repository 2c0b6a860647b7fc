"""Arcee Fusion: the donor's elements whose score lies above the median by 1.5 interquartile ranges.

The score is ``abs(B - A)`` times the KL divergence of the softmax of the donor's row from the primary's, the quartiles
are the elements of rank ``int(p * (n - 1))`` of the sorted scores of a tensor. Two things differ from mergekit, on
purpose. Quartiles are those of the whole tensor, however large, where mergekit takes a random sample of a million
elements. And the divergence is evaluated by a formula that does not cancel, in float64 (:mod:`mergepipe.tasks.rows`),
where mergekit takes logarithms of float32 softmaxes with 1e-8 added, whose rounding is as large as a fine-tune's own
divergence. An element of score 0 is never taken, which changes nothing; the donor's stored bits are taken rather than
added up.
"""

from __future__ import annotations

from mergepipe.tasks import fusion, fusion_sweeps
from mergepipe.tasks.fusion import Settings
from mergepipe.tasks.method import Array, Job, MergeMethod, Reduction, State, StoredKernel, Tile

SETTINGS = Settings(threshold="iqr")


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return fusion_sweeps.reductions(SETTINGS, job)


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    fusion.apply(SETTINGS, job, state, tile, out)


def _stored(job: Job, state: State) -> StoredKernel | None:
    return fusion.stored(SETTINGS, job, state)


METHOD = MergeMethod(
    name="arcee_fusion",
    title="Arcee Fusion",
    summary="takes from one other model the elements whose difference, times their row's divergence, stands out",
    base="primary",
    space="weights",
    parameters=(),
    kernel=_apply,
    stored=_stored,
    reductions=_reductions,
    min_models=1,
    max_models=1,
    scratch_rows=fusion.SCRATCH_ROWS,
)
