"""Reading byte ranges of files: one small interface, and windowed memory maps behind it.

Plain mapping makes resident memory grow to the size of the inputs and reads cold data page by page. A *window* maps one
range, asks the kernel to fill it at once, and gives it back when the block ends, so that what stays resident is what is
being worked on.
"""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from mergepipe.errors import CheckpointError, ShortReadError
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.gather import Pieces
from mergepipe.storage.header import open_regular
from mergepipe.storage.manifest import Segment

U8 = NDArray[np.uint8]

_MADV_POPULATE_READ = 22  # Linux 5.14; Python has no name for it
_PROBE_BYTES = 512 * 1024
_MAX_CALL = 1 << 30  # Linux moves at most 2 GiB - 4 KiB per call


class Reader(Protocol):
    """Reads the bytes of segments. Safe to use from several threads at once."""

    bytes_read: int
    """Bytes handed out so far."""

    def window(self, segments: Sequence[Segment], *, last: bool) -> AbstractContextManager[U8]:
        """Bytes of all segments, one after the other, as a read-only uint8 array of shape (total length,).

        The array is valid inside the ``with`` block only. Its first byte is aligned to 8 in memory, so it can be viewed
        as any data type. With `last` the caller says that these bytes won't be needed again.
        """

    def windows(self, groups: Sequence[Sequence[Segment]], *, last: bool) -> AbstractContextManager[list[U8]]:
        """The windows of several groups of segments at once, as a unit of work needs them."""

    def ahead(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """A hint: these calls of `windows` will come, in about this order."""

    def skip(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """A hint: of the announced calls of `windows`, one for each of these units will not come."""

    def holds(self, groups: Sequence[Sequence[Segment]]) -> bool:
        """Whether a call of `windows` would find its bytes read, or about to be, so that nothing has to make room."""

    def forget(self, windows: Iterable[Sequence[Segment]]) -> None:
        """A hint: these windows won't be asked for again."""

    def close(self) -> None:
        """Close all files."""


@dataclass(slots=True)
class _OpenFile:
    """A descriptor, below zero until somebody has opened it, and how many use it."""

    fd: int = -1
    users: int = 0
    opening: threading.Lock = field(default_factory=threading.Lock)


class Descriptors:
    """Open files, the most recently used ones kept open. Safe to use from several threads at once.

    Parameters
    ----------
    limit : int, default 64
        Descriptors kept. More are open only while more are in use at once.
    opener : callable
        Opens a path for reading; may take its time, other files are borrowed meanwhile.
    """

    def __init__(self, limit: int = 64, opener: Callable[[str], int] = open_regular) -> None:
        self._limit = limit
        self._opener = opener
        self._lock = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    @contextmanager
    def borrow(self, path: str) -> Iterator[int]:
        """A read-only descriptor of `path`, open at least until the block ends.

        Raises
        ------
        CheckpointNotFoundError, CheckpointError
            As :func:`mergepipe.storage.header.open_regular`, or whatever else the opener raises.
        """
        with self._lock:
            file = self._open.setdefault(path, _OpenFile())
            file.users += 1
            self._open.move_to_end(path)
        try:
            with file.opening:
                if file.fd < 0:
                    file.fd = self._opener(path)
            yield file.fd
        finally:
            with self._lock:
                file.users -= 1
                if file.fd < 0 and file.users == 0:
                    del self._open[path]
                self._evict(self._limit)

    def _evict(self, limit: int) -> None:
        # One in use by another thread stays open: its number must not come to mean another file.
        idle = (path for path, file in self._open.items() if file.users == 0)
        for path in list(idle)[: max(0, len(self._open) - limit)]:
            os.close(self._open.pop(path).fd)

    def read_into(self, segment: Segment, out: memoryview) -> None:
        """Fill `out`, `segment.length` bytes long, through plain reads.

        Raises
        ------
        ShortReadError
            If the file ends early.
        CheckpointError
            If the device fails.
        """
        with self.borrow(segment.path) as fd:
            check_size(fd, segment)
            done = 0
            while done < segment.length:
                try:
                    count = os.preadv(fd, [out[done : done + _MAX_CALL]], segment.offset + done)
                except OSError as error:
                    raise unreadable(segment, error) from error
                if count == 0:
                    check_size(fd, segment)
                    raise unreadable(segment, EOFError("no bytes"))
                done += count

    def gather(self, segments: Sequence[Segment], out: U8, *, forget_pages: bool) -> None:
        """Fill `out` with all segments, one after the other, through plain reads; raises as :meth:`read_into`.

        With `forget_pages` the page cache drops what has been read.
        """

        def have_read(segment: Segment) -> None:
            if forget_pages:
                with self.borrow(segment.path) as fd:
                    forget(fd, segment)

        if isinstance(segments, Pieces):
            segments.read_into(self, out, have_read)
            return
        position = 0
        for segment in segments:
            self.read_into(segment, out[position : position + segment.length].data)
            position += segment.length
            have_read(segment)

    def close(self) -> None:
        """Close all files not in use."""
        with self._lock:
            self._evict(0)


def total_length(segments: Sequence[Segment]) -> int:
    """Bytes of all segments."""
    return segments.nbytes if isinstance(segments, Pieces) else sum(segment.length for segment in segments)


def check_size(fd: int, segment: Segment) -> None:
    """Raise :class:`ShortReadError` if an open file ends before a segment does."""
    size = os.fstat(fd).st_size
    if size < segment.offset + segment.length:
        raise ShortReadError(
            f"'{segment.path}' is {size} bytes long, expected at least {segment.offset + segment.length}: "
            "it was truncated or replaced while in use. Restore it and run again"
        )


def unreadable(segment: Segment, error: Exception) -> CheckpointError:
    """The error to raise where a device failed to read a segment."""
    return CheckpointError(f"'{segment.path}': {segment.length} bytes at {segment.offset} can't be read: {error}")


class MmapReader:
    """Windowed memory maps.

    A window of one segment is a view of the page cache: nothing is copied and no anonymous memory is used. A window of
    several segments (or of one that starts at an odd place) is gathered into a buffer of its total length.

    Parameters
    ----------
    descriptors : int, default 64
        Files kept open.
    files : CheckedFiles, optional
        Opens them; those that end in a checksum are compared with it then.

    Notes
    -----
    A file that shrinks under a mapping kills the process when the lost pages are touched. Its size is checked before
    each window, and the kernel is asked to fill the window before anybody touches it, which turns the rest of that risk
    into an error on Linux 5.14 and later; a file truncated during the few milliseconds of computing stays fatal.

    An array that outlives its block stays readable, since its mapping lives as long; its pages are read again.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file, MmapReader() as reader:
    ...     _ = file.write(b"0123456789")
    ...     file.flush()
    ...     with reader.window([Segment(file.name, 8, 2), Segment(file.name, 0, 3)], last=True) as window:
    ...         print(window.tobytes())
    b'89012'
    """

    def __init__(self, descriptors: int = 64, files: CheckedFiles | None = None) -> None:
        self.bytes_read = 0
        self._lock = threading.Lock()
        self._descriptors = Descriptors(descriptors, (files or CheckedFiles()).open)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files."""
        self._descriptors.close()

    @contextmanager
    def window(self, segments: Sequence[Segment], *, last: bool) -> Iterator[U8]:
        """Bytes of all segments; see :class:`Reader`.

        Raises
        ------
        ShortReadError
            If a file is shorter than a segment needs.
        CheckpointError
            If a file is missing, not regular, or can't be read.
        """
        if not isinstance(segments, Pieces):
            segments = [segment for segment in segments if segment.length]
        with self._lock:
            self.bytes_read += total_length(segments)
        if not isinstance(segments, Pieces) and len(segments) == 1 and segments[0].offset % 8 == 0:
            with self._mapped(segments[0], last=last) as view:
                yield view
        else:
            yield self._gathered(segments, last=last)

    @contextmanager
    def windows(self, groups: Sequence[Sequence[Segment]], *, last: bool) -> Iterator[list[U8]]:
        """One window per group; raises as :meth:`window`."""
        with ExitStack() as stack:
            yield [stack.enter_context(self.window(segments, last=last)) for segments in groups]

    def ahead(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """Nothing: the kernel reads each window as it is mapped."""

    def skip(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """Nothing: nothing was read ahead."""

    def holds(self, groups: Sequence[Sequence[Segment]]) -> bool:
        """Always: the page cache makes room by itself."""
        return True

    def forget(self, windows: Iterable[Sequence[Segment]]) -> None:
        """Nothing: the page cache makes room by itself."""

    @contextmanager
    def _mapped(self, segment: Segment, *, last: bool) -> Iterator[U8]:
        with self._descriptors.borrow(segment.path) as fd:
            mapping = filled_map(fd, segment)
            try:
                yield mapped_bytes(mapping, segment)
            finally:
                mapping.madvise(mmap.MADV_DONTNEED)
                # The caller's array may still be alive; then the mapping is closed with it.
                with suppress(BufferError):
                    mapping.close()
                if last:
                    forget(fd, segment)

    def _gathered(self, segments: Sequence[Segment], *, last: bool) -> U8:
        out = np.empty(total_length(segments), np.uint8)
        self._descriptors.gather(segments, out, forget_pages=last)
        out.flags.writeable = False
        return out


def filled_map(fd: int, segment: Segment) -> mmap.mmap:
    """A read-only map of the pages of an open file that a segment touches, all of them in memory by now.

    Raises
    ------
    ShortReadError
        If the file ends before the segment does.
    CheckpointError
        If the device fails.
    """
    mapping = new_map(fd, segment)
    _populate(mapping, fd, segment)
    return mapping


def new_map(fd: int, segment: Segment) -> mmap.mmap:
    """The same map with no page asked for; raises :class:`ShortReadError` likewise."""
    check_size(fd, segment)
    skip = segment.offset % mmap.ALLOCATIONGRANULARITY
    return mmap.mmap(fd, segment.length + skip, access=mmap.ACCESS_READ, offset=segment.offset - skip)


def in_page_cache(fd: int, segment: Segment) -> bool:
    """Whether the page cache holds a segment, as far as one byte in every 512 KiB tells; False where nobody knows.

    The kernel drops what it has read in runs far longer than that, so a segment of which a part is missing all the same
    is rare: its pages are read when they are touched.
    """
    if sys.platform != "linux":
        return False
    last = segment.offset + segment.length - 1
    into = [bytearray(1)]
    try:
        return all(
            os.preadv(fd, into, offset, os.RWF_NOWAIT) for offset in (*range(segment.offset, last, _PROBE_BYTES), last)
        )
    except OSError:  # EAGAIN, it would have to wait; or a file system that can't tell
        return False


def mapped_bytes(mapping: mmap.mmap, segment: Segment) -> U8:
    """The bytes of a segment in its map, which lives as long as they do."""
    return np.frombuffer(mapping, np.uint8, segment.length, segment.offset % mmap.ALLOCATIONGRANULARITY)


def _populate(mapping: mmap.mmap, fd: int, segment: Segment) -> None:
    """Have the kernel read the whole window at once instead of one page per fault."""
    mapping.madvise(mmap.MADV_SEQUENTIAL)
    if sys.platform != "linux":
        return
    try:
        mapping.madvise(_MADV_POPULATE_READ)
    except OSError as error:
        if error.errno == errno.EINVAL:  # an older kernel: pages come as they are touched
            return
        check_size(fd, segment)
        raise unreadable(segment, error) from error


def forget(fd: int, segment: Segment) -> None:
    """Drop the pages from the page cache, so that they do not push out what is needed again."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, segment.offset, segment.length, os.POSIX_FADV_DONTNEED)
