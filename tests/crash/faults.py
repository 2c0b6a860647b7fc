"""Faults for a process to suffer: death at the n-th write, power cuts, full disks, syncs that fail.

The functions of `os` through which mergepipe makes bytes durable are counted; at the n-th call the fault happens. A
power cut undoes a random part of what no sync has made durable, and then the process dies: writes dropped and
reordered, files and names that were never there.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import random
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

COUNTED = ("pwrite", "fdatasync", "fsync", "replace", "rename", "ftruncate", "posix_fallocate", "unlink")
KINDS = ("none", "kill", "torn", "power", "hang", "enospc", "lost sync")

real = {name: getattr(os, name) for name in (*COUNTED, "open")}
real_open = builtins.open


class Unsynced:
    """What a power cut may take away: writes, renames and new files since the last sync of their file or folder."""

    def __init__(self) -> None:
        self.writes: dict[int, list[tuple[str, int, bytes, int]]] = defaultdict(list)
        self.names: list[tuple[str, Callable[[], None]]] = []

    def before_write(self, fd: int, offset: int, length: int) -> None:
        """Remember what the range holds now."""
        status = os.fstat(fd)
        path = os.readlink(f"/proc/self/fd/{fd}")
        with real_open(path, "rb") as file:  # a descriptor past the page cache reads whole pages only
            file.seek(offset)
            old = file.read(length)
        self.writes[status.st_ino].append((path, offset, old.ljust(length, b"\0"), status.st_size))

    def written_whole(self, path: str) -> None:
        """A file is written from its start through Python's own `open`: without a sync nothing of it is sure."""
        self.writes[os.stat(path).st_ino].append((path, 0, b"", 0))

    def synced(self, inode: int, seen: int) -> None:
        """The first `seen` writes of a file are durable."""
        del self.writes[inode][:seen]

    def synced_folder(self, folder: str) -> None:
        """The names in a folder are durable."""
        self.names = [(path, undo) for path, undo in self.names if os.path.dirname(path) != folder]

    def renamed(self, source: str, target: str) -> None:
        """Remember how to take a rename back."""
        old = Path(target).read_bytes() if os.path.exists(target) else None
        inode = os.stat(source).st_ino
        if inode in self.writes:
            self.writes[inode] = [(target, *rest) for _, *rest in self.writes[inode]]

        def undo() -> None:
            real["rename"](target, source)
            if old is not None:
                Path(target).write_bytes(old)

        self.names.append((target, undo))

    def created(self, path: str) -> None:
        """Remember that a file is new."""
        self.names.append((path, lambda: Path(path).unlink(missing_ok=True)))

    def lose(self, rng: random.Random, share: float, inode: int | None = None, names: bool = True) -> None:
        """Undo each unsynced thing with the given probability."""
        for number, writes in self.writes.items():
            if inode is not None and number != inode:
                continue
            for path, offset, old, _ in reversed(writes):
                if rng.random() < share and os.path.exists(path):
                    with real_open(path, "r+b") as file:
                        file.seek(offset)
                        file.write(old)
            if writes and rng.random() < 0.5 and os.path.exists(writes[0][0]):
                size = min(before for *_, before in writes)
                if os.path.getsize(writes[0][0]) > size:
                    os.truncate(writes[0][0], size)
        for _, undo in reversed(self.names) if names else ():
            if rng.random() < share:
                with contextlib.suppress(FileNotFoundError):
                    undo()


class Faults:
    """Counts the calls of this process and lets a fault happen at one of them.

    Parameters
    ----------
    kind : str
        One of `KINDS`: "none" only counts, "torn" writes the first half of what it dies at, "hang" waits a minute
        before it dies, "enospc" has every later write fail too, "lost sync" fails once and loses what was unsynced.
    at : int
        Number of the call, from 1 on.
    seed : int
    loose : Path
        A folder of files that nobody syncs; a power cut truncates some.

    Attributes
    ----------
    events : dict of int to callable
        What else is to happen, by number of the call before which it does.
    """

    def __init__(self, kind: str, at: int, seed: int, loose: Path) -> None:
        self.kind, self.at, self.loose = kind, at, loose
        self.rng = random.Random(seed)
        self.calls = 0
        self.events: dict[int, Callable[[], None]] = {}
        self.unsynced = Unsynced()
        self.lock = threading.RLock()
        for name in COUNTED:
            setattr(os, name, self._counted(name))
        os.open = self._open
        builtins.open = io.open = self._open_whole

    def _counted(self, name: str) -> Callable[..., Any]:
        call = real[name]

        def counted(*args: Any, **options: Any) -> Any:
            with self.lock:
                self.calls += 1
                self.events.get(self.calls, lambda: None)()
                if self.calls == self.at:
                    self._strike(name, args)
                elif self.kind == "enospc" and 0 < self.at < self.calls and name in ("pwrite", "posix_fallocate"):
                    raise OSError(errno.ENOSPC, "No space left on device (injected)")
                seen = self._before(name, args)
            result = call(*args, **options)
            with self.lock:
                self._after(name, args, seen)
            return result

        return counted

    def _open(self, path: Any, flags: int, *args: Any, **options: Any) -> int:
        if self.kind in ("power", "lost sync") and flags & os.O_CREAT and not os.path.exists(path):
            with self.lock:
                self.unsynced.created(os.path.abspath(path))
        return int(real["open"](path, flags, *args, **options))

    def _open_whole(self, file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened = real_open(file, mode, *args, **options)
        # In a folder a file without a name is made, as numba tries whether its cache can be written.
        named = not isinstance(file, int) and not os.path.isdir(file)
        if self.kind in ("power", "lost sync") and "w" in mode and named:
            with self.lock:
                self.unsynced.written_whole(os.path.abspath(file))
        return opened

    def _before(self, name: str, args: tuple[Any, ...]) -> int:
        if self.kind not in ("power", "lost sync"):
            return 0
        if name == "pwrite":
            self.unsynced.before_write(args[0], args[2], memoryview(args[1]).nbytes)
        elif name in ("replace", "rename"):
            self.unsynced.renamed(os.path.abspath(args[0]), os.path.abspath(args[1]))
        elif name in ("fsync", "fdatasync"):
            return len(self.unsynced.writes[os.fstat(args[0]).st_ino])
        return 0

    def _after(self, name: str, args: tuple[Any, ...], seen: int) -> None:
        if name in ("fsync", "fdatasync") and self.kind in ("power", "lost sync"):
            self.unsynced.synced(os.fstat(args[0]).st_ino, seen)
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            if os.path.isdir(path):
                self.unsynced.synced_folder(path)

    def _strike(self, name: str, args: tuple[Any, ...]) -> None:
        if self.kind == "enospc":
            if name in ("pwrite", "posix_fallocate", "fdatasync", "fsync"):
                raise OSError(errno.ENOSPC, "No space left on device (injected)")
            self.at += 1  # the next call will do
        elif self.kind == "lost sync":
            if name not in ("fsync", "fdatasync"):
                self.at += 1
                return
            # The kernel drops pages that it could not write, tells it once, and thinks no more of it.
            self.unsynced.lose(self.rng, 1.0, inode=os.fstat(args[0]).st_ino, names=False)
            self.unsynced.writes.pop(os.fstat(args[0]).st_ino, None)
            raise OSError(errno.EIO, "Input/output error (injected)")
        elif self.kind != "none":
            if self.kind == "torn" and name == "pwrite":
                half = memoryview(args[1]).cast("B")
                real["pwrite"](args[0], half[: len(half) // 2 // 4096 * 4096 or len(half) // 2], args[2])
            if self.kind == "power":
                self.unsynced.lose(self.rng, self.rng.choice((0.3, 0.7, 1.0)))
                self._tear_loose_files()
            if self.kind == "hang":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGKILL)

    def _tear_loose_files(self) -> None:
        for path in sorted(self.loose.rglob("*")):
            if path.is_file() and self.rng.random() < 0.3:
                os.truncate(path, self.rng.choice((0, path.stat().st_size // 2)))
