"""How far a job is, from its workspace alone: nothing is changed, nothing is waited for, and no big file is read.

A job is *built* (not begun), *running* (a process holds the lock), *interrupted* (begun, and nobody is at work),
*damaged* (what the journal promises is not there any more; running again makes it anew) or *done*.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mergepipe.pipeline import outputs, recheck
from mergepipe.pipeline.eventlog import last_failure, last_progress
from mergepipe.pipeline.inputs import marked_damage, what_changed
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.resume import Progress
from mergepipe.storage.journal import Record, read_journal
from mergepipe.storage.workspace import Workspace

State = Literal["built", "running", "interrupted", "damaged", "done"]

MISMATCH = "does not match its checksum"
"""Said of a chunk of a copied store."""


@dataclass(frozen=True, slots=True)
class Status:
    """Where a job stands.

    Attributes
    ----------
    state : str
        "built", "running", "interrupted", "damaged" or "done".
    plan : str
        Id of the plan.
    output : str
        The output folder.
    process : int or None
        Who is at work.
    done_bytes, total_bytes : int
        Of the output files, those of a first stage among them; done is what is durable.
    shards_done, shards : int
        Output files that are complete, and all of them.
    tensors_reduced, tensors : int
        Tensors whose reductions are kept, and all of them.
    rate : float or None
        Durable output bytes per second of the latest run; None before its first commit.
    left_s : float or None
        Seconds to go at that rate.
    worked_bytes, work_bytes : int or None
        While a process is at work: bytes that it has read and written in all sweeps, and those it is to. Sweeps over
        the whole model come before the first byte of the output.
    damage : tuple of str
        What is not as the journal says.
    remedy : str
        What to do next.
    changed : str or None
        Of an unfinished job, the first input that is not what it was, and what to do; a run would end with it.
    failure : str or None
        The error that ended the latest run, if one did.
    merges : dict of str to str
        For a recipe of several documents: the state of each merge that comes before, by its name. Bytes, files and
        tensors are of all merges together.
    """

    state: State
    plan: str
    output: str
    process: int | None
    done_bytes: int
    total_bytes: int
    shards_done: int
    shards: int
    tensors_reduced: int
    tensors: int
    rate: float | None
    left_s: float | None
    damage: tuple[str, ...]
    remedy: str
    failure: str | None = None
    changed: str | None = None
    merges: dict[str, State] = field(default_factory=dict)
    worked_bytes: int | None = None
    work_bytes: int | None = None

    @property
    def percent(self) -> float:
        """Of the output's bytes, 0 to 100."""
        return 100.0 * self.done_bytes / self.total_bytes if self.total_bytes else 100.0


def status(work: str | Path = ".mergepipe", *, now: float | None = None) -> Status:
    """Look at a workspace.

    Parameters
    ----------
    work : path
    now : float, optional
        Seconds since 1970; the clock's by default.

    Raises
    ------
    WorkspaceError
        If there is no plan, or the journal cannot be understood.
    """
    root = Workspace(Path(work))
    found = _status(root, now)
    before = {name: _status(root.merge(name), now) for name in root.earlier()}
    return _together(root, found, before) if before else found


def _together(root: Workspace, last: Status, before: dict[str, Status]) -> Status:
    """The status of a chain: that of the merge which is at work, and the sums of all."""
    merges: dict[str, State] = {name: found.state for name, found in before.items()}
    if last.state == "done":
        return replace(last, merges=merges)
    everyone = [*before.values(), last]
    current = next((found for found in everyone if found.state != "done"), last)
    begun = any(found.state != "built" for found in everyone)
    state: State = "running" if last.process is not None else "interrupted" if begun else "built"
    if current.state == "damaged" and last.process is None:
        state = "damaged"
    done, total = sum(found.done_bytes for found in everyone), sum(found.total_bytes for found in everyone)
    return replace(
        last,
        state=state,
        done_bytes=done,
        total_bytes=total,
        shards_done=sum(found.shards_done for found in everyone),
        shards=sum(found.shards for found in everyone),
        tensors_reduced=sum(found.tensors_reduced for found in everyone),
        tensors=sum(found.tensors for found in everyone),
        rate=current.rate,
        left_s=None if not current.rate else (total - done) / current.rate,
        damage=tuple(text for found in everyone for text in found.damage),
        remedy=next((text for found in everyone if (text := found.changed)), None)
        or _remedy(state, root, mend=any(text.endswith(MISMATCH) for found in everyone for text in found.damage)),
        failure=current.failure,
        merges=merges,
    )


def _status(workspace: Workspace, now: float | None) -> Status:
    plan = Plan.from_json(workspace.read_plan())
    process = workspace.holder()
    finished = outputs.finished(plan) is not None
    places = [workspace] if plan.first_stage is None else [workspace.first_stage, workspace]
    journals = [read_journal(place.journal_file) for place in places]
    made = [Progress.replay(records) for records in journals]
    damage: tuple[str, ...] = ()
    for stage, progress in zip(plan.stages, made, strict=True):
        if process is None and (finished or progress.plan is not None):
            damage += tuple(recheck.check(progress, stage, stage.layout(), Path(stage.output), "none").notes)
    changed = None if finished or process is not None else what_changed(workspace, plan)
    copies = () if finished else tuple(f"'{path}' {MISMATCH}" for path in marked_damage(workspace, plan))
    state = _state(process, finished, workspace.begun(), damage + copies)
    data = sum(tensor.output.nbytes for stage in plan.stages for tensor in stage.tensors)
    done = data if state == "done" else sum(p.done_bytes(stage) for stage, p in zip(plan.stages, made, strict=True))
    # The stage at work is the last one begun.
    records = next((records for records in reversed(journals) if records), [])
    rate = None if state == "done" else _rate(records, time.time() if now is None and process is not None else now)
    shards = sum(len(stage.groups) for stage in plan.stages)
    worked, total = (last_progress(workspace.events_file) or (None, None)) if state == "running" else (None, None)
    return Status(
        state=state,
        plan=plan.id,
        output=plan.output,
        process=process,
        done_bytes=done,
        total_bytes=data,
        shards_done=shards if state == "done" else sum(len(progress.sealed) for progress in made),
        shards=shards,
        tensors_reduced=sum(len(progress.states) for progress in made),
        tensors=sum(len(stage.tensors) for stage in plan.stages),
        rate=rate,
        left_s=None if not rate else (data - done) / rate,
        damage=damage + copies,
        remedy=changed or _remedy(state, workspace, mend=bool(copies)),
        changed=changed,
        failure=last_failure(workspace.events_file) if state in ("interrupted", "damaged") else None,
        worked_bytes=worked,
        work_bytes=total,
    )


def _state(process: int | None, finished: bool, begun: bool, damage: tuple[str, ...]) -> State:
    if process is not None:
        return "running"
    if damage:
        return "damaged"
    if finished:
        return "done"
    return "interrupted" if begun else "built"


def _remedy(state: State, workspace: Workspace, *, mend: bool) -> str:
    run = f"mergepipe run --work {workspace.root}"
    if mend and state == "damaged":
        return f"`mergepipe build RECIPE --work {workspace.root}` mends the copied stores, `{run}` then goes on"
    return {
        "built": f"begin with `{run}`",
        "running": "wait, or stop it with Ctrl-C: it goes on later",
        "interrupted": f"go on with `{run}`",
        "damaged": f"`{run}` makes again what is damaged",
        "done": "nothing to do; `mergepipe verify --full` checks every byte",
    }[state]


def _rate(records: list[Record], now: float | None) -> float | None:
    """Bytes per second since the latest process began: up to now, or up to its last commit if it is gone."""
    begun, last, total = None, None, 0
    for record in records:
        if record.get("type") == "begin":
            begun, last, total = record.get("at"), None, 0
        elif record.get("type") == "units":
            total += sum(stop - start for _, start, stop, _ in record["units"])
            last = record.get("at")
    end = last if now is None else now
    if begun is None or last is None or end is None or end <= begun:
        return None
    return float(total / (end - begun))
