"""OPCM: models merged one after another, each orthogonally to the merge so far."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace import sequential
from mergepipe.tasks.subspace.declare import EXACT_SVD, LAMBDA, RTOL

METHOD = MergeMethod(
    name="opcm",
    title="OPCM (orthogonal projection-based continual merging)",
    summary="merges models one after another, each without what it shares with the merge so far; more can follow later",
    base="required",
    space="deltas",
    parameters=(
        LAMBDA,
        Parameter(
            "alpha", "number",
            "share of the singular values' sum whose directions are closed to later models, wholly; 0 closes none",
            default=0.5, minimum=0, maximum=1, open_maximum=True,
        ),
        RTOL,
        EXACT_SVD,
        Parameter("include", "patterns", "matrices to project; if empty, all that are not excluded", default=()),
        Parameter(
            "exclude", "patterns", "matrices that are added up without a projection, as all other tensors are",
            default=("embed_tokens", "lm_head"),
        ),
    ),
    kernel=sequential.apply,
    reductions=sequential.reductions,
    scratch_rows=sequential.SCRATCH_ROWS,
    matrix=WholeMatrix(
        sequential.is_projected, sequential.steps, sequential.start, sequential.peak, onto_base=False
    ),
    carries=True,
    paper=Paper(
        "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging",
        "https://arxiv.org/abs/2501.09522",
    ),
)  # fmt: skip
