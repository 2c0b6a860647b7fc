"""Writing output shards: any chunk, any order, the same file.

A shard is a `.part` file until it is complete. All its bytes are allocated first, so that a full disk is found before
hours of work; any thread writes any range at its planned offset; sealing makes it durable, completes its checksums,
checks it with the safetensors library and only then gives it its final name. A `.part` file is never mistaken for a
model.

What sealing does *not* promise: that the values are right, nor that the disk kept every byte as it was handed over. It
makes the file durable, records the checksums of what was handed over (see :mod:`mergepipe.storage.digest`; of what
reads back where that is not known any more), and proves that it is a valid safetensors file with the planned tensors.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.errors import DamageError, DiskFullError
from mergepipe.storage.checksum import crc32c
from mergepipe.storage.digest import GRAIN_BYTES, Digest, Held
from mergepipe.storage.file_errors import NO_ROOM, named
from mergepipe.storage.layout import ShardLayout

logger = logging.getLogger(__name__)

PAGE = 4096
"""What writing past the page cache asks of addresses, offsets and lengths."""


@dataclass(frozen=True, slots=True)
class SealedShard:
    """What is known of a complete shard.

    Attributes
    ----------
    file : str
        Its final name.
    size : int
        In bytes.
    crc32c : tuple of int
        One checksum per 8 MiB of the file, from its first byte on.
    sha256 : str or None
        Of the whole file; None if it was not asked for.
    """

    file: str
    size: int
    crc32c: tuple[int, ...]
    sha256: str | None


class ShardWriter:
    """One output shard on its way from `.part` to its final name.

    Parameters
    ----------
    folder : Path
        The output folder; must exist.
    layout : ShardLayout
        Its planned name, header and size.

    Raises
    ------
    DiskFullError
        If the file can't be allocated in full.
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self.layout = layout
        self.final = folder / layout.file
        self.part = folder / f"{layout.file}.part"
        self._fd = os.open(self.part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._direct = open_direct(self.part, os.O_WRONLY)
        self._lock = threading.Lock()
        self._front = len(layout.header)
        self._beyond: dict[int, int] = {}
        self._digest: Digest | None = None
        try:
            with self._room():
                os.ftruncate(self._fd, layout.size)
                allocate(self._fd, layout.size)
                _write_all(self._fd, layout.header, 0)
        except BaseException:
            self.close()
            raise

    def write(self, offset: int, data: npt.NDArray[Any]) -> int:
        """Put the bytes of a contiguous array at an absolute offset; their crc32c. Threads may write disjoint ranges.

        No byte is to be written twice: :meth:`follow` might read the first version after the second was hashed.

        Where the array's address and the offset have the same place in their page, whole pages go past the page cache;
        pages at the ends, which belong to a neighbour too, always go through it.
        """
        raw = data.reshape(-1).view(np.uint8)
        # Before it is written: pieces that come in the order of the file are hashed in it, however long a write takes.
        crc = crc32c(raw) if self._digest is None else self._digest.put(offset, raw)
        with self._room():
            first = -offset % PAGE
            last = first + max(0, raw.nbytes - first) // PAGE * PAGE
            if self._direct < 0 or last <= first or (raw.ctypes.data - offset) % PAGE:
                first = last = raw.nbytes
            _write_all(self._fd, raw[:first].data, offset)
            _write_all(self._direct, raw[first:last].data, offset + first)
            _write_all(self._fd, raw[last:].data, offset + last)
        self.mark(offset, offset + raw.nbytes)
        return crc

    def mark(self, start: int, stop: int) -> None:
        """Note that the bytes from `start` to `stop` are there: written now, or in an earlier run."""
        with self._lock:
            if stop > start:
                self._beyond[start] = max(stop, self._beyond.get(start, 0))
            while self._front in self._beyond:
                self._front = self._beyond.pop(self._front)

    def hash_in_passing(self, *, sha256: bool, held: Held) -> None:
        """Take checksums of what is written from now on; not to be called after the first piece is."""
        self._digest = Digest(self.part, sha256=sha256, held=held)
        self._digest.put(0, np.frombuffer(self.layout.header, np.uint8))

    @property
    def unhashed(self) -> int:
        """Bytes that are there, without a gap from the start, and not hashed yet."""
        with self._lock:
            return 0 if self._digest is None else self._front - self._digest.position

    def follow(self) -> None:
        """Read back and hash what could not be hashed in passing, up to the first gap, so that sealing has less to do.

        Not to be called beside :meth:`seal`.
        """
        if self._digest is not None:
            self._digest.advance(self._front)

    def sync(self) -> None:
        """Make everything written so far durable."""
        with self._room():
            os.fdatasync(self._fd)

    def seal(self, *, sha256: bool = True) -> SealedShard:
        """Make the file durable, complete its checksums and check it; :meth:`publish` then gives it its name.

        All of it is read back unless it was hashed in passing, which decides about the SHA-256 then.

        Raises
        ------
        DamageError
            If what is on disk is not a valid safetensors file with the planned tensors.
        """
        with self._room():
            os.fsync(self._fd)
            size = os.fstat(self._fd).st_size
        if size != self.layout.size:
            raise DamageError(f"{self.part} has {size} bytes after sealing, expected {self.layout.size}")
        digest = self._digest = self._digest or Digest(self.part, sha256=sha256)
        digest.advance(size)
        digest.close()
        self._check_header()
        logger.debug("%s: %s bytes read back for its checksums", self.layout.file, f"{digest.bytes_back:,}")
        return SealedShard(self.layout.file, size, tuple(digest.crc32c), digest.sha256)

    def publish(self) -> None:
        """Rename `.part` to the final name, durably."""
        self.close()
        publish_part(self.final)

    def close(self) -> None:
        """Give the file descriptor back. The `.part` file stays."""
        for fd in (self._fd, self._direct):
            if fd >= 0:
                os.close(fd)
        self._fd = self._direct = -1
        if self._digest is not None:
            self._digest.close()

    def _check_header(self) -> None:
        import safetensors

        try:
            with safetensors.safe_open(self.part, framework="numpy") as opened:
                found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError) as error:
            raise DamageError(f"{self.part} does not open as safetensors after sealing: {error}") from error
        expected = {tensor.name: tensor.shape for tensor in self.layout.tensors}
        if found != expected:
            wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            raise DamageError(f"{self.part} does not hold the planned tensors after sealing: {', '.join(wrong[:5])}")

    @contextlib.contextmanager
    def _room(self) -> Any:
        try:
            yield
        except OSError as error:
            if error.errno not in NO_ROOM:
                with named(self.part):
                    raise
            free = os.statvfs(self.part.parent)
            raise DiskFullError(
                f"no room for '{self.part}' ({self.layout.size:,} bytes; {free.f_bavail * free.f_frsize:,} free): "
                f"make room and run again"
            ) from error


def take_up(folder: Path, layout: ShardLayout) -> ShardWriter:
    """A writer for a file in a folder of its own, made if need be. A finished file there becomes unfinished again."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / layout.file
    if final.exists():
        os.replace(final, folder / f"{layout.file}.part")
    writer = ShardWriter(folder, layout)
    for parent in (folder, folder.parent, folder.parent.parent):
        sync_folder(parent)
    return writer


def open_direct(path: Path, flags: int) -> int:
    """A second descriptor that goes past the page cache; -1 where the filesystem refuses it."""
    if not hasattr(os, "O_DIRECT"):
        return -1
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        return -1


def allocate(fd: int, size: int) -> None:
    """Reserve the blocks of a file, where the filesystem can; where it can't, the size alone was set."""
    if size == 0 or not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(fd: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while len(view):
        written = os.pwrite(fd, view, offset)
        view = view[written:]
        offset += written


def crc32c_of_range(path: Path, start: int, length: int) -> int:
    """Checksum of a range of a file; of what there is of it, where the file is shorter."""
    data = np.empty(length, np.uint8)
    filled = 0
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while filled < length and (count := file.readinto(data[filled:].data)):
            filled += count
    return crc32c(data[:filled])


def matches(path: Path, sealed: SealedShard, mode: str) -> bool:
    """Whether a file still has the contents it was sealed with: all of it ("full"), or some windows ("sample")."""
    windows = range(len(sealed.crc32c))
    chosen = windows if mode == "full" else sorted({0, windows[-1], *windows[:: max(1, len(windows) // 8)]})
    return all(
        crc32c_of_range(path, number * GRAIN_BYTES, min(GRAIN_BYTES, sealed.size - number * GRAIN_BYTES))
        == sealed.crc32c[number]
        for number in chosen
    )


def publish_part(final: Path) -> None:
    """Give a complete `.part` file its final name, durably; nothing to do if it has it already."""
    part = final.with_name(f"{final.name}.part")
    if part.exists():
        os.replace(part, final)
        sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with named(folder):
            os.fsync(fd)
    finally:
        os.close(fd)
