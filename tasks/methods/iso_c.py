"""Iso-C: the summed task vector with a flat spectrum."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.subspace import isotropic
from mergepipe.tasks.subspace.declare import EXACT_SVD, LAMBDA, RTOL, SELECTION, add_mean, is_matrix, reductions

METHOD = MergeMethod(
    name="iso_c",
    title="Iso-C (isotropic merging in the common subspace)",
    summary="gives all singular values of the summed task vector their mean",
    base="required",
    space="deltas",
    parameters=(LAMBDA, RTOL, EXACT_SVD, *SELECTION),
    kernel=add_mean,
    reductions=reductions,
    matrix=WholeMatrix(is_matrix, isotropic.flat_steps, isotropic.start_flat, isotropic.flat_peak),
    paper=Paper("No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
                "https://arxiv.org/abs/2502.04959"),
)  # fmt: skip
