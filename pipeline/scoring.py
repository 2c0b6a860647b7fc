"""Which tensors a GPU helps with whose method is element-wise, and what that takes of this machine's memory.

Coordinate fusion measures rows, with two exponentials per element in float64. Where there is a GPU it does that
(:mod:`mergepipe.tasks.fusion_torch`), if the memory ceiling has room for torch, the driver and the staging buffers:
without `--device` a ceiling that is too small for those means the CPU. The result is the same to the bit; still the
device is recorded as it is for whole matrices, and a merge stays with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline import devices
from mergepipe.pipeline.memory import CUDA_BYTES, TORCH_BYTES, Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.rounds import sweeps_ahead
from mergepipe.pipeline.schedule import ScheduledTensor, schedule
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.method import can_offload
from mergepipe.tasks.registry import METHODS
from mergepipe.tasks.rows_torch import LANE_COUNT, lane_bytes

GPU_FILES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
"""One of them is there where a GPU is that torch can use; to know that, torch need not be imported."""


def schedule_with(
    plan: Plan, ceiling: Ceiling, gathered: Sequence[bool], device: str, staging: Mapping[int, int]
) -> tuple[ScheduledTensor, ...]:
    """The schedule of a plan whose rows are scored on a device: what driving it takes is set apart from the ceiling.

    Raises
    ------
    MemoryBudgetError
        If that leaves too little for a tensor.
    """
    if device == "cpu":
        return schedule(plan, ceiling, gathered=gathered)
    rest = replace(ceiling, reserved=ceiling.reserved + scoring_bytes(staging, device))
    return schedule(plan, rest, gathered=gathered)


def fits(plan: Plan, ceiling: Ceiling, gathered: Sequence[bool], device: str, staging: Mapping[int, int]) -> bool:
    """Whether the ceiling has room for scoring on a device."""
    try:
        return bool(schedule_with(plan, ceiling, gathered, device, staging))
    except MemoryBudgetError:
        return False


def staging_bytes(plan: Plan) -> dict[int, int]:
    """The tensors that another device can help with, by number, and the staging memory that it takes for each lane."""
    ahead = sweeps_ahead(plan)
    found = {}
    for number, tensor in enumerate(plan.tensors):
        if tensor.action != "merge":
            continue
        job = tensor.job(plan.seed)
        if any(can_offload(one) for one in (*METHODS[tensor.method].reductions(job), *ahead.get(tensor.name, ()))):
            block = block_elements(tensor.shape)
            found[number] = lane_bytes(len(tensor.sources), block, job.work.itemsize)
    return found


def scoring_bytes(staging: Mapping[int, int], device: str) -> int:
    """Memory of this machine that scoring on a device takes, whatever the tensor; `staging` as it is found above."""
    lanes = LANE_COUNT * max(staging.values(), default=0)
    return TORCH_BYTES + lanes + (CUDA_BYTES if device.startswith("cuda") else 0)


def device_for(asked: str, recorded: str | None, fits: Callable[[str], bool], *, bound: bool) -> str:
    """The device that rows are scored with; on "cpu" torch is not used.

    Parameters
    ----------
    asked, recorded
        As for :func:`mergepipe.pipeline.devices.choose`.
    fits : callable
        Whether scoring on a device stays under the memory ceiling. 'auto' begins with a GPU only then.
    bound : bool
        Whether unfinished work has to go on where it began: not if what is recorded is where matrices are worked on.

    Raises
    ------
    UsageError, WorkspaceError
        As :func:`mergepipe.pipeline.devices.choose`.

    Examples
    --------
    >>> device_for("cpu", None, lambda device: False, bound=True)
    'cpu'
    >>> device_for("auto", "cuda:0", lambda device: False, bound=False)
    'cpu'
    """
    if asked != "auto" or (bound and recorded is not None):
        return devices.choose(asked, recorded, needed=True)
    if recorded == "cpu" or not any(Path(file).exists() for file in GPU_FILES) or not fits(recorded or "cuda:0"):
        return "cpu"
    return devices.choose(asked, recorded, needed=True)
