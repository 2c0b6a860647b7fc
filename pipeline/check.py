"""Checking a recipe: every fault of it and of its checkpoints at once, from headers alone.

The way is that of a build (:func:`mergepipe.pipeline.build.examine`), which stops at the first stage with a fault; here
each fault is kept and the way goes on with what is sound. Nothing is written, and of models of the hub nothing fetched
but headers and small files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergepipe.errors import (
    BudgetError,
    CheckpointError,
    DiskError,
    MergepipeError,
    OutputExistsError,
    RecipeError,
    UsageError,
    WorkspaceError,
)
from mergepipe.pipeline.align import Differing
from mergepipe.pipeline.build import CHUNK_BYTES, Order, examine
from mergepipe.pipeline.events import Announcer, Event, Note
from mergepipe.pipeline.faults import Faults
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.remote import HeadersOnly
from mergepipe.pipeline.space import check_room

KINDS: tuple[tuple[type[MergepipeError], str], ...] = (
    (UsageError, "usage"),
    (RecipeError, "recipe"),
    (CheckpointError, "checkpoint"),
    (DiskError, "disk"),
    (BudgetError, "memory"),
    (OutputExistsError, "output"),
    (WorkspaceError, "workspace"),
)
"""What a fault is about, by the class of its error; the first that fits."""


@dataclass(frozen=True, slots=True)
class Found:
    """One fault.

    Attributes
    ----------
    kind : str
        'usage', 'recipe', 'checkpoint', 'memory', 'disk', 'output' or 'workspace'.
    code : int
        The exit code that a build would end with.
    where : str or None
        The place in the recipe, such as ``$.models[1].model``.
    message : str
    """

    kind: str
    code: int
    where: str | None
    message: str


@dataclass(frozen=True, slots=True)
class Check:
    """What a check found.

    Attributes
    ----------
    faults : tuple of Found
        The most basic ones first.
    unchecked : tuple of str
        What could not be looked at because of a fault before it.
    notes : tuple of str
        What is no fault, but worth knowing.
    plan : Plan or None
        What a build would write; of the sound tensors alone where there are faults.
    """

    faults: tuple[Found, ...]
    unchecked: tuple[str, ...]
    notes: tuple[str, ...]
    plan: Plan | None

    @property
    def exit_code(self) -> int:
        """0, or the code of the most basic fault."""
        return min((fault.code for fault in self.faults), default=0)


def check(
    recipe: str | Path = "mergepipe.yaml",
    work: str | Path = ".mergepipe",
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    shard_size: str | int | None = None,
    overrides: Sequence[str] = (),
    tensors: Differing | None = None,
) -> Check:
    """Look at a recipe and the headers of its checkpoints for everything that a build would refuse.

    Parameters
    ----------
    recipe, work, out, memory, workers, shard_size, overrides, tensors
        As for :func:`mergepipe.pipeline.build.build`. The workspace need not exist, and is not made.

    Returns
    -------
    Check

    Raises
    ------
    UsageError
        If a size is none.
    """
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    faults = Faults(keep=True)
    order = Order(
        recipe, work, out, memory, workers, "auto", CHUNK_BYTES, shard_size, tuple(overrides), tensors=tensors
    )
    with tempfile.TemporaryDirectory(prefix="mergepipe-check-") as name:
        outlines = HeadersOnly(Path(name))
        examined = examine(order, faults, Announcer(listen), outlines.find)
    with faults.taken():
        check_room(outlines.needs)
    found = sorted((one for error in faults.errors for one in _found(error)), key=lambda one: one.code)
    plan = examined.planned[-1].plan if examined.abandoned else None
    told = [note for one in examined.planned for note in one.plan.notes] if plan else []
    return Check(tuple(found), examined.unchecked, tuple(dict.fromkeys([*told, *notes])), plan)


def _found(error: MergepipeError) -> list[Found]:
    kind = next((name for cls, name in KINDS if isinstance(error, cls)), "other")
    if isinstance(error, RecipeError):
        return [Found(kind, error.exit_code, fault.path, fault.message) for fault in error.faults]
    problems = error.problems if isinstance(error, CheckpointError) else ()
    return [Found(kind, error.exit_code, None, text) for text in problems or (str(error),)]


def report(checked: Check) -> dict[str, Any]:
    """A check as plain values, for ``--json``.

    Returns
    -------
    dict
        `ok`, `exit_code`, `faults` (each with `kind`, `code`, `where`, `message`), `unchecked`, `notes`, and `plan`,
        which is null where there are faults, else what :func:`mergepipe.pipeline.summary.summarize` says of it.
    """
    from mergepipe.pipeline.summary import summarize

    sound = checked.plan is not None and not checked.faults
    return {
        "ok": sound,
        "exit_code": checked.exit_code,
        "faults": [
            {"kind": one.kind, "code": one.code, "where": one.where, "message": one.message} for one in checked.faults
        ],
        "unchecked": list(checked.unchecked),
        "notes": list(checked.notes),
        "plan": summarize(checked.plan) if sound and checked.plan is not None else None,
    }
