"""Moving the output of a plan, before work on it has begun."""

from __future__ import annotations

import os
from pathlib import Path

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.space import check_room, output_need
from mergepipe.pipeline.stages import folders_read, moved_to
from mergepipe.storage.workspace import Workspace


def move_output(plan: Plan, workspace: Workspace, out: str | Path, *, restart: bool, handed_over: bool) -> Plan:
    """The plan with another output folder, written into the workspace; the plan itself if it is that folder already.

    Parameters
    ----------
    plan : Plan
        The workspace's plan, whose lock the caller holds.
    workspace : Workspace
    out : path
        The folder, from the current one.
    restart : bool
        Whether the work of earlier runs is to be forgotten: an unfinished output is removed then, a finished one stays.
    handed_over : bool
        Whether complete files are handed over as they come, so that few take up space at once.

    Raises
    ------
    WorkspaceError
        If work on it has begun.
    OutputExistsError, DiskFullError
        If the folder won't do; the plan stays as it was.
    """
    target = os.path.abspath(out)
    if target == plan.output:
        return plan
    finished = outputs.finished(plan) is not None
    if not restart and (finished or workspace.begun()):
        state = "is complete" if finished else "has begun"
        raise WorkspaceError(
            f"the output '{plan.output}' of this plan {state}, it can't be moved to '{target}' any more: run without "
            f"--out, build into another --work, or forget this work with --restart"
        )
    moved = moved_to(plan, target)
    outputs.check_folder(Path(target), folders_read(moved))
    check_room([output_need(moved, handed_over=handed_over)])
    if workspace.begun():
        if not finished:
            outputs.remove_work(plan)
        workspace.forget_progress()
    workspace.write_plan(moved.to_json())
    return moved
