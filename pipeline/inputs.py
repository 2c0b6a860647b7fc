"""The input files of a plan, as a run finds them, and whether they stay so."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Self

from mergepipe.errors import CheckpointError, DamageError, InputChangedError, MergepipeError
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.checkpoint import FileInfo
from mergepipe.storage.direct import supports_direct
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Use:
    """What inputs are read for, as messages have it.

    Attributes
    ----------
    since : str
        When they were looked at.
    remedy : str
        What to do about one that is another.
    again : str
        What to do where one held something else for a while.
    """

    since: str
    remedy: str
    again: str

    def changed(self, info: FileInfo, what: str, detail: str = "") -> MergepipeError:
        """The error about a file that is another one, is gone or has come."""
        return InputChangedError(f"'{info.path}' {what} since {self.since}{detail}: {self.remedy}")


PLANNED = Use(
    "the plan was made",
    "bring the old file back and run again, or build again (with `mergepipe build --force` where work was begun, which "
    "drops it)",
    "what was made since the last commit is dropped, run again to go on",
)
BESIDE = Use("the plan was made", "build again, or bring back what was there", "run again to go on")
"""Of files that are copied beside the weights: of what was begun nothing is lost."""

ONE_COMMAND = Use(
    "the command began",
    "bring the old file back, or leave the new one, and give the command again",
    "give the command again",
)
"""Of a command without a plan."""


class Inputs:
    """Files that are read, and proof that nobody has written to them meanwhile.

    Size, time and inode tell whether a file is the one that a plan was made for. They can be given back to a file that
    held something else for a while (``cp -p``); the time of its last change of status (ctime) can't. So that is noted
    before the first byte is read: as long as it is the same, so is every byte that was read since. From one process to
    the next it says nothing: a hard link, a move or a change of permissions sets it, too.

    Parameters
    ----------
    files : iterable of FileInfo
        The user's, as they were when they were looked at.
    chunks : iterable of FileInfo
        Of our own copies of such files.
    use : Use
        What they are read for, for messages.

    Raises
    ------
    InputChangedError
        If a file is gone or another one; names it and what to do.
    DamageError
        If that is a chunk of a copy.
    CheckpointError
        If a file can't be looked at.

    Notes
    -----
    What it can't see: a write within the same tick of the filesystem's clock (some milliseconds) as the change before
    it, pages written through a mapping that the kernel has not noticed yet, and what a network filesystem keeps from us
    for a while.
    """

    def __init__(self, files: Iterable[FileInfo], chunks: Iterable[FileInfo] = (), use: Use = PLANNED) -> None:
        self._use = use
        pairs = [*((info, use.changed) for info in files), *((info, _damaged) for info in chunks)]
        self._files = {info.path: (info, error, _look(info, error)) for info, error in pairs}

    @classmethod
    def of(cls, manifests: Sequence[ChunkManifest]) -> Self:
        """What is read through some manifests; raises likewise."""
        files, chunks = ([m.files for m in manifests if m.kind == kind] for kind in ("virtual", "copy"))
        return cls(chain.from_iterable(files), chain.from_iterable(chunks))

    def check(self) -> None:
        """Compare every file with what it was when this was made; raises likewise. Some microseconds per file."""
        for info, error, ctime_ns in self._files.values():
            if _look(info, error) != ctime_ns:
                raise InputChangedError(
                    f"'{info.path}' was written to, linked, moved or given other permissions while it was read, and "
                    f"has its old size and time again: {self._use.again}"
                )

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Look at them in the end; an error, too, is theirs if they changed: what is made of such bytes is no bug."""
        try:
            yield
        except Exception:
            self.check()
            raise
        self.check()


def _look(info: FileInfo, error: Callable[..., MergepipeError]) -> int:
    """The ctime of a file that is still the same one."""
    try:
        found = os.stat(info.path)
    except FileNotFoundError:
        raise error(info, "is gone") from None
    except OSError as failure:
        raise CheckpointError(f"'{info.path}' can't be looked at: {failure.strerror}") from failure
    if (found.st_size, found.st_mtime_ns, found.st_ino) != (info.size, info.mtime_ns, info.inode):
        were = f"{info.size:,}, {info.mtime_ns}, {info.inode}"
        are = f"{found.st_size:,}, {found.st_mtime_ns}, {found.st_ino}"
        raise error(info, "changed", f" (size, time and inode were {were} and are {are})")
    return found.st_ctime_ns


def _damaged(info: FileInfo, what: str, detail: str = "") -> MergepipeError:
    return DamageError(
        f"'{info.path}', a chunk of a copied store, {what} since the plan was made{detail}: `mergepipe build` makes it "
        f"anew from the model's own files, and `mergepipe run` then goes on"
    )


def what_changed(workspace: Workspace, plan: Plan) -> str | None:
    """What a run of the plan would say of the first input that is not what it was, remedy included; None if all are.

    Of what a run makes itself, before it reads it, nothing is said.
    """
    given = [(n, model.label) for n, model in enumerate(plan.models) if not model.made and model.role != "carried"]
    files = [workspace.manifest_file(number, label) for number, label in given]
    try:
        Inputs.of([ChunkManifest.load(file) for file in files if file.exists()])
    except (InputChangedError, DamageError) as error:
        return str(error)
    return None


def all_direct(manifests: Sequence[ChunkManifest]) -> bool:
    """Whether everything can be read past the page cache; one file of each folder answers for the others."""
    files = {Path(info.path).parent: info.path for manifest in manifests for info in manifest.files}
    return all(supports_direct(path) for path in files.values())


def mark_damage(workspace: Workspace, plan: Plan, manifests: Sequence[ChunkManifest], damaged: Sequence[str]) -> None:
    """Note which chunks of copied stores do not match their checksums: the next `build` then looks at all of them."""
    for number, (model, manifest) in enumerate(zip(plan.models, manifests, strict=True)):
        inside = [path for path in damaged if manifest.root is not None and path.startswith(f"{manifest.root}/")]
        workspace.mark_damage(number, model.label, inside)


def marked_damage(workspace: Workspace, plan: Plan) -> list[str]:
    """Chunks of copied stores that were found damaged, and not made anew since."""
    return [path for number, model in enumerate(plan.models) for path in workspace.damaged(number, model.label)]
