"""DELLA's dropping, then task arithmetic: drop at random, small elements of a row more often, and add up."""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks import weighting
from mergepipe.tasks.della import EPSILON, check, drop
from mergepipe.tasks.host_drop import RESCALE, RESCALE_BY, HostDrop
from mergepipe.tasks.method import MergeMethod, Paper
from mergepipe.tasks.random_drop import DENSITY

_HOST = HostDrop(drop, check)

METHOD = MergeMethod(
    name="della_linear",
    title="DELLA (linear)",
    summary="drops elements of the task vectors at random by their rank in a row and adds up the rest",
    base="required",
    space="deltas",
    parameters=(
        *family.WEIGHTS,
        DENSITY,
        EPSILON,
        RESCALE,
        RESCALE_BY,
        family.LAMBDA,
        family.normalize(False),
        family.consensus("none"),
        family.INT8_MASK,
    ),
    kernel=_HOST.apply,
    reductions=_HOST.reductions,
    thin=_HOST.thin,
    rounds=weighting.rounds,
    rounds_read=weighting.READ,
    scratch_rows=family.SCRATCH_ROWS,
    paper=Paper("DELLA-Merging: Reducing Interference in Model Merging", "https://arxiv.org/abs/2406.11617"),
)
