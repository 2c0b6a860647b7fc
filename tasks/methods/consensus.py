"""Consensus: keeps the elements that matter to several tasks, by the TALL mask of each.

An element matters to a task if its own change outweighs what the others do to it: ``abs(tau_k) > mask_lambda *
abs(tau - tau_k)`` with the merged task vector ``tau``. Elements that matter to at least `min_active` tasks keep
``tau``, all others stay at the base. With `min_active` 1 only catastrophic weights go, which no task wants; with 0 none
do, which is task arithmetic; with more than there are models, all do.
"""

from __future__ import annotations

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS


@kernel
def _agree(base: Array, values: Array, limits: Array, elects: bool, least: int, scale: float, out: Array) -> None:
    work = out.dtype.type
    zero, factor = work(0), work(scale)
    models = values.shape[0]
    for i in range(out.size):
        total = zero
        for k in range(models):
            total += values[k, i]
        if elects:
            vote = total
            total = zero
            for k in range(models):
                value = values[k, i]
                total += value if (value >= zero) == (vote >= zero) else zero
        active = 0
        for k in range(models):
            value = values[k, i]
            active += abs(value) > limits[k] * abs(total - value)
        out[i] = base[i] + factor * total if active >= least else base[i]


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    thin(job, state, tile)
    elects, least, scale = job.params["merged"] == "dis_sum", job.params["min_active"], job.params["lambda"]
    _agree(tile.base, tile.values, job.per_model("mask_lambda"), elects, least, scale, out)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return SPARSIFIERS[job.sparsify].reductions(job)


METHOD = MergeMethod(
    name="consensus",
    title="Consensus (TALL masks)",
    summary="keeps the elements of the summed task vectors that matter to several tasks",
    base="required",
    space="deltas",
    parameters=(
        Parameter(
            "mask_lambda", "number", "how much larger than the others' a task's own change has to be", default=0.6,
            per_model=True, minimum=0,
        ),
        Parameter("min_active", "integer", "to how many tasks an element has to matter", default=2, minimum=0),
        Parameter(
            "merged", "choice", "the merged task vector: the sum, or the sum of those that agree with the elected sign",
            default="sum", choices=("sum", "dis_sum"),
        ),
        family.LAMBDA,
    ),
    kernel=_apply,
    reductions=_reductions,
    paper=Paper(
        "Localizing Task Information for Improved Model Merging and Compression", "https://arxiv.org/abs/2405.07813"
    ),
)  # fmt: skip
