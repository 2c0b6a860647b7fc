"""Removing a workspace, and what an unfinished run of its plan has left in the output folder."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.workspace import Workspace, WorkspaceLock


@dataclass(frozen=True, slots=True)
class Scratch:
    """What can go: files and folders, and the bytes they hold."""

    paths: tuple[Path, ...]
    nbytes: int


def scratch(work: str | Path = ".mergepipe") -> Scratch:
    """What `clean` would remove; nothing is removed.

    Raises
    ------
    WorkspaceError
        If `work` is no workspace.
    """
    workspace = Workspace(Path(work))
    if not workspace.is_ours():
        raise WorkspaceError(f"'{workspace.root}' is no workspace of mergepipe: nothing is removed")
    paths = [path for path in workspace.contents() if path.exists()]
    plan = _unfinished(workspace)
    if plan is not None:
        paths += [path for name in sorted(outputs.work_names(plan)) if (path := Path(plan.output) / name).exists()]
    return Scratch(tuple(paths), sum(_size(path) for path in paths))


def clean(work: str | Path = ".mergepipe") -> None:
    """Remove the workspace and unfinished output. Inputs, finished outputs and files of others stay.

    Raises
    ------
    WorkspaceError
        If `work` is no workspace, or a process is at work in it.
    """
    scratch(work)
    workspace = Workspace(Path(work))
    with WorkspaceLock(workspace):
        plan = _unfinished(workspace)
        if plan is not None:
            outputs.remove_work(plan)
            with contextlib.suppress(OSError):
                Path(plan.output).rmdir()
        workspace.remove()


def _unfinished(workspace: Workspace) -> Plan | None:
    """The plan, if a run of it has begun and not ended; None too if the plan can't be read: nothing is known then."""
    try:
        plan = Plan.from_json(workspace.read_plan())
    except WorkspaceError:
        return None
    return plan if workspace.begun() and outputs.finished(plan) is None else None


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(os.lstat(os.path.join(root, name)).st_size for root, _, names in os.walk(path) for name in names)
