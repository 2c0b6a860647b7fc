"""Disk space: what a job will need, on which disks, and what it holds there already.

`build` compares this with what is free; `run` then allocates it, so that a full disk is found before hours of work.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergepipe.errors import DiskFullError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.handover import SHARDS_OPEN
from mergepipe.pipeline.kinds import kind_of
from mergepipe.pipeline.masks import kept_base_bytes, mask_bytes
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.pipeline.rounds import sweeps_ahead
from mergepipe.storage.ballast import held_bytes
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks.method import Reduction
from mergepipe.tasks.registry import method as find_method

SMALL_BYTES = 16 * 1024
"""Small statistics and journal records of one tensor, at the most."""

HEAD_BYTES = 8192
"""Header and page of a head's file beside its values."""


@dataclass(frozen=True, slots=True)
class Need:
    """So many bytes more are needed on the disk that `folder` is or will be on."""

    folder: Path
    nbytes: int
    what: str

    def __str__(self) -> str:
        return f"{self.what} in '{self.folder}' needs {self.nbytes:,} bytes"


def check_room(needs: Sequence[Need]) -> None:
    """Refuse work that can't end well.

    Parameters
    ----------
    needs : sequence of Need
        Those on the same disk are added up.

    Raises
    ------
    DiskFullError
        Naming what needs how much, and how much is free.
    """
    disks: dict[int, list[tuple[Path, Need]]] = {}
    for need in needs:
        if need.nbytes > 0:
            place = _existing(need.folder)
            disks.setdefault(os.stat(place).st_dev, []).append((place, need))
    for members in disks.values():
        free = shutil.disk_usage(members[0][0]).free
        if sum(need.nbytes for _, need in members) > free:
            listed = ", ".join(str(need) for _, need in members)
            where = "are free" if len(members) == 1 else "are free on the disk that all of it is on"
            raise DiskFullError(f"{listed}, {free:,} {where}: make room, or choose another disk")


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def beside_bytes(plan: Plan) -> int:
    """What lies beside the weights, at the most: copied files, heads, masks, and what masks need of the base."""
    heads = plan.side_bytes + HEAD_BYTES * sum(len(sources) for sources in plan.side.values())
    copied = sum(info.size for info in plan.side_files or ())
    return heads + sum(mask_bytes(plan).values()) + kept_base_bytes(plan) + copied


def disk_bytes(plan: Plan) -> int:
    """All that a merge takes on disk from its beginning to its end: output, what is beside it, and its workspace."""
    first = 0 if plan.first_stage is None else plan.first_stage.layout().nbytes
    made = 0 if plan.vocabulary is None else plan.vocabulary.made_bytes
    copies = sum(model.copied_bytes for model in plan.models)
    return plan.layout().nbytes + first + beside_bytes(plan) + copies + made + all_statistics_bytes(plan)


def output_need(plan: Plan, *, handed_over: bool = False) -> Need:
    """What the output folder will take beside what it holds already.

    Parameters
    ----------
    plan : Plan
    handed_over : bool
        Whether complete files are handed over as they come: only a few take up space at once then.
    """
    sizes = sorted((shard.size for shard in plan.layout().shards), reverse=True)
    total = sum(sizes[:SHARDS_OPEN] if handed_over else sizes) + beside_bytes(plan)
    if plan.first_stage is not None:  # kept beside the output, whatever is handed over
        total += plan.first_stage.layout().nbytes - outputs.held_bytes(plan.first_stage)
    what = f"{SHARDS_OPEN} files of the output" if handed_over else "the output"
    return Need(Path(plan.output), total - outputs.held_bytes(plan), what)


def copies_need(plan: Plan, workspace: Workspace) -> Need:
    """What the copied stores will take beside what is there of them."""
    copies = sum(model.copied_bytes for model in plan.models)
    return Need(workspace.root, copies - held_bytes(workspace.stores), "the copied store")


def statistics_need(plan: Plan, workspace: Workspace) -> Need:
    """What the statistics will take, at the most, beside what is there of them."""
    return Need(workspace.root, all_statistics_bytes(plan) - held_bytes(workspace.statistics), "the statistics")


def all_statistics_bytes(plan: Plan) -> int:
    """What the statistics of all tensors take, at the most."""
    ahead = sweeps_ahead(plan)
    found: dict[Hashable, int] = {}
    total = 0
    for tensor in plan.tensors:
        sweeps = ahead.get(tensor.name, ())
        # Rounds may count otherwise for each tensor.
        key = (kind_of(tensor), tensor.name if sweeps else "")
        if key not in found:
            found[key] = statistics_bytes(tensor, plan.seed, sweeps)
        total += found[key]
    return total


def statistics_bytes(tensor: PlannedTensor, seed: int, ahead: Sequence[Reduction] = ()) -> int:
    """The same for one tensor: a histogram per model, and little else.

    A histogram has no more entries than there are parameters, and its zeros are compressed away.
    """
    if tensor.action == "copy":
        return 0
    job = tensor.job(seed)
    counts = [sweep.shapes(job)[0] for sweep in (*ahead, *find_method(tensor.method).reductions(job))]
    largest = max((math.prod(shape) for shape in counts if shape is not None), default=0)
    return SMALL_BYTES + 8 * min(largest, 2 * job.models * _size(tensor))


def _size(tensor: PlannedTensor) -> int:
    return math.prod(tensor.shape)
