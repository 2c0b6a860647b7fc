"""NearSwap: move the base towards the other model where the two are near.

``out = w * other + (1 - w) * base`` with ``w = clip(t / max(abs(base - other), 1e-6), 0, 1)``: elements closer than `t`
are taken from the other model, farther ones move by `t`.
"""

from __future__ import annotations

import numpy as np

from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Job, MergeMethod, Paper, State, Tile
from mergepipe.tasks.parameter import Parameter

SMALLEST_DISTANCE = 1e-6


@kernel
def _swap(base: Array, other: Array, t: float, smallest: float, out: Array) -> None:
    """In float64, rounded once."""
    for i in range(out.size):
        near, far = np.float64(base[i]), np.float64(other[i])
        weight = min(max(t / max(abs(near - far), smallest), 0.0), 1.0)
        out[i] = weight * far + (1.0 - weight) * near


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    _swap(tile.base, tile.values[0], job.params["t"], SMALLEST_DISTANCE, out)


METHOD = MergeMethod(
    name="nearswap",
    title="NearSwap",
    summary="moves the base towards one other model, all the way where the two are near",
    base="primary",
    space="weights",
    parameters=(Parameter("t", "number", "how far an element moves at most"),),
    kernel=_apply,
    min_models=1,
    max_models=1,
    paper=Paper("QuartetAnemoi-70B-t0.0001", "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"),
)
