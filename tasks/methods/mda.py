"""MDA: the task vectors' singular directions, aligned with a simplex equiangular tight frame."""

from __future__ import annotations

from mergepipe.tasks.method import MergeMethod, Paper, WholeMatrix
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace import directional
from mergepipe.tasks.subspace.declare import (
    LAMBDA,
    RANK,
    RANK_CAP,
    RTOL,
    SELECTION,
    SVC,
    SVD,
    add_mean,
    is_matrix,
    reductions,
)

METHOD = MergeMethod(
    name="mda",
    title="MDA (Merging with Directional Alignment)",
    summary="replaces the task vectors' leading singular directions by the nearest simplex frame, then adds them up",
    base="required",
    space="deltas",
    parameters=(
        LAMBDA,
        Parameter(
            "mode", "choice",
            "etf: the nearest simplex frame; projection: the sum projected on the frame's span; tsv: orthonormal "
            "vectors, which is TSV-M",
            default="etf", choices=("etf", "projection", "tsv"),
        ),
        RANK,
        RANK_CAP,
        Parameter(
            "sign_rule", "choice", "which of two opposite singular vectors is taken",
            default="maxabs", choices=("maxabs", "none", "balanced"),
        ),
        Parameter(
            "right_align", "choice", "what replaces the right singular vectors",
            default="polar", choices=("polar", "etf", "none"),
        ),
        RTOL, SVC,
        SVD,
        *SELECTION,
        Parameter("other_tensors", "choice", "what all other tensors get", default="mean", choices=("mean",)),
    ),
    kernel=add_mean,
    reductions=reductions,
    matrix=WholeMatrix(is_matrix, directional.steps, directional.start, directional.peak),
    paper=Paper("MDA (Merging with Directional Alignment)", "https://arxiv.org/abs/2512.00391"),
    specification="mda-ta-r1",
    known=(
        "per layer and task the leading left singular vectors of the task vector are kept and laid side by side",
        "the singular vectors of that matrix are aligned with a simplex equiangular tight frame",
        "the merged task vector's column space lies in the frame's span",
        "it is close to TSV-M, in procedure and in results, and needs no data",
    ),
    chosen=(
        "the frame has one vector for each direction kept, and takes the place of TSV-M's orthonormal vectors",
        "the rank: the smaller side divided by the number of models",
        "signs: the largest element of each left vector is positive",
        "right singular vectors are made orthonormal, as TSV-M does",
        "all tensors that are no matrices, embeddings and heads get the mean of the task vectors",
    ),
)  # fmt: skip
