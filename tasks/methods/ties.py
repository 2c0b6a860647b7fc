"""TIES: trim each task vector, elect a sign per element, merge those that agree.

As in mergekit: the trim takes exact per-tensor thresholds, weights count in the election, a sum of zero elects plus,
and the merged value is divided by the weights of those that agree.
"""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.method import MergeMethod, Paper
from mergepipe.tasks.sparsify import TRIM_PARAMETERS
from mergepipe.tasks.subspace import post

METHOD = MergeMethod(
    name="ties",
    title="TIES-Merging",
    summary="trims the task vectors, elects a sign per parameter and averages the models that agree with it",
    base="required",
    space="deltas",
    parameters=(
        *family.WEIGHTS,
        *TRIM_PARAMETERS,
        family.LAMBDA,
        family.normalize(True),
        family.consensus("sum"),
        family.INT8_MASK,
        *post.PARAMETERS,
    ),
    kernel=family.apply,
    matrix=post.CALIBRATED,
    stored=family.stored,
    reductions=family.reductions,
    rounds=family.rounds,
    rounds_read=family.ROUNDS_READ,
    trim="magnitude",
    scratch_rows=family.SCRATCH_ROWS,
    paper=Paper("TIES-Merging: Resolving Interference When Merging Models", "https://arxiv.org/abs/2306.01708"),
)
