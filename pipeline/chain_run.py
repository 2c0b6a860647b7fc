"""Running a chain of merges: those that come before, each in its own workspace, and then the result.

Each merge is run like any other, and goes on where it was interrupted like any other. One that is made and whole is
left alone; its plan's id says that it is of this recipe and these inputs. What reads it gets its chunk manifest when
its files are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from mergepipe.errors import Interrupted
from mergepipe.pipeline import changes, outputs
from mergepipe.pipeline.chain_plan import is_whole
from mergepipe.pipeline.events import Announcer, Note
from mergepipe.pipeline.handover import check_command
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.models import open_model
from mergepipe.pipeline.move import move_output
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.records import MANIFEST_NAME
from mergepipe.pipeline.schedule import ceiling_of, schedule
from mergepipe.pipeline.vocabulary_rows import make_late_rows
from mergepipe.storage.kerchunk import REFERENCES, write_references
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.workspace import Workspace, WorkspaceLock

Run = TypeVar("Run", bound=Callable[..., Any])


def earlier_first(run: Run) -> Run:
    """Have a function that runs one workspace run those of earlier merges first.

    The workspace stays locked meanwhile. Complete files are handed over to a command of the user's, the output is
    moved, and diagnostics made, for the result only; what would be refused there is refused before anything runs.
    """

    @functools.wraps(run)
    def run_chain(work: str | Path = ".mergepipe", **options: Any) -> Any:
        root = Workspace(Path(work))
        if root.earlier() and outputs.finished(last := Plan.from_json(root.read_plan())) is None:
            own = {**options, "on_shard": None, "out": None, "diagnostics": False}
            with WorkspaceLock(root):
                _check_result(root, last, options)
                _run_earlier(root, lambda workspace: run(workspace.root, **own), options)
        return run(work, **options)

    return cast(Run, run_chain)


def _check_result(root: Workspace, last: Plan, options: dict[str, Any]) -> None:
    """Refuse what the last merge would refuse, and move its output."""
    command = options.get("on_shard")
    if command is not None:
        check_command(command)
    if options.get("out") is not None:
        last = move_output(
            last, root, options["out"], restart=options.get("restart", False), handed_over=command is not None
        )
    ceiling = ceiling_of(last, options.get("memory"), options.get("workers"))
    if options.get("diagnostics"):
        changes.check(last, ceiling, command)
    for stage in last.stages:
        schedule(stage, ceiling, gathered=[model.store == "copy" for model in stage.models])


def plans(root: Workspace) -> list[tuple[str, Workspace, Plan]]:
    """Name, workspace and plan of every merge that comes before, in the order in which they are made."""
    found = [(name, root.merge(name)) for name in root.earlier()]
    return [(name, workspace, Plan.from_json(workspace.read_plan())) for name, workspace in found]


def _run_earlier(root: Workspace, run: Callable[[Workspace], Any], options: dict[str, Any]) -> None:
    announce = Announcer(options.get("on_event"))
    chain = plans(root)
    last = Plan.from_json(root.read_plan())
    readers = [(workspace, plan) for _, workspace, plan in chain] + [(root, last)]
    for number, (name, workspace, plan) in enumerate(chain, start=1):
        if is_whole(plan):
            announce(Note(f"the merge '{name}' is made already"))
            continue
        announce(Note(f"merge {number} of {len(chain) + 1}: '{name}'"))
        _forget_manifests(plan.output, readers)
        if outputs.finished(plan) is not None:
            _drop(workspace, plan)
        _take_in(workspace, plan)
        try:
            run(workspace)
        except Interrupted as error:
            text = str(error).replace(str(workspace.root), str(root.root))
            raise Interrupted(text) from error
    _take_in(root, last)
    announce(Note(f"merge {len(chain) + 1} of {len(chain) + 1}: the result"))


def _forget_manifests(output: str, readers: list[tuple[Workspace, Plan]]) -> None:
    """What is made anew has other times and inodes: whoever reads it looks again."""
    for workspace, plan in readers:
        for number, model in enumerate(plan.models):
            if model.path == output:
                workspace.manifest_file(number, model.label).unlink(missing_ok=True)


def _drop(workspace: Workspace, plan: Plan) -> None:
    """Forget a merge that was made and has lost files since."""
    (Path(plan.output) / MANIFEST_NAME).unlink()
    outputs.remove_work(plan)
    workspace.forget_progress()


def _take_in(workspace: Workspace, plan: Plan) -> None:
    """Make the chunk manifests of what was made before and is read now, and rows that were waiting for it."""
    for number, model in enumerate(plan.models):
        path = workspace.manifest_file(number, model.label)
        if model.made and not path.exists():
            manifest = virtual_manifest(open_model(model.reference).stored, plan.chunk_bytes)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_references(manifest, path.parent / REFERENCES)
            manifest.save(path)
    manifests = {
        number: ChunkManifest.load(workspace.manifest_file(number, model.label))
        for number, model in enumerate(plan.models)
        if plan.vocabulary is not None and model.role != "carried"
    }
    inputs, paths = Inputs.of(list(manifests.values())), [model.path for model in plan.models]
    make_late_rows(workspace.vocabulary, plan.vocabulary, paths, manifests, inputs.check)
