"""Task arithmetic: the weighted sum of the task vectors, added to the base."""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.method import MergeMethod, Paper
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace import post

METHOD = MergeMethod(
    name="task_arithmetic",
    title="Task Arithmetic",
    summary="adds the weighted task vectors of all models to the base",
    base="required",
    space="deltas",
    parameters=(
        *family.WEIGHTS,
        family.LAMBDA,
        family.normalize(False),
        family.consensus("none"),
        Parameter("density", "number", "mergekit ignores it too", default=1.0, per_model=True, without_effect=True),
        Parameter("rescale", "flag", "mergekit ignores it too", default=False, without_effect=True),
        family.INT8_MASK,
        *post.PARAMETERS,
    ),
    kernel=family.apply,
    matrix=post.CALIBRATED,
    stored=family.stored,
    reductions=family.reductions,
    rounds=family.rounds,
    rounds_read=family.ROUNDS_READ,
    scratch_rows=family.SCRATCH_ROWS,
    paper=Paper("Editing Models with Task Arithmetic", "https://arxiv.org/abs/2212.04089"),
)
