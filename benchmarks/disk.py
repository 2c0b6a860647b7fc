"""The disk without us: reading the inputs, writing the output, or both, in large pieces, and doing nothing else."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import drop_from_cache
from mergepipe.storage.direct import IO_THREADS
from mergepipe.storage.outgoing import WRITING_THREADS

PIECE = 8 << 20
CALL = 1 << 20
"""Bytes per call that a disk was seen to move fastest into plain memory, of 512 KiB to 8 MiB."""

_PAGE = 4096

Job = tuple[bool, int, int, int]
"""Whether it writes, descriptor, offset, length."""


@dataclass(frozen=True)
class Spent:
    """What a piece of work in this process took: elapsed seconds, and CPU seconds of all threads."""

    wall_s: float
    cpu_s: float


def spent(work: Callable[[], object]) -> Spent:
    """Do the work and say what it took."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - began, time.process_time() - used)


def read_alone(inputs: Sequence[Path], piece: int, *, direct: bool, threads: int = 1) -> None:
    """Read every byte of some files into reused memory, one file after the other.

    Parameters
    ----------
    inputs : sequence of Path
    piece : int
        Bytes per call; whole pages.
    direct : bool
        Past the page cache or through it.
    threads : int

    Raises
    ------
    OSError
        If the file system knows no O_DIRECT.
    """
    with ExitStack() as stack:
        sources = [_open(stack, path, os.O_RDONLY | (os.O_DIRECT if direct else 0)) for path in inputs]
        jobs = [(False, fd, at, piece) for fd in sources for at in range(0, os.fstat(fd).st_size, piece)]
        _move_all(jobs, threads)


def write_alone(output: Path, nbytes: int, source: memoryview, *, direct: bool) -> None:
    """Allocate a new file, write `nbytes` to it from the same memory again and again, and make it durable.

    Raises
    ------
    OSError
        If the file system knows no O_DIRECT.
    """
    size = -(-nbytes // _PAGE) * _PAGE if direct else nbytes
    with ExitStack() as stack:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | (os.O_DIRECT if direct else 0)
        target = _open(stack, output, flags)
        os.posix_fallocate(target, 0, size)
        for offset in range(0, size, len(source)):
            piece = source[: min(len(source), size - offset)]
            assert os.pwrite(target, piece, offset) == len(piece), "the disk is full"
        os.fsync(target)


def io_alone(inputs: Sequence[Path], output: Path, nbytes: int) -> float:
    """Seconds to read every byte of `inputs`, cold, and to write and sync `nbytes` to `output`, which is removed.

    Past the page cache where the file system knows how, with as many reads and writes at once as a run has.

    Parameters
    ----------
    inputs : sequence of Path
        Dropped from the page cache first.
    output : Path
        A new file; it is allocated before the clock starts, as a merge allocates its output.
    nbytes : int
    """
    # tmpfs and some network file systems refuse O_DIRECT.
    with suppress(OSError):
        return _io_alone(inputs, output, nbytes, os.O_DIRECT)
    return _io_alone(inputs, output, nbytes, 0)


def _io_alone(inputs: Sequence[Path], output: Path, nbytes: int, flag: int) -> float:
    drop_from_cache(list(inputs))
    size = -(-nbytes // _PAGE) * _PAGE
    with ExitStack() as stack:
        stack.callback(lambda: output.unlink(missing_ok=True))
        sources = [_open(stack, path, os.O_RDONLY | flag) for path in inputs]
        target = _open(stack, output, os.O_RDWR | os.O_CREAT | os.O_EXCL | flag)
        os.posix_fallocate(target, 0, size)
        longest = max(os.fstat(fd).st_size for fd in sources)
        # All inputs side by side, as a merge reads them.
        reads = [(False, fd, at, CALL) for at in range(0, longest, CALL) for fd in sources if at < os.fstat(fd).st_size]
        writes = [(True, target, at, min(CALL, size - at)) for at in range(0, size, CALL)]
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:
            written = beside.submit(_move_all, writes, WRITING_THREADS)
            _move_all(reads, IO_THREADS)
            written.result()
        os.fdatasync(target)
        return time.perf_counter() - began


def _open(stack: ExitStack, path: Path, flags: int) -> int:
    descriptor = os.open(path, flags, 0o600)
    stack.callback(os.close, descriptor)
    return descriptor


def _move_all(jobs: Sequence[Job], threads: int) -> None:
    local = threading.local()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(_move, local, *job) for job in jobs]:
            done.result()


def _move(local: threading.local, is_write: bool, descriptor: int, offset: int, length: int) -> None:
    if not hasattr(local, "buffer"):
        # Anonymous maps are page-aligned, which O_DIRECT asks for; one per thread, used again and again.
        local.buffer = mmap.mmap(-1, PIECE)
    view = memoryview(local.buffer)[:length]
    if is_write:
        os.pwritev(descriptor, [view], offset)
    else:
        os.preadv(descriptor, [view], offset)
