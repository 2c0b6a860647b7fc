"""DARE, then task arithmetic: drop at random, scale the rest, add up."""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks import weighting
from mergepipe.tasks.host_drop import RESCALE, RESCALE_BY, HostDrop
from mergepipe.tasks.method import MergeMethod, Paper
from mergepipe.tasks.random_drop import DENSITY, draw, drop

_HOST = HostDrop(drop, draw=draw)

METHOD = MergeMethod(
    name="dare_linear",
    title="DARE",
    summary="drops random elements of the task vectors, scales the rest and adds them to the base",
    base="required",
    space="deltas",
    parameters=(
        *family.WEIGHTS,
        DENSITY,
        RESCALE,
        RESCALE_BY,
        family.LAMBDA,
        family.normalize(False),
        family.consensus("none"),
        family.INT8_MASK,
    ),
    kernel=_HOST.apply,
    stored=_HOST.stored,
    reductions=_HOST.reductions,
    thin=_HOST.thin,
    rounds=weighting.rounds,
    rounds_read=weighting.READ,
    scratch_rows=family.SCRATCH_ROWS,
    paper=Paper("Language Models are Super Mario", "https://arxiv.org/abs/2311.03099"),
)
