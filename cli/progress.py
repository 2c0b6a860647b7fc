"""Shows the events of a build or a run on stderr: bars on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from mergepipe.cli.options import show_bytes, show_seconds
from mergepipe.pipeline.events import CopyProgress, Event, Listener, Note, RunStarted, ShardSealed, UnitFinished

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MERGING = "merging"


class PlainProgress:
    """A listener that writes lines.

    Parameters
    ----------
    out : TextIO
        Where to; stderr in practice.
    every_s : float
        Seconds between two lines about how far the work is. Notes and finished shards are told at once.
    clock : callable
        Seconds from any start; tests own it.

    Examples
    --------
    >>> ticks = iter(range(0, 100, 10))
    >>> show = PlainProgress(sys.stdout, every_s=5, clock=lambda: next(ticks))
    >>> show(RunStarted(total_bytes=4096, tensors=2))
    merging 2 tensors, 4.0 KiB to read and write
    >>> show(UnitFinished("a", "apply", 1024))
    merging  25 %, 1.0 KiB of 4.0 KiB, 102 bytes/s, 30 s left
    >>> show(ShardSealed("model.safetensors", 2048))
    model.safetensors is complete, 2.0 KiB
    """

    def __init__(self, out: TextIO, every_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._every_s = every_s
        self._clock = clock
        self._what = ""
        self._before = self._done = self._total = 0
        self._started = self._told = 0.0

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunStarted(total, tensors, done):
                self._begin(MERGING, total, done)
                self._say(f"{MERGING} {tensors} tensors, {show_bytes(total)} to read and write")
            case UnitFinished():
                self._advance(event.nbytes)
            case CopyProgress(model, nbytes, total):
                if self._what != f"copying {model}":
                    self._begin(f"copying {model}", total)
                self._advance(nbytes)
            case ShardSealed(file, nbytes):
                self._say(f"{file} is complete, {show_bytes(nbytes)}")
            case Note(text):
                self._say(f"note: {text}")

    def _begin(self, what: str, total: int, done: int = 0) -> None:
        self._what, self._total = what, total
        self._before = self._done = done
        self._started = self._told = self._clock()

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        now = self._clock()
        if now - self._told < self._every_s:
            return
        self._told = now
        rate = (self._done - self._before) / (now - self._started)
        percent = 100 * self._done // max(self._total, 1)
        left = show_seconds((self._total - self._done) / rate) if rate else "unknown time"
        amount = f"{show_bytes(self._done)} of {show_bytes(self._total)}"
        self._say(f"{self._what} {percent:3d} %, {amount}, {show_bytes(rate)}/s, {left} left")

    def _say(self, line: str) -> None:
        print(line, file=self._out, flush=True)


class BarProgress:
    """A listener that moves the bars of a rich `Progress`, which the caller starts and stops."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunStarted(total, _, done):
                self._bars[MERGING] = self._progress.add_task(MERGING, total=total, completed=done)
            case UnitFinished() if MERGING in self._bars:
                self._progress.advance(self._bars[MERGING], event.nbytes)
            case CopyProgress(model, nbytes, total):
                if model not in self._bars:
                    self._bars[model] = self._progress.add_task(f"copying {model}", total=total)
                self._progress.advance(self._bars[model], nbytes)
            case ShardSealed(file, nbytes):
                self._progress.console.print(f"{file} is complete, {show_bytes(nbytes)}", markup=False, highlight=False)
            case Note(text):
                self._progress.console.print(f"note: {text}", markup=False, highlight=False)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Listener | None]:
    """A listener for stderr, as the terminal allows; None if `quiet`."""
    if quiet:
        yield None
    elif not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
    else:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.progress import TransferSpeedColumn as SpeedColumn

        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            SpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bars:
            yield BarProgress(bars)
