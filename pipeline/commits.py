"""Group commit: finished units become durable together, and only then are recorded.

    unit written ─► pending ──(256 MiB or 2 s)──► inputs are what they were? ─► fdatasync of the shards
                                                  ─► journal record ─► fdatasync of the journal

A record is a promise, so it follows the bytes, never the other way round; a unit that failed, or whose sync failed, is
never recorded. Nor is anything that was made of inputs while somebody wrote to them: they are looked at after the
pending units were made and before these are recorded, and once they differ the run ends. So whatever is recorded, by
this run or an earlier one, was made of the right bytes, and needs not be forgotten when a changed input is found.
What is lost when the process dies is what was pending: two seconds of work.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mergepipe.errors import Interrupted
from mergepipe.storage.journal import Journal, Record

COMMIT_BYTES = 256 * 1024 * 1024
COMMIT_SECONDS = 2.0
LOOKS = 20
"""A look at the inputs, at all chunks of copied stores that is, takes at most one of so many parts of the time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DoneUnit:
    """Bytes `start` to `stop` of output tensor number `tensor` are written into shard number `shard`."""

    tensor: int
    shard: int
    start: int
    stop: int
    crc32c: int


class Committer:
    """Collects finished units and commits them, on a thread of its own.

    After a sync or an append has failed nothing is recorded any more: the kernel reports a lost write once, so a later
    sync that succeeds proves nothing about the bytes before it.

    Parameters
    ----------
    journal : Journal
    sync : callable
        ``sync(shard)`` makes all bytes written to a shard so far durable.
    on_error : callable
        Told of the first failure of a commit; the run should end then.
    check_inputs : callable
        Raises if an input is not what it was when the run began.
    max_bytes, max_seconds
        A commit begins when this much is pending, or when the oldest pending unit is this old.
    """

    def __init__(
        self,
        journal: Journal,
        sync: Callable[[int], None],
        on_error: Callable[[BaseException], None],
        check_inputs: Callable[[], None],
        *,
        max_bytes: int = COMMIT_BYTES,
        max_seconds: float = COMMIT_SECONDS,
    ) -> None:
        self._journal = journal
        self._sync = sync
        self._on_error = on_error
        self._check_inputs = check_inputs
        self._rest_s = 0.0
        self._max_bytes = max_bytes
        self._max_seconds = max_seconds
        self._pending: list[DoneUnit] = []
        self._pending_bytes = 0
        self._records: list[Record] = []
        self._wake = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._committing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="mergepipe-commit", daemon=True)
        self._thread.start()

    def add(self, unit: DoneUnit) -> None:
        """A unit is written; it will be committed soon."""
        with self._wake:
            self._pending.append(unit)
            self._pending_bytes += unit.stop - unit.start
            if self._pending_bytes >= self._max_bytes or len(self._pending) == 1:
                self._wake.notify()

    def add_record(self, record: Record) -> None:
        """A record that promises nothing about shards but was made of inputs, to be written with the next commit."""
        with self._wake:
            self._records.append(record)
            if not self._pending:
                self._wake.notify()

    def commit(self) -> None:
        """Make everything added so far durable and record it, before returning."""
        with self._committing, self._guarded():
            with self._wake:
                units, self._pending, self._pending_bytes = self._pending, [], 0
                records, self._records = self._records, []
            if units or records:
                self._look()
            for shard in sorted({unit.shard for unit in units}):
                self._sync(shard)
            if units:
                records.append(units_record(units))
            if records:
                self._journal.append(records)
                logger.debug("committed %d units, %s bytes", len(units), f"{sum(u.stop - u.start for u in units):,}")

    def _look(self) -> None:
        """Nothing is recorded that was made of inputs that changed."""
        began = time.monotonic()
        self._check_inputs()
        self._rest_s = LOOKS * (time.monotonic() - began)

    def record(self, record: Record) -> None:
        """Append a record whose promise is kept already, and that follows from what was committed before."""
        with self._guarded():
            self._journal.append([record])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Refuse to promise anything once a promise could not be kept."""
        if self._failure is not None:
            raise Interrupted("an earlier commit failed") from self._failure
        try:
            yield
        except BaseException as error:
            self._failure = error
            raise

    def close(self) -> None:
        """Commit what is pending and end the thread; nothing more to do if a commit has failed."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()
        if self._failure is None:
            self.commit()

    def _work(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or bool(self._pending or self._records))
                if self._closed:
                    return
                self._wake.wait_for(
                    lambda: self._closed or self._pending_bytes >= self._max_bytes, timeout=self._max_seconds
                )
            try:
                self.commit()
            except BaseException as error:
                self._on_error(error)
                return
            with self._wake:
                self._wake.wait_for(lambda: self._closed, timeout=self._rest_s)


def units_record(units: list[DoneUnit]) -> Record:
    """The journal's record of finished units."""
    rows = [[unit.tensor, unit.start, unit.stop, unit.crc32c] for unit in units]
    return {"type": "units", "at": round(time.time(), 3), "units": rows}
