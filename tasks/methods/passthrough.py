"""Passthrough: one model's tensor as it is, or times a factor."""

from __future__ import annotations

from mergepipe.tasks.method import Array, Job, MergeMethod, State, Tile
from mergepipe.tasks.parameter import Parameter


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    scale = job.model_params[0]["scale"]
    out[:] = tile.values[0]
    if scale is not None:
        out *= job.work.type(scale)


METHOD = MergeMethod(
    name="passthrough",
    title="Passthrough",
    summary="copies the tensors of one model, scaled if asked to",
    base="ignored",
    space="weights",
    parameters=(Parameter("scale", "number", "factor; a copy if not set", default=None, per_model=True),),
    kernel=_apply,
    min_models=1,
    max_models=1,
)
