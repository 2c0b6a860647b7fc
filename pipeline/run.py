"""Running a plan, or going on with it: everything around the execution itself, and what is published in the end.

An execution (:mod:`mergepipe.pipeline.execution`) makes the weights; here are the lock, the version, stages that come
one after the other, the manifest, and the index last. Running again replays the journal and does the rest.
"""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergepipe.errors import DamageError, WorkspaceError
from mergepipe.pipeline import changes, devices, kept_norms, outputs, recheck, stages
from mergepipe.pipeline.chain_run import earlier_first
from mergepipe.pipeline.descriptors import allow_descriptors
from mergepipe.pipeline.eventlog import EventLog
from mergepipe.pipeline.events import (
    Announcer,
    Listener,
    Note,
    RunFinished,
)
from mergepipe.pipeline.execution import Execution, How, Verify
from mergepipe.pipeline.handover import check_command, hand_over, handed_record
from mergepipe.pipeline.measure import Meter
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.move import move_output
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.reading import ReaderKind
from mergepipe.pipeline.resume import (
    Progress,
)
from mergepipe.pipeline.schedule import ceiling_of
from mergepipe.pipeline.verify import verify as verify_output
from mergepipe.storage.file_errors import explained
from mergepipe.storage.journal import Journal, read_journal
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from mergepipe.tasks.method import State


@dataclass(frozen=True, slots=True)
class Result:
    """What a run leaves behind.

    Attributes
    ----------
    output : Path
        The merged checkpoint's folder.
    manifest : dict
        Contents of its `mergepipe_manifest.json`.
    """

    output: Path
    manifest: dict[str, Any]


@explained()
@earlier_first
def run(
    work: str | Path = ".mergepipe",
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    device: str = "auto",
    reader: ReaderKind = "auto",
    sha256: bool = True,
    verify: Verify = "sample",
    restart: bool = False,
    on_shard: str | None = None,
    diagnostics: bool = False,
    stop: threading.Event | None = None,
    on_event: Listener | None = None,
) -> Result:
    """Carry out the plan of a workspace, or go on with it where an earlier run ended.

    Parameters
    ----------
    work : path
        The workspace that `build` wrote.
    out : path, optional
        The output folder, in place of the plan's: until work begins the output can be moved.
    memory : size, optional
        Ceiling of this run ("2GiB"); the plan's by default.
    workers : int, optional
        Threads that compute; by default one per processor, or as many as the ceiling has room for.
    device : str
        'cpu', 'cuda', 'cuda:N', or 'auto' for the first GPU if there is one: where whole matrices are worked on, and
        rows scored (by 'auto' only if the ceiling has room for that).
    reader : {'auto', 'mmap', 'direct'}
        How inputs are read: through windows onto the page cache, or past it; past it where all filesystems allow that.
    sha256 : bool
        Whether to record the SHA-256 of each shard.
    verify : {'none', 'sample', 'full'}
        How much of the work of an earlier run, or of a finished output, is read back before it is believed.
    restart : bool
        Forget the work of earlier runs.
    on_shard : str, optional
        A command for the shell that takes each complete shard over, `{path}` in it being the file; see
        :mod:`mergepipe.pipeline.handover`. Only a few unfinished shards take up disk space then.
    diagnostics : bool
        Read output and base once more in the end, and the inputs of what was thinned, and put into the manifest how
        each tensor has changed and what norm was kept; see :mod:`mergepipe.pipeline.changes` and
        :mod:`mergepipe.pipeline.kept_norms`. Of a merge that is finished, too.
    stop : threading.Event, optional
        Set it (from a signal handler, say) to end the run: units at work are finished and committed first.
    on_event : callable, optional
        Told what happens; see :mod:`mergepipe.pipeline.events`.

    Returns
    -------
    Result

    Raises
    ------
    WorkspaceError
        If there is no plan, or one of another version, or another process is at work on it; or if `out` is another
        folder than that in which work has begun.
    InputChangedError
        If an input file is no longer what it was when the plan was made.
    MemoryBudgetError, DiskFullError
        If the ceiling or the disk does not suffice.
    HandOverError
        If the command `on_shard` fails; the shard is kept.
    NonFiniteError
        If an input tensor holds a NaN or an infinity.
    Interrupted
        If the process was asked to stop; what was done is kept.
    """
    if on_shard is not None:
        check_command(on_shard)
    workspace = Workspace(Path(work))
    workspace.read_plan()  # says so if there is none; a lock needs a folder to be in
    log = EventLog(workspace.events_file, also=on_event)
    inputs: list[str] = []
    with explained(inputs), WorkspaceLock(workspace), log:
        announce = Announcer(log)
        plan = Plan.from_json(workspace.read_plan())
        inputs += stages.folders_read(plan)
        _check_version(plan, workspace)
        if out is not None:
            plan = move_output(plan, workspace, out, restart=restart, handed_over=on_shard is not None)
        ended = stop or threading.Event()
        ceiling = ceiling_of(plan, memory, workers)
        if diagnostics:
            changes.check(plan, ceiling, on_shard)
            for stage, _ in kept_norms.stages_of(plan, workspace):
                kept_norms.cut(stage, ceiling)
        complete = None if restart else outputs.finished(plan)
        if complete is not None and not _is_damaged(plan, workspace, verify):
            _hand_over_single(plan, workspace, on_shard)
            if diagnostics and not changes.are_in(complete):
                at = devices.choose(device, complete["device"] if device == "auto" else None, needed=True)
                _compare(complete, plan, workspace, ceiling, at, ended, announce)
                outputs.replace_manifest(plan, complete)
            else:
                announce(Note(f"'{plan.output}' is complete already: nothing to do"))
            return Result(Path(plan.output), complete)
        if restart and workspace.begun():
            outputs.remove_work(plan)
            workspace.forget_progress()
        before = outputs.check_side_files(plan)
        allow_descriptors(plan)
        how = How(ceiling, device, reader, sha256, on_shard, verify, ended)
        if plan.first_stage is None:
            manifest = _carry_out(plan, workspace, how, announce)
        else:
            first = _first_stage(plan, plan.first_stage, workspace, how, announce)
            manifest = stages.joined(_carry_out(plan, workspace, how, announce, stages.scaling(first)), first)
        with Meter() as meter:
            if diagnostics:
                _compare(manifest, plan, workspace, ceiling, manifest["device"], ended, announce)
            outputs.put_side_files(plan, workspace.beside, before)
        manifest = outputs.with_effort(manifest, meter)
        outputs.publish(plan, manifest)
        _hand_over_single(plan, workspace, on_shard)
        announce(RunFinished(plan.output, manifest["seconds"]))
    return Result(Path(plan.output), manifest)


def _compare(
    manifest: dict[str, Any],
    plan: Plan,
    workspace: Workspace,
    ceiling: Ceiling,
    device: str,
    stop: threading.Event,
    announce: Announcer,
) -> None:
    """Add to a manifest how the tensors have changed, and how much of their task vectors was kept."""
    changes.add_to(manifest, changes.Survey(plan, workspace, ceiling, device, stop, announce).make())
    for stage, own in kept_norms.stages_of(plan, workspace):
        kept_norms.add_to(manifest, kept_norms.KeptSurvey(stage, own, ceiling, stop, announce).make())


def _first_stage(plan: Plan, first: Plan, workspace: Workspace, how: How, announce: Announcer) -> dict[str, Any]:
    """Make what the plan reads, or find it made; its manifest."""
    record = stages.complete(first)
    made = record is None
    if record is None:
        ours = outputs.work_names(plan) if workspace.begun() else ()
        outputs.check_folder(Path(plan.output), stages.folders_read(plan), ours)
        workspace.first_stage.root.mkdir(exist_ok=True)
        record = _carry_out(first, workspace.first_stage, replace(how, on_shard=None), announce)
        outputs.publish(first, record)
    stages.open_carried(plan, workspace, anew=made)
    return record


def _carry_out(
    plan: Plan, workspace: Workspace, how: How, announce: Announcer, given: State | None = None
) -> dict[str, Any]:
    """Carry out one plan, up to its manifest."""
    with Meter() as meter:
        job = Execution(plan, workspace, how, announce, given or {})
        sealed = job.execute(how.verify)
    manifest = outputs.manifest(plan, sealed, job.findings.records, meter, job.workers, device=job.device)
    for number, entry in enumerate(manifest["shards"]):
        if number in job.shards.handed:
            entry["handed_over"] = True
    return manifest | (stages.norms(plan, job.squares) if plan.sidecar is None else {})


def _is_damaged(plan: Plan, workspace: Workspace, verify: Verify) -> bool:
    """Whether a finished output has lost some of its files, as far as `verify` looks; they are made again then.

    Raises
    ------
    DamageError
        If it has, and the journal that says how it was made has gone, too.
    """
    progress = Progress.replay(read_journal(workspace.journal_file))
    if progress.plan == plan.id:
        # A run that was killed while it made some of them again has forgotten that they were complete.
        whole = progress.sealed.keys() | progress.handed >= set(range(len(plan.groups)))
        return not whole or bool(recheck.check(progress, plan, plan.layout(), Path(plan.output), verify))
    if verify != "none" and (found := verify_output(plan.output, full=verify == "full").damage):
        raise DamageError(
            "\n".join(
                [*map(str, found), f"remove '{plan.output}' and run again: that makes the merge from the beginning"]
            )
        )
    return False


def _check_version(plan: Plan, workspace: Workspace) -> None:
    """A plan is carried out by the version that made it: another may merge the same recipe into other bytes."""
    if plan.version != version("mergepipe"):
        raise WorkspaceError(
            f"the plan in '{workspace.root}' was made by mergepipe {plan.version}, this is {version('mergepipe')}: "
            f"build it again, or finish it with the version that began it"
        )


def _hand_over_single(plan: Plan, workspace: Workspace, command: str | None) -> None:
    """A single file gets its name last of all, and is handed over after that."""
    if command is None or len(plan.groups) > 1:
        return
    with closing(Journal(workspace.journal_file)) as journal:
        if 0 not in Progress.replay(journal.records).handed:
            hand_over(command, Path(plan.output) / plan.layout().shards[0].file)
            journal.append([handed_record(0)])
