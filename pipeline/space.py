"""Disk space: what a job will need, on which disks, and what it holds there already.

`build` compares this with what is free; `run` then allocates it, so that a full disk is found before hours of work.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from mergepipe.errors import DiskFullError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.handover import SHARDS_OPEN
from mergepipe.pipeline.kept import kept_bytes
from mergepipe.pipeline.masks import kept_base_bytes, mask_bytes
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ScheduledTensor, schedule
from mergepipe.storage.ballast import held_bytes
from mergepipe.storage.workspace import Workspace

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
    copied = sum(info.size for info in (*(plan.side_files or ()), *chain.from_iterable(plan.head_files.values())))
    return heads + sum(mask_bytes(plan).values()) + kept_base_bytes(plan) + copied


def disk_bytes(plan: Plan, stages: Sequence[Sequence[ScheduledTensor]]) -> int:
    """All that a merge takes on disk from its beginning to its end: output, what is beside it, and its workspace.

    `stages` are the plan's, each cut into units.
    """
    kept = sum(kept_bytes(stage, items) for stage, items in zip(plan.stages, stages, strict=True))
    first = 0 if plan.first_stage is None else plan.first_stage.layout().nbytes
    made = 0 if plan.vocabulary is None else plan.vocabulary.made_bytes
    copies = sum(model.copied_bytes for model in plan.models)
    return plan.layout().nbytes + first + beside_bytes(plan) + copies + made + kept


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


def journal_need(plan: Plan, workspace: Workspace, ceiling: Ceiling) -> Need:
    """What journals and statistics of all stages will take, at the most, beside what is there of them."""
    folders = (workspace,) if plan.first_stage is None else (workspace.first_stage, workspace)
    rooms = [
        journal_room(stage, folder, _scheduled(stage, ceiling))
        for stage, folder in zip(plan.stages, folders, strict=True)
    ]
    return Need(workspace.root, sum(rooms), "the journal with its statistics")


def journal_room(plan: Plan, workspace: Workspace, scheduled: Sequence[ScheduledTensor]) -> int:
    """The same in bytes for one stage, cut as it is for the run."""
    held = held_bytes(workspace.statistics)
    with suppress(FileNotFoundError):
        held += workspace.journal_file.stat().st_blocks * 512
    return max(0, kept_bytes(plan, scheduled) - held)


def _scheduled(stage: Plan, ceiling: Ceiling) -> tuple[ScheduledTensor, ...]:
    return schedule(stage, ceiling, gathered=[model.store == "copy" for model in stage.models])
