"""The workspace: one folder that holds everything a job needs besides its inputs and its output.

    .mergepipe/
      plan.json            what is to be done, decided by `build`
      stores/N-NAME/       one chunked zarr hierarchy per model: a chunk manifest (virtual), or the copy itself
      vocabulary/          which rows of vocabulary-indexed tensors come from where, and rows that stand nowhere else
      beside/              files of the output that no model has as they are: a merged tokenizer, a chat template
      journal.log          what of it is durable
      statistics/          what the reductions found: a zarr group
      ballast              disk space set aside for them; gone when a run ends
      first/               journal and statistics of a first stage, where a merge has two
      events.jsonl         what happened, for people and programs to read
      chain.json           names of the merges that come before, for a recipe of several documents
      merges/NAME/         the workspace of each of them, and
      merged/NAME/         what it makes
      LOCK                 held (flock) by the process at work; a dead process holds nothing

Only this module knows the names of these files.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from mergepipe.errors import WorkspaceError
from mergepipe.storage.atomic import fsync_path, make_folder, write_atomic
from mergepipe.storage.journal import MAGIC

DAMAGED_NAME = "damaged"
"""File in the folder of a copied store: chunks that were found damaged, one path a line."""


class Workspace:
    """Paths inside a workspace, and the reading and writing of its plan.

    Parameters
    ----------
    root : Path
        The folder; need not exist yet.
    within : Workspace, optional
        The workspace that this one is a part of, for a stage of its merge: plan, lock and stores are there.
    """

    def __init__(self, root: Path, within: Workspace | None = None) -> None:
        self.root = Path(os.path.abspath(root))
        self._within = within

    @property
    def name(self) -> Path:
        """The folder that a user knows it by."""
        return self.root if self._within is None else self._within.root

    @property
    def first_stage(self) -> Workspace:
        """The part of it that belongs to the first stage of a merge that has two."""
        return Workspace(self.root / "first", self)

    @property
    def plan_file(self) -> Path:
        """The built plan."""
        return self.root / "plan.json"

    @property
    def lock_file(self) -> Path:
        """What :class:`WorkspaceLock` locks; holds the process id of the last holder."""
        return self.root / "LOCK"

    @property
    def journal_file(self) -> Path:
        """The journal of durable work."""
        return self.root / "journal.log"

    @property
    def events_file(self) -> Path:
        """What happened in all runs, one JSON object a line."""
        return self.root / "events.jsonl"

    @property
    def statistics(self) -> Path:
        """The zarr group of statistics."""
        return self.root / "statistics"

    @property
    def ballast_file(self) -> Path:
        """Disk space set aside for records and statistics that are still to come."""
        return self.root / "ballast"

    @property
    def stores(self) -> Path:
        """Folder of the zarr hierarchies of all models."""
        return self.name / "stores"

    @property
    def vocabulary(self) -> Path:
        """Folder of row maps and made rows."""
        return self.name / "vocabulary"

    @property
    def beside(self) -> Path:
        """Folder of files that go beside the weights."""
        return self.name / "beside"

    def store(self, number: int, label: str) -> Path:
        """Folder of the zarr hierarchy of model `number`."""
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in label) or "model"
        return self.stores / f"{number}-{safe}"

    def manifest_file(self, number: int, label: str) -> Path:
        """The chunk manifest of model `number`."""
        return self.store(number, label) / "manifest.json"

    def merge(self, name: str) -> Workspace:
        """The workspace of a merge that comes before, by its name as a folder."""
        return Workspace(self.root / "merges" / name)

    def merged(self, name: str) -> Path:
        """What that merge makes."""
        return self.root / "merged" / name

    @property
    def chain_file(self) -> Path:
        """Names of the merges that come before."""
        return self.root / "chain.json"

    def earlier(self) -> tuple[str, ...]:
        """Names (of folders) of the merges that come before, in the order in which they are made.

        Raises
        ------
        WorkspaceError
            If the list is damaged.
        """
        try:
            names = json.loads(self.chain_file.read_bytes())
        except FileNotFoundError:
            return ()
        except ValueError as error:
            raise WorkspaceError(f"'{self.chain_file}' is damaged ({error}): build again") from error
        if not isinstance(names, list) or not all(
            isinstance(n, str) and n and "/" not in n and n[0] != "." for n in names
        ):
            raise WorkspaceError(f"'{self.chain_file}' holds no list of names: build again")
        return tuple(names)

    def write_earlier(self, names: Sequence[str]) -> None:
        """Replace that list, and remove what belongs to merges that are not in it any more."""
        if names:
            write_atomic(self.chain_file, json.dumps(list(names)).encode())
        else:
            self.chain_file.unlink(missing_ok=True)
        for folder in (self.root / "merges", self.root / "merged"):
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                if path.name not in names:
                    shutil.rmtree(path, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()

    def mark_damage(self, number: int, label: str, paths: Sequence[str]) -> None:
        """Note that chunks of the copied store of model `number` were found damaged; no paths note nothing."""
        if paths:
            write_atomic(self.store(number, label) / DAMAGED_NAME, "".join(f"{path}\n" for path in paths).encode())

    def damaged(self, number: int, label: str) -> list[str]:
        """Chunks of the copied store of model `number` that were found damaged."""
        with contextlib.suppress(FileNotFoundError):
            return (self.store(number, label) / DAMAGED_NAME).read_text(encoding="utf-8").splitlines()
        return []

    def unmark_damage(self, number: int, label: str) -> None:
        """They have been made anew."""
        (self.store(number, label) / DAMAGED_NAME).unlink(missing_ok=True)

    def create(self) -> None:
        """Make the folder.

        Raises
        ------
        WorkspaceError
            If a file is in its place, or a folder that is no workspace and not empty.
        """
        if self.root.exists() and not self.root.is_dir():
            raise WorkspaceError(f"'{self.root}' is a file: choose another workspace with --work")
        if self.root.is_dir() and any(self.root.iterdir()) and not self.is_ours():
            raise WorkspaceError(
                f"'{self.root}' is not empty and no workspace of mergepipe: choose another with --work"
            )
        make_folder(self.root)

    def is_ours(self) -> bool:
        """Whether the folder is a workspace."""
        return any((self.root / name).exists() for name in ("plan.json", "LOCK", "stores"))

    def write_plan(self, data: bytes) -> None:
        """Replace the plan, atomically."""
        write_atomic(self.plan_file, data)

    def write_beside(self, contents: dict[str, bytes]) -> None:
        """Replace the files that go beside the weights, by name."""
        if contents:
            self.beside.mkdir(exist_ok=True)
        for name, data in contents.items():
            write_atomic(self.beside / name, data)
        for path in sorted(self.beside.iterdir()) if self.beside.is_dir() else ():
            if path.name not in contents:
                path.unlink()

    def read_plan(self) -> bytes:
        """The plan's bytes.

        Raises
        ------
        WorkspaceError
            If there is none.
        """
        try:
            return self.plan_file.read_bytes()
        except FileNotFoundError:
            raise WorkspaceError(f"no plan in '{self.root}': run `mergepipe build` first, or name its --work") from None

    def begun(self) -> bool:
        """Whether a run has begun to write: a journal holds something, or held it before it was damaged."""
        for journal in (self.journal_file, self.first_stage.journal_file):
            with contextlib.suppress(FileNotFoundError):
                if journal.stat().st_size > len(MAGIC):
                    return True
        return False

    def forget_progress(self) -> None:
        """Remove journals and statistics, so that the next run starts from the beginning."""
        self.journal_file.unlink(missing_ok=True)
        fsync_path(self.root)
        shutil.rmtree(self.statistics, ignore_errors=True)
        shutil.rmtree(self.first_stage.root, ignore_errors=True)

    def contents(self) -> list[Path]:
        """Everything mergepipe may have put here, the lock last."""
        files = [self.plan_file, self.journal_file, self.events_file, self.statistics, self.ballast_file, self.stores]
        files += [self.first_stage.root, self.vocabulary, self.beside]
        return [*files, self.chain_file, self.root / "merges", self.root / "merged", self.lock_file]

    def remove(self) -> None:
        """Remove all that is ours, and the folder if nothing else is in it."""
        for path in self.contents():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.root.rmdir()

    def forget_stores(self, keep: set[Path]) -> None:
        """Remove the stores of models that the plan no longer has."""
        for path in sorted(self.stores.iterdir()) if self.stores.is_dir() else ():
            if path not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def holder(self) -> int | None:
        """Process id of whoever is at work here, or None; takes nothing and waits for nothing."""
        try:
            fd = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            text = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            return int(text) if text.isdigit() else 0
        finally:
            os.close(fd)
        return None


class WorkspaceLock:
    """Keeps a second process out of a workspace. The kernel drops it with the process, however that ends.

    The folder is locked beside the file, which somebody may remove; where folders can't be (NFS), the file alone is.

    Raises
    ------
    WorkspaceError
        On entry, if another process holds it; names its process id.
    """

    def __init__(self, workspace: Workspace) -> None:
        self._path = workspace.lock_file
        self._fd = self._folder = -1

    def __enter__(self) -> Self:
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if not self._taken():
            holder = os.pread(self._fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            self._close()
            raise WorkspaceError(
                f"'{self._path.parent}' is in use by process {holder}: wait for it, or use another --work"
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)
        return self

    def _taken(self) -> bool:
        """Try a few times: somebody who only asks who holds the lock holds it for an instant."""
        for _ in range(5):
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._is_folder_taken()
            time.sleep(0.02)
        return False

    def _is_folder_taken(self) -> bool:
        try:
            fcntl.flock(self._folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def _close(self) -> None:
        os.close(self._folder)
        os.close(self._fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
