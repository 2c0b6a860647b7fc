"""The event log of a workspace: `events.jsonl`, one JSON object a line, for programs that watch a long job.

Every line has `at` (seconds since 1970), `event` and that event's fields. Units are too many to be told one by one: a
`Progress` line every few seconds sums them up. Lines are written at once and never synced; they promise nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mergepipe.pipeline.events import Announcer, CopyProgress, Event, Listener, RunStarted, UnitFinished
from mergepipe.pipeline.measure import anonymous_bytes

PROGRESS_SECONDS = 5.0
TAIL_BYTES = 64 * 1024


def last_failure(path: Path) -> str | None:
    """What ended the latest run, if that was an error and no request to stop; None where the log does not say."""
    line = next(_latest(path), {})
    if line.get("event") != "Stopped" or line.get("kind") == "Interrupted":
        return None
    return str(line.get("reason"))


def last_progress(path: Path) -> tuple[int, int] | None:
    """Bytes that the latest run has read and written in all its sweeps, and those it is to; None if it does not say."""
    for line in _latest(path):
        done, total = line.get("done_bytes"), line.get("total_bytes")
        if line.get("event") in ("Progress", "RunStarted") and isinstance(done, int) and isinstance(total, int):
            return done, total
    return None


def _latest(path: Path) -> Iterator[dict[str, Any]]:
    """The last lines of a log, the latest first; up to one that can't be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            for text in reversed(file.read().splitlines()):
                line = json.loads(text)
                if not isinstance(line, dict):
                    return
                yield line
    except (OSError, ValueError):
        return


class EventLog:
    """A listener that appends to a file; errors of the disk are none of the job's business and are swallowed.

    Parameters
    ----------
    path : Path
    also : callable, optional
        Another listener, told of every event after it is logged.
    clock : callable
        Seconds since 1970; tests own it.
    """

    def __init__(self, path: Path, also: Listener | None = None, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._also = Announcer(also)  # it may fail and the log go on
        self._clock = clock
        self._fd = -1
        self._done = self._total = 0
        self._tensor = ""
        self._told = clock()

    def __enter__(self) -> Self:
        with contextlib.suppress(OSError):
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._line("Stopped", {"kind": type(error).__name__, "reason": str(error)})
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case UnitFinished(tensor, _, nbytes):
                self._done += nbytes
                self._tensor = tensor
                self._progress()
            case CopyProgress(model, nbytes, total):
                self._done, self._total, self._tensor = self._done + nbytes, total, model
                self._progress()
            case _:
                if isinstance(event, RunStarted):
                    self._done, self._total = event.done_bytes, event.total_bytes
                self._line(type(event).__name__, asdict(event))
        self._also(event)

    def _progress(self) -> None:
        if self._clock() - self._told < PROGRESS_SECONDS:
            return
        self._told = self._clock()
        fields = {"done_bytes": self._done, "total_bytes": self._total, "tensor": self._tensor}
        self._line("Progress", {**fields, "anonymous_bytes": anonymous_bytes()})

    def _line(self, event: str, fields: dict[str, Any]) -> None:
        if self._fd >= 0:
            line = json.dumps({"at": round(self._clock(), 3), "event": event, **fields})
            with contextlib.suppress(OSError):
                os.write(self._fd, line.encode() + b"\n")
