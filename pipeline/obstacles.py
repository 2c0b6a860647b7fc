"""What may be in the way of a build: unfinished work in the workspace, and what it has left in the output folder."""

from __future__ import annotations

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.inputs import what_changed
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.workspace import Workspace


def abandoned_work(workspace: Workspace, plan: Plan, force: bool) -> Plan | None:
    """The plan that the workspace's journal belongs to, if it is another one and may be dropped.

    Raises
    ------
    WorkspaceError
        If it is unfinished and `force` does not drop it.
    """
    if not (workspace.plan_file.exists() and workspace.begun()):
        return None
    old = Plan.from_json(workspace.read_plan())
    if (old.id, old.output, old.version) == (plan.id, plan.output, plan.version):
        return None
    if outputs.finished(old) is None and not force:
        if (changed := what_changed(workspace, old)) is not None:
            raise WorkspaceError(f"'{workspace.root}' holds unfinished work that can't go on as it is: {changed}")
        raise WorkspaceError(
            f"'{workspace.root}' holds unfinished work of another recipe, version or output ('{old.output}'): finish "
            f"it with `mergepipe run`, drop it with --force, or use another --work"
        )
    return old


def unfinished_names(workspace: Workspace) -> set[str]:
    """Names that an unfinished run of the workspace's present plan may have left in its output folder."""
    if not (workspace.plan_file.exists() and workspace.begun()):
        return set()
    plan = Plan.from_json(workspace.read_plan())
    return set() if outputs.finished(plan) is not None else outputs.work_names(plan)
