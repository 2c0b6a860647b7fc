"""Reading past the page cache: O_DIRECT into one bounded arena of aligned, reused memory.

    ahead(groups) ──► queue ──(room in the arena)──► I/O threads ──► loaded, idle ──► window ──► freed, or kept
                                                         ▲                                          │
    windows(groups) ─────────── what is not there ───────┘            last=False: kept until ◄──────┘
                                                                      it is asked for again

The arena is the only memory: its pages are touched once and used again and again, since fresh pages cost more than
reading into them does. What a caller will need again stays where it is until the last use, so that a tensor set that
fits is read from disk once. Each announcement is of one pass: what is asked for twice is announced twice, and kept if
it is still there. Whatever is idle may be dropped to make room, and is announced again then. All windows of a unit are
taken together or not at all, and who has waited longest is served first, so that callers can't starve each other.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.gather import Pieces
from mergepipe.storage.header import open_regular
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import U8, Descriptors, check_size, total_length, unreadable

PAGE = 4096
"""What O_DIRECT asks of offsets, lengths and addresses; enough for every disk that we know of."""

SLACK_BYTES = 2 * PAGE
"""How much more than its length a window may take of the arena."""

TOUCHED_AT_ONCE = 4 << 20
"""Fresh memory asked for at once, at the least: numpy lets other threads run only while it writes many pages."""

IO_THREADS = 4
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY)

Key = tuple[Segment, ...] | Pieces


def supports_direct(path: str | Path) -> bool:
    """Whether the filesystem of a file lets it be read past the page cache.

    Raises
    ------
    CheckpointNotFoundError, CheckpointError
        As :func:`mergepipe.storage.header.open_regular`.
    """
    fd = open_regular(path)
    try:
        return _set_direct(fd)
    finally:
        os.close(fd)


def _set_direct(fd: int) -> bool:
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        return False
    return True


def _open_direct(path: str) -> int:
    """A descriptor that reads past the page cache, or through it where the filesystem knows no other way."""
    fd = open_regular(path)
    try:
        _set_direct(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Arena:
    """One block of page-aligned memory, handed out in pieces: first fit, neighbouring holes joined.

    Examples
    --------
    >>> arena = Arena(5 * PAGE)
    >>> arena.take(2 * PAGE), arena.take(2 * PAGE), arena.take(2 * PAGE)
    (0, 8192, None)
    >>> arena.give(0, 2 * PAGE)
    >>> arena.take(PAGE), arena.free
    (0, 8192)
    """

    def __init__(self, nbytes: int) -> None:
        self.size = _pages(nbytes)
        self._memory = mmap.mmap(-1, max(self.size, PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a matter of speed only
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: U8 = np.frombuffer(self._memory, np.uint8, self.size)
        self._holes = [(0, self.size)]
        self._touched = 0
        self._touching = threading.Lock()

    @property
    def free(self) -> int:
        """Bytes in holes."""
        return sum(length for _, length in self._holes)

    def take(self, nbytes: int) -> int | None:
        """Offset of a piece of `nbytes`, a multiple of the page size; None if no hole is that large."""
        for number, (start, length) in enumerate(self._holes):
            if length >= nbytes:
                rest = [(start + nbytes, length - nbytes)] if length > nbytes else []
                self._holes[number : number + 1] = rest
                return start
        return None

    def give(self, start: int, nbytes: int) -> None:
        """Give a piece back."""
        at = bisect.bisect(self._holes, (start, nbytes))
        stop = start + nbytes
        if at < len(self._holes) and self._holes[at][0] == stop:
            stop += self._holes.pop(at)[1]
        if at and sum(self._holes[at - 1]) == start:
            start = self._holes.pop(at - 1)[0]
            at -= 1
        self._holes.insert(at, (start, stop - start))

    def touch(self, stop: int) -> None:
        """See that the memory up to offset `stop` is there, by one thread at a time.

        Fresh pages are a matter of seconds per gigabyte where the machine is a virtual one. If every read had the
        kernel find some, they would take all processors away from whatever else there is to do at the beginning.
        """
        if self._touched >= stop:
            return
        with self._touching:
            if self._touched < stop:
                stop = min(self.size, max(stop, self._touched + TOUCHED_AT_ONCE))
                self.bytes[self._touched : stop : PAGE] = 0
                self._touched = stop

    def close(self) -> None:
        """Give the memory back, as soon as no window looks at it."""
        del self.bytes
        with suppress(BufferError):
            self._memory.close()


@dataclass(slots=True)
class _Piece:
    """A window's place in the arena.

    Attributes
    ----------
    users : int
        Calls that have it now.
    expected : list of list of Key
        Units that were announced, and that it is kept for.
    taken : bool
        Whether some call has had it.
    """

    key: Key
    start: int
    reserved: int
    loading: Future[U8] = field(init=False)
    users: int = 0
    expected: list[list[Key]] = field(default_factory=list)
    taken: bool = False


class DirectReader:
    """Reads past the page cache into an arena of fixed size.

    Parameters
    ----------
    budget : int
        Bytes of the arena, which is all the memory it takes. One unit's windows have to fit, each with
        :data:`SLACK_BYTES` to spare; a single window that does not fit is read into memory of its own.
    threads : int
        Threads that read; also how many reads the disk sees at once.
    descriptors : int, default 64
        Files kept open.
    files : CheckedFiles, optional
        Opens them; those that end in a checksum are compared with it then.

    Notes
    -----
    Filesystems that refuse O_DIRECT are read through the page cache into the same memory, and so are files that end in
    a checksum: it has been compared through the page cache a moment ago.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file, DirectReader(4 * PAGE) as reader:
    ...     _ = file.write(b"0123456789")
    ...     file.flush()
    ...     with reader.window([Segment(file.name, 8, 2), Segment(file.name, 0, 3)], last=True) as window:
    ...         print(window.tobytes())
    b'89012'
    """

    def __init__(
        self, budget: int, threads: int = IO_THREADS, descriptors: int = 64, files: CheckedFiles | None = None
    ) -> None:
        self.bytes_read = 0
        self.bytes_loaded = 0
        """Bytes asked of the filesystem: less than `bytes_read` where windows were kept."""
        self._arena = Arena(budget)
        self._direct = Descriptors(descriptors, _open_direct)
        self._files = files or CheckedFiles()
        self._plain = Descriptors(descriptors, self._files.open)
        self._changed = threading.Condition()
        self._pieces: dict[Key, _Piece] = {}
        self._queue: deque[list[Key]] = deque()
        self._line: deque[object] = deque()
        self._closed = False
        self._pool = ThreadPoolExecutor(threads, "mergepipe-read")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for reads under way, close all files and give the memory back."""
        with self._changed:
            self._closed = True
            self._queue.clear()
        self._pool.shutdown(cancel_futures=True)
        self._pieces.clear()
        self._direct.close()
        self._plain.close()
        self._arena.close()

    def ahead(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """Read these units, each the windows of one later call, as soon as there is room for them."""
        with self._changed:
            announced = ([_key(segments) for segments in unit] for unit in units)
            self._queue.extend(keys for keys in announced if self._fits(keys))
            self._pump()

    def forget(self, windows: Iterable[Sequence[Segment]]) -> None:
        """Drop windows that were kept or read ahead and that nobody will ask for."""
        with self._changed:
            keys = {_key(segments) for segments in windows}
            self._queue = deque(unit for unit in self._queue if keys.isdisjoint(unit))
            for piece in self._there(keys):
                piece.expected.clear()
                self._drop_unless_needed(piece)
            self._pump()

    def skip(self, units: Iterable[Sequence[Sequence[Segment]]]) -> None:
        """Take back the announcement of these units."""
        with self._changed:
            for unit in units:
                keys = [_key(segments) for segments in unit]
                self._expect_no_more(keys)
                for piece in self._there(keys):
                    self._drop_unless_needed(piece)
            self._pump()

    def holds(self, groups: Sequence[Sequence[Segment]]) -> bool:
        """Whether all windows of a unit are in the arena, or on their way into it; or whether they never will be."""
        keys = [_key(segments) for segments in groups]
        with self._changed:
            return all(key in self._pieces for key in keys) or not self._fits(keys)

    @contextmanager
    def window(self, segments: Sequence[Segment], *, last: bool) -> Iterator[U8]:
        """Bytes of all segments; see :class:`mergepipe.storage.readers.Reader`.

        Raises
        ------
        ShortReadError
            If a file is shorter than a segment needs.
        CheckpointError
            If a file is missing, not regular, or can't be read.
        """
        with self.windows([segments], last=last) as (window,):
            yield window

    @contextmanager
    def windows(self, groups: Sequence[Sequence[Segment]], *, last: bool) -> Iterator[list[U8]]:
        """One window per group, all taken together; raises as :meth:`window`."""
        keys = [_key(segments) for segments in groups]
        if not self._fits(keys):
            yield [self._outside(key) for key in keys]
            return
        pieces = self._take(keys)
        try:
            wait(piece.loading for piece in pieces)
            yield [piece.loading.result() for piece in pieces]
        finally:
            self._release(pieces, last)

    def _fits(self, keys: list[Key]) -> bool:
        """Whether the arena can hold a unit at all; one that it can't is read beside it, when it is asked for."""
        return sum(_reserved(key) for key in keys) <= self._arena.size

    def _take(self, keys: list[Key]) -> list[_Piece]:
        """Pin the pieces of a unit, loading what is not there; waits until there is room for all of them."""
        with self._changed:
            self._expect_no_more(keys)
            turn = object()
            self._line.append(turn)
            try:
                while (pieces := self._admit_in_turn(keys, turn)) is None:
                    if self._line[0] is not turn or any(not self._idle(piece) for piece in self._pieces.values()):
                        self._changed.wait()
                        continue
                    # Nobody else is at work: only what is kept of this very unit is in its own way.
                    for piece in reversed(list(self._pieces.values())):
                        self._give_up(piece)
            finally:
                self._line.remove(turn)
                self._changed.notify_all()
            self.bytes_read += sum(total_length(key) for key in keys)
            for piece in pieces:
                piece.taken = True
            return pieces

    def _expect_no_more(self, keys: list[Key]) -> None:
        """A unit is asked for: take back its announcement. It may have been announced again, for another pass."""
        there = [piece for piece in self._there(keys) if keys in piece.expected]
        for piece in there:
            piece.expected.remove(keys)
        if not there:
            with suppress(ValueError):  # nobody has announced it
                self._queue.remove(keys)

    def _admit_in_turn(self, keys: list[Key], turn: object) -> list[_Piece] | None:
        """The pieces of a unit if there is room, or if they are there; room goes to whoever has waited longest."""
        if self._line[0] is not turn and not all(key in self._pieces for key in keys):
            return None
        # While another unit is at work it is better to wait for its room than to drop what will be read again.
        return self._admit(keys, evict=not self._at_work())

    def _there(self, keys: Iterable[Key]) -> list[_Piece]:
        """The pieces in the arena, each once."""
        return [self._pieces[key] for key in dict.fromkeys(keys) if key in self._pieces]

    def _at_work(self) -> bool:
        return any(piece.users for piece in self._pieces.values())

    def _release(self, pieces: list[_Piece], last: bool) -> None:
        with self._changed:
            for piece in pieces:
                piece.users -= 1
                # A wait that was broken off leaves reads under way; their memory is dropped by whoever needs room.
                failed = piece.loading.done() and (piece.loading.cancelled() or piece.loading.exception() is not None)
                if self._idle(piece) and ((last and not piece.expected) or failed):
                    self._drop(piece)
            self._pump()
            self._changed.notify_all()

    def _pump(self) -> None:
        """Begin to read ahead what there is room for; nothing is dropped for it, and who waits goes first."""
        while self._queue and not self._line and not self._closed:
            pieces = self._admit(self._queue[0], evict=False)
            if pieces is None:
                return
            unit = self._queue.popleft()
            for piece in pieces:
                piece.users -= 1
            for piece in self._there(unit):
                piece.expected.append(unit)

    def _admit(self, keys: list[Key], *, evict: bool) -> list[_Piece] | None:
        """All pieces of a unit, with one more user each; None, and nothing changed, if there is no room now."""
        pinned, new = [], []
        for key in keys:
            piece = self._pieces.get(key)
            if piece is None:
                piece = self._place(key, evict)
                if piece is None:
                    break
                new.append(piece)
            piece.users += 1
            pinned.append(piece)
        if len(pinned) < len(keys):
            for piece in pinned:
                piece.users -= 1
            for piece in new:
                self._drop(piece)
            return None
        for piece in new:
            piece.loading = self._pool.submit(self._load, piece)
        for piece in new:
            piece.loading.add_done_callback(partial(self._loaded, piece))
        return pinned

    def _place(self, key: Key, evict: bool) -> _Piece | None:
        reserved = _reserved(key)
        while (start := self._arena.take(reserved)) is None:
            # The piece that came last is mostly the one needed last: work goes on in the order of announcement. Only
            # what is kept while a pass turns round is needed the other way.
            idle = next((piece for piece in reversed(self._pieces.values()) if self._idle(piece)), None)
            if idle is None or not evict:
                return None
            self._give_up(idle)
        piece = self._pieces[key] = _Piece(key, start, reserved)
        return piece

    def _idle(self, piece: _Piece) -> bool:
        return piece.users == 0 and piece.loading.done()

    def _give_up(self, piece: _Piece) -> None:
        """Drop what is needed later than something else; where it was read ahead, it is announced again."""
        units = piece.expected.copy()
        self._queue.extendleft(reversed(units))
        for unit in units:
            for other in [piece for piece in self._there(unit) if unit in piece.expected]:
                other.expected.remove(unit)
        self._drop(piece)

    def _drop_unless_needed(self, piece: _Piece) -> None:
        if self._idle(piece) and not piece.expected:
            self._drop(piece)

    def _drop(self, piece: _Piece) -> None:
        del self._pieces[piece.key]
        self._arena.give(piece.start, piece.reserved)

    def _load(self, piece: _Piece) -> U8:
        memory = self._arena.bytes[piece.start : piece.start + piece.reserved]
        try:
            self._arena.touch(piece.start + piece.reserved)
            single = _single(piece.key)
            whole = single is None or self._files.is_checked(single.path)
            window = self._gather(piece.key, memory) if single is None or whole else self._read_direct(single, memory)
            window.flags.writeable = False
            return window
        finally:
            with self._changed:
                self.bytes_loaded += total_length(piece.key)

    def _loaded(self, piece: _Piece, _: Future[U8]) -> None:
        with self._changed:
            # Nobody has had it or expects it: it was forgotten while it was read. Who has had it may have kept it.
            if self._pieces.get(piece.key) is piece and not piece.taken:
                self._drop_unless_needed(piece)
            self._changed.notify_all()

    def _read_direct(self, segment: Segment, memory: U8) -> U8:
        """Read the whole pages that a segment touches; the window begins inside the first one."""
        skip = segment.offset % PAGE
        first, wanted = segment.offset - skip, skip + segment.length
        pages = memoryview(memory)[: _pages(wanted)]
        done = 0
        with self._direct.borrow(segment.path) as fd:
            check_size(fd, segment)
            while done < wanted:
                # An unaligned position follows a short count; only the page cache goes on from there.
                try:
                    count = os.preadv(fd, [pages[done:]], first + done) if done % PAGE == 0 else 0
                except OSError as error:
                    if error.errno not in _REFUSED:
                        raise unreadable(segment, error) from error
                    count = 0
                if count == 0:
                    rest = Segment(segment.path, first + done, wanted - done)
                    self._plain.read_into(rest, pages[done:wanted])
                    count = rest.length
                done += count
        if skip % 8:
            ctypes.memmove(memory.ctypes.data, memory.ctypes.data + skip, segment.length)
            skip = 0
        return memory[skip : skip + segment.length]

    def _gather(self, key: Key, memory: U8) -> U8:
        """Read several segments one after the other, through the page cache, whose pages are given back at once."""
        window = memory[: total_length(key)]
        self._plain.gather(key, window, forget_pages=True)
        return window

    def _outside(self, key: Key) -> U8:
        window = self._gather(key, np.empty(total_length(key), np.uint8))
        window.flags.writeable = False
        with self._changed:
            self.bytes_read += window.nbytes
            self.bytes_loaded += window.nbytes
        return window


def _key(segments: Sequence[Segment]) -> Key:
    return segments if isinstance(segments, Pieces) else tuple(segment for segment in segments if segment.length)


def _single(key: Key) -> Segment | None:
    """The one segment of a window, if it is only one."""
    return key[0] if not isinstance(key, Pieces) and len(key) == 1 else None


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _reserved(key: Key) -> int:
    """Bytes of the arena for a window: whole pages, those at both ends included."""
    single = _single(key)
    return max(PAGE, _pages(total_length(key) + (0 if single is None else single.offset % PAGE)))
