"""Disk space set aside for many small files that are still to be written: one file, which shrinks as they come.

Output files are allocated in full before work starts, and so must be what cannot be: thousands of chunks of a zarr
store, whose names and sizes are zarr's own business. The ballast takes up as much space as they will, so that a full
disk is found at once; just before a chunk is written, the ballast gives up that much. Should somebody else take the
space in that instant, the disk is full as it may be at any time.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from mergepipe.storage.atomic import no_room_errors
from mergepipe.storage.writer import allocate


class Ballast:
    """A file that holds disk space. Safe to use from several threads.

    Parameters
    ----------
    path : Path
        Its folder must exist. What an earlier process has left under this name is replaced.
    nbytes : int

    Raises
    ------
    DiskFullError
        If there is not that much; nothing is left behind then.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Ballast(Path(folder, "ballast"), 5000) as ballast:
    ...     ballast.spend(2000)
    ...     print(Path(folder, "ballast").stat().st_size)
    3000
    """

    def __init__(self, path: Path, nbytes: int) -> None:
        self._path = path
        self._left = max(0, nbytes)
        self._fd = -1
        self._lock = threading.Lock()
        path.unlink(missing_ok=True)
        if not self._left:
            return
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            with no_room_errors(path):
                allocate(self._fd, self._left)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def spend(self, nbytes: int) -> None:
        """Give up as much space as what is about to be written takes."""
        with self._lock:
            if self._fd >= 0:
                self._left = max(0, self._left - nbytes)
                os.ftruncate(self._fd, self._left)

    def close(self) -> None:
        """Give up all that is left."""
        with self._lock:
            if self._fd >= 0:
                self._path.unlink(missing_ok=True)
                os.close(self._fd)
                self._fd = -1


def held_bytes(folder: Path) -> int:
    """Bytes of disk that the files in a folder take up; 0 if there is no such folder."""
    return sum(
        os.lstat(os.path.join(path, name)).st_blocks * 512 for path, _, names in os.walk(folder) for name in names
    )
