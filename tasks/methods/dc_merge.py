"""DC-Merge: the largest entries of task vectors in shared singular bases."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace import consistent, directional
from mergepipe.tasks.subspace.declare import LAMBDA, RANK, RTOL, SELECTION, SVC, SVD, add_mean, is_matrix, reductions

METHOD = MergeMethod(
    name="dc_merge",
    title="DC-Merge (directional consistency)",
    summary="merges the largest entries of the task vectors, written in singular bases that all tasks share",
    base="required",
    space="deltas",
    parameters=(
        LAMBDA,
        RANK,
        Parameter(
            "smoothing", "choice", "spread each task's singular values: not at all, evenly, or on a line from rho to 1",
            default="none", choices=("none", "avg", "linear"),
        ),
        Parameter("rho", "number", "steepest line of the linear smoothing", default=5.0, minimum=1),
        Parameter(
            "padded", "flag", "count shares of the whole matrix, as for full fine-tuning; false as for adapters",
            default=True,
        ),
        RTOL, SVC,
        SVD,
        *SELECTION,
    ),
    kernel=add_mean,
    reductions=reductions,
    matrix=WholeMatrix(is_matrix, directional.steps, consistent.start, consistent.peak),
    paper=Paper("DC-Merge: Improving Model Merging with Directional Consistency", "https://arxiv.org/abs/2603.06242"),
)  # fmt: skip
