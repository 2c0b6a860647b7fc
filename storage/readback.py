"""Checksums of a file as it lies on disk, taken piece by piece behind the one who writes it.

Hashing takes about as long as a merge does, so it runs beside it: whenever the front of a shard is complete up to some
byte, that much is read back, past the page cache where that is possible, and hashed. At the end only the last piece is
left to do.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from contextlib import suppress
from pathlib import Path

import google_crc32c
import numpy as np
import numpy.typing as npt

from mergepipe.errors import DamageError

GRAIN_BYTES = 8 * 1024 * 1024
"""One crc32c is taken per this much of a file, from its first byte on."""

WINDOW_BYTES = 2 * 1024 * 1024
"""Read at once; divides the grain."""


class ReadBack:
    """Reads a growing file from its first byte to its last and keeps checksums of it.

    Parameters
    ----------
    path : Path
        Opened at once, so that it may be renamed meanwhile.
    sha256 : bool
        Whether to take the SHA-256 as well.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"123456789")
    ...     file.flush()
    ...     back = ReadBack(Path(file.name), sha256=False)
    ...     back.advance(9, whole=True)
    ...     [hex(crc) for crc in back.crc32c], back.sha256
    (['0xe3069283'], None)
    """

    def __init__(self, path: Path, *, sha256: bool) -> None:
        self.position = 0
        self.crc32c: list[int] = []
        self._path = path
        self._digest = hashlib.sha256() if sha256 else None
        self._fd = _open(path)
        # Page-aligned, as reading past the page cache asks for.
        self._memory = mmap.mmap(-1, WINDOW_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._window: npt.NDArray[np.uint8] = np.frombuffer(self._memory, np.uint8)

    @property
    def sha256(self) -> str | None:
        """Of all bytes so far, in hexadecimal; None if it was not asked for."""
        return None if self._digest is None else self._digest.hexdigest()

    def advance(self, stop: int, *, whole: bool = False) -> None:
        """Take in the bytes up to `stop`; only full windows of them, unless the file is `whole`.

        Raises
        ------
        DamageError
            If the file ends before `stop`.
        """
        while self.position < stop and (whole or self.position + WINDOW_BYTES <= stop):
            length = min(WINDOW_BYTES, stop - self.position)
            count = self._read()
            if count < length:
                raise DamageError(f"{self._path} ends at byte {self.position + count}, expected {stop} or more")
            self._take(self._window[:length])

    def _read(self) -> int:
        """Fill the window from the present position on; how much of it there is."""
        done = 0
        while count := os.preadv(self._fd, [self._window[done:].data], self.position + done):
            done += count
            if done % mmap.PAGESIZE or done == WINDOW_BYTES:
                break
        return done

    def _take(self, data: npt.NDArray[np.uint8]) -> None:
        if self.position % GRAIN_BYTES == 0:
            self.crc32c.append(0)
        self.crc32c[-1] = int(google_crc32c.extend(self.crc32c[-1], data))
        if self._digest is not None:
            self._digest.update(data.data)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self.position, data.nbytes, os.POSIX_FADV_DONTNEED)
        self.position += data.nbytes

    def close(self) -> None:
        """Give the file and the memory back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._window
            with suppress(BufferError):
                self._memory.close()


def _open(path: Path) -> int:
    with suppress(OSError, AttributeError):  # macOS has no O_DIRECT, some filesystems refuse it
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
