"""Checksums of a file that is written in pieces and in almost any order, taken in passing.

    piece to write ─┬─ comes next ──────────────► hashed from memory
                    ├─ before its turn, room ───► held, hashed when its turn comes
                    └─ no room, or written ─────► read back from disk when its turn comes
                       by an earlier run

Reading a whole output back would be a fifth of all that the disk does in a merge of four models, and would record
whatever came back as if it was meant. So the checksums are of what was handed to the disk wherever that is still known,
and a file that is compared with them later is held to that.
"""

from __future__ import annotations

import hashlib
import itertools
import mmap
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mergepipe.errors import DamageError
from mergepipe.storage.checksum import crc32c, joined
from mergepipe.storage.direct import Arena

GRAIN_BYTES = 8 * 1024 * 1024
"""One crc32c is taken per this much of a file, from its first byte on."""

WINDOW_BYTES = 2 * 1024 * 1024
"""Read back at once."""

HELD_BYTES = 32 * 1024 * 1024
"""Memory for pieces that wait for their turn; part of what the program itself takes, whatever it merges."""

U8 = npt.NDArray[np.uint8]

Crcs = list[tuple[int, int]]
"""Lengths and checksums of the parts of a piece that lie in one grain each."""


class Held:
    """Memory of a fixed size for pieces that wait for their turn, shared by all files of a run. Safe for threads."""

    def __init__(self, nbytes: int = HELD_BYTES) -> None:
        self._arena = Arena(nbytes)
        self._lock = threading.Lock()

    def copy(self, data: U8) -> tuple[int, U8] | None:
        """Where a copy of `data` is, and the copy; None if there is no room."""
        with self._lock:
            start = self._arena.take(_pages(data.nbytes))
        if start is None:
            return None
        copy = self._arena.bytes[start : start + data.nbytes]
        copy[:] = data
        return start, copy

    def give(self, start: int, nbytes: int) -> None:
        """Give a copy's memory back."""
        with self._lock:
            self._arena.give(start, _pages(nbytes))


class _Waiting(NamedTuple):
    """A piece whose turn has not come: its copy, where that is held, and its checksums."""

    place: int
    copy: U8
    crcs: Crcs


class Digest:
    """The checksums of one growing file, from its first byte to its last. Safe to use from several threads.

    Parameters
    ----------
    path : Path
        Opened at once, so that it may be renamed meanwhile.
    sha256 : bool
        Whether to take the SHA-256 as well.
    held : Held, optional
        Memory for pieces that come before their turn; without it they are read back.

    Attributes
    ----------
    position : int
        How far it has come.
    crc32c : list of int
        One per grain.
    bytes_back : int
        How much had to be read back.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"123456789")
    ...     file.flush()
    ...     digest = Digest(Path(file.name), sha256=False)
    ...     _ = digest.put(0, np.frombuffer(b"1234", np.uint8))
    ...     digest.advance(9)
    ...     [hex(crc) for crc in digest.crc32c], digest.sha256, digest.bytes_back
    (['0xe3069283'], None, 5)
    """

    def __init__(self, path: Path, *, sha256: bool, held: Held | None = None) -> None:
        self._path = path
        self._with_sha256 = sha256
        self._held = held
        self._waiting: dict[int, _Waiting] = {}
        self._lock = threading.Lock()
        self.bytes_back = 0
        self._begin()
        self._fd = _open(path)
        # Page-aligned, as reading past the page cache asks for.
        self._memory = mmap.mmap(-1, WINDOW_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._window: U8 = np.frombuffer(self._memory, np.uint8)

    def _begin(self) -> None:
        self.position = 0
        self.crc32c: list[int] = []
        self._sha256 = hashlib.sha256() if self._with_sha256 else None

    @property
    def sha256(self) -> str | None:
        """Of all bytes so far, in hexadecimal; None if it was not asked for."""
        return None if self._sha256 is None else self._sha256.hexdigest()

    def put(self, start: int, data: U8) -> int:
        """Take notice of bytes that are, or will be, in the file; return their crc32c. They are not needed afterwards.

        Bytes that take the place of others already taken in make it begin again, and read all of them back.
        """
        crcs = _crcs(start, data)
        if data.nbytes:
            with self._lock:
                self._put(start, data, crcs)
        whole = crcs[0][1]
        for nbytes, crc in crcs[1:]:
            whole = joined(whole, crc, nbytes)
        return whole

    def _put(self, start: int, data: U8, crcs: Crcs) -> None:
        for other in [other for other, one in self._waiting.items() if _overlap(start, data, other, one.copy)]:
            self._drop(other)
        if start < self.position:
            self._begin()
        elif start == self.position:
            self._take(data, crcs)
            self._take_waiting()
        else:
            self._keep(start, data, crcs)

    def advance(self, stop: int) -> None:
        """Read back what is missing up to `stop`.

        Raises
        ------
        DamageError
            If the file ends before `stop`.
        """
        while True:
            with self._lock:
                self._take_waiting()
                if self.position >= stop:
                    return
                self._read_back(min([stop, *self._waiting]))

    def _keep(self, start: int, data: U8, crcs: Crcs) -> None:
        """Hold a copy, in place of one whose turn is later if need be."""
        while self._held is not None and data.nbytes <= HELD_BYTES:
            copied = self._held.copy(data)
            if copied is not None:
                self._waiting[start] = _Waiting(*copied, crcs)
                return
            last = max(self._waiting, default=0)
            if last < start:
                return
            self._drop(last)

    def _drop(self, start: int) -> None:
        assert self._held is not None, "nothing is kept without"
        waiting = self._waiting.pop(start)
        self._held.give(waiting.place, waiting.copy.nbytes)

    def _take_waiting(self) -> None:
        while self.position in self._waiting:
            start = self.position
            self._take(self._waiting[start].copy, self._waiting[start].crcs)
            self._drop(start)

    def _read_back(self, stop: int) -> None:
        """Read one window from the present position on, up to `stop` at the most, and take it in."""
        skip = self.position % mmap.PAGESIZE
        wanted = min(WINDOW_BYTES, skip + stop - self.position)
        done = 0
        pages = self._window[: _pages(wanted)]
        while done < wanted and (count := os.preadv(self._fd, [pages[done:].data], self.position - skip + done)):
            done += count
            if done % mmap.PAGESIZE:
                break  # the end of the file
        if done < wanted:
            end = self.position - skip + done
            raise DamageError(f"{self._path} ends at byte {end}, expected {stop} or more")
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self.position, wanted - skip, os.POSIX_FADV_DONTNEED)
        self.bytes_back += wanted - skip
        found = self._window[skip:wanted]
        self._take(found, _crcs(self.position, found))

    def _take(self, data: U8, crcs: Crcs) -> None:
        for nbytes, crc in crcs:
            if self.position % GRAIN_BYTES:
                self.crc32c[-1] = joined(self.crc32c[-1], crc, nbytes)
            else:
                self.crc32c.append(crc)
            self.position += nbytes
        if self._sha256 is not None:
            self._sha256.update(data.data)

    def close(self) -> None:
        """Give the file and the memory back."""
        with self._lock:
            for start in list(self._waiting):
                self._drop(start)
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                del self._window
                with suppress(BufferError):
                    self._memory.close()


def _crcs(start: int, data: U8) -> Crcs:
    """Checksums of a piece that begins at byte `start` of its file."""
    first = GRAIN_BYTES - start % GRAIN_BYTES
    edges = [0, *range(first, data.nbytes, GRAIN_BYTES), data.nbytes]
    return [(after - begin, crc32c(data[begin:after])) for begin, after in itertools.pairwise(edges)]


def _overlap(start: int, data: U8, other: int, copy: U8) -> bool:
    return start < other + copy.nbytes and other < start + data.nbytes


def _pages(nbytes: int) -> int:
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _open(path: Path) -> int:
    with suppress(OSError, AttributeError):  # macOS has no O_DIRECT, some filesystems refuse it
        return os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
