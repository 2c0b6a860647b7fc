"""Output on its way to the disk: filled by whoever computes, written by threads of its own.

    piece() ─► a place that is free ─► filled ─► queue ─► written ─► the place is free again
                       ▲                                     │
                       └───────────── waits for it ◄─────────┘

A worker that wrote what it made would wait for the disk as long as it computes: half of the processors idle while the
disk works, and the disk while they compute. The places are few and used again and again, so whoever is faster than the
disk waits for it in the end.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import LifoQueue

import numpy as np
import numpy.typing as npt

from mergepipe.storage.writer import PAGE

WRITING_THREADS = 2
"""Enough to write past the page cache at the speed of the disk: while one takes checksums the other writes."""

U8 = npt.NDArray[np.uint8]


class _Place:
    """Memory for one piece; it grows to the largest."""

    def __init__(self) -> None:
        self._flat = np.empty(0, np.uint8)

    def bytes(self, nbytes: int, at: int) -> U8:
        """`nbytes` bytes that begin `at` bytes into a page of memory."""
        if self._flat.nbytes < nbytes + 2 * PAGE:
            self._flat = np.empty(nbytes + 2 * PAGE, np.uint8)
        start = -self._flat.ctypes.data % PAGE + at
        return self._flat[start : start + nbytes]


class Outgoing:
    """Places for pieces of output, and the threads that write them. Safe for threads.

    Parameters
    ----------
    places : int
        Pieces that are filled or written at once; more than there are threads that fill them.
    on_error : callable
        Told what a write has raised.

    Examples
    --------
    >>> written = bytearray(4)
    >>> def write(data):
    ...     written[:] = data.tobytes()
    >>> outgoing = Outgoing(places=2, on_error=print)
    >>> with outgoing.piece("weight", nbytes=4, at=0, write=write) as data:
    ...     data[:] = 7
    >>> outgoing.drain()
    >>> written
    bytearray(b'\\x07\\x07\\x07\\x07')
    >>> outgoing.close()
    """

    def __init__(self, places: int, on_error: Callable[[BaseException], None]) -> None:
        self._on_error = on_error
        self._places: LifoQueue[_Place] = LifoQueue()
        for _ in range(places):
            self._places.put(_Place())
        self._threads = ThreadPoolExecutor(WRITING_THREADS, "mergepipe-write")
        self._changed = threading.Condition()
        self._left: Counter[object] = Counter()
        self._ending = 0
        self._failed: set[object] = set()
        self._after: dict[object, Callable[[], None]] = {}

    @contextmanager
    def piece(self, owner: object, nbytes: int, at: int, write: Callable[[U8], None]) -> Iterator[U8]:
        """Memory to fill, uint8, shape (nbytes,); `write` is called with it after the block, unless that raises.

        Parameters
        ----------
        owner : hashable
            What the piece is a part of.
        nbytes : int
        at : int
            Where in a page of memory it is to begin: where it lies in a page of its file, it is written fastest.
        write : callable
            Called on a thread of this object; the memory belongs to the next piece when it returns.
        """
        place = self._places.get()
        try:
            data = place.bytes(nbytes, at)
            yield data
        except BaseException:
            self._places.put(place)
            raise
        with self._changed:
            self._left[owner] += 1
        self._threads.submit(self._write, owner, place, data, write)

    def when_written(self, owner: object, done: Callable[[], None]) -> None:
        """Call `done` as soon as all pieces of an owner are written; never if one of them could not be.

        To be called once, when all of them have been filled.
        """
        with self._changed:
            self._after[owner] = done
        self._end(owner, pieces=0)

    def drain(self) -> None:
        """Wait until everything that was filled is written, and what was to be done then is done."""
        with self._changed:
            self._changed.wait_for(lambda: not self._left and not self._ending)

    def close(self) -> None:
        """Write what is filled, and end the threads."""
        self._threads.shutdown()

    def _write(self, owner: object, place: _Place, data: U8, write: Callable[[U8], None]) -> None:
        try:
            write(data)
        except BaseException as error:
            with self._changed:
                self._failed.add(owner)
            self._on_error(error)
        finally:
            self._places.put(place)
        self._end(owner, pieces=1)

    def _end(self, owner: object, *, pieces: int) -> None:
        """So many pieces of an owner less: do what was to be done after the last one."""
        with self._changed:
            self._left[owner] -= pieces
            if self._left[owner]:
                return
            del self._left[owner]
            done = None if owner in self._failed else self._after.pop(owner, None)
            self._ending += 1
        try:
            if done is not None:
                done()
        except BaseException as error:
            self._on_error(error)
        finally:
            with self._changed:
                self._ending -= 1
                self._changed.notify_all()
