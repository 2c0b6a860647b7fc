"""Model Breadcrumbs' dropping, then the sign consensus of TIES."""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.breadcrumbs import PARAMETERS
from mergepipe.tasks.method import MergeMethod, Paper

METHOD = MergeMethod(
    name="breadcrumbs_ties",
    title="Model Breadcrumbs with TIES",
    summary="drops the largest and the smallest elements of the task vectors and merges those that agree in sign",
    base="required",
    space="deltas",
    parameters=(
        *family.WEIGHTS,
        *PARAMETERS,
        family.LAMBDA,
        family.normalize(False),
        family.consensus("sum"),
        family.INT8_MASK,
    ),
    kernel=family.apply,
    stored=family.stored,
    reductions=family.reductions,
    rounds=family.rounds,
    rounds_read=family.ROUNDS_READ,
    trim="breadcrumbs",
    scratch_rows=family.SCRATCH_ROWS,
    paper=Paper(
        "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", "https://arxiv.org/abs/2312.06795"
    ),
)
