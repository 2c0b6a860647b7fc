"""TSV-M: task singular vectors, made orthonormal across tasks."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.subspace import directional
from mergepipe.tasks.subspace.declare import LAMBDA, RANK, RTOL, SELECTION, SVC, SVD, add_mean, is_matrix, reductions

METHOD = MergeMethod(
    name="tsv_m",
    title="TSV-M (task singular vectors)",
    summary="makes the task vectors' leading singular vectors orthonormal to each other, then adds them up",
    base="required",
    space="deltas",
    parameters=(LAMBDA, RANK, RTOL, SVC, SVD, *SELECTION),
    kernel=add_mean,
    reductions=reductions,
    matrix=WholeMatrix(is_matrix, directional.steps, directional.start, directional.peak),
    paper=Paper(
        "Task Singular Vectors: Reducing Task Interference in Model Merging", "https://arxiv.org/abs/2412.00081"
    ),
)
