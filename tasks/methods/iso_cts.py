"""Iso-CTS: common and task-specific directions with a flat spectrum."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace import isotropic
from mergepipe.tasks.subspace.declare import EXACT_SVD, LAMBDA, RTOL, SELECTION, add_mean, is_matrix, reductions

METHOD = MergeMethod(
    name="iso_cts",
    title="Iso-CTS (isotropic merging in common and task-specific subspaces)",
    summary="keeps the common directions, adds each task's own, and gives all of them the same singular value",
    base="required",
    space="deltas",
    parameters=(
        LAMBDA,
        Parameter(
            "common_fraction", "number", "share of the directions that is common to all tasks", default=0.8,
            minimum=0, maximum=1,
        ),
        RTOL,
        EXACT_SVD,
        *SELECTION,
    ),
    kernel=add_mean,
    reductions=reductions,
    matrix=WholeMatrix(is_matrix, isotropic.common_steps, isotropic.start_common, isotropic.common_peak),
    paper=Paper("No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
                "https://arxiv.org/abs/2502.04959"),
)  # fmt: skip
