"""Shows the events of a build or a run on stderr: bars on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from mergepipe.cli.options import show_bytes, show_seconds
from mergepipe.pipeline.events import (
    CopyProgress,
    DownloadProgress,
    Event,
    Listener,
    Note,
    RunStarted,
    ShardSealed,
    UnitFinished,
)
from mergepipe.pipeline.measure import anonymous_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

MERGING = "merging"

LINES_TOLD = 20
LONGEST_PAUSE_S = 60.0
"""A plain line comes when another twentieth of the time so far has gone by, or a minute."""

LOOK_EVERY_S = 0.25
"""How often memory is looked at for the bars."""


class PlainProgress:
    """A listener that writes lines.

    Parameters
    ----------
    out : TextIO
        Where to; stderr in practice.
    every_s : float
        Seconds between two lines about how far the work is; more as the job gets longer, up to a minute. Notes and
        finished shards are told at once.
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
            case CopyProgress(model, nbytes, total) | DownloadProgress(model, nbytes, total):
                what = f"{'copying' if isinstance(event, CopyProgress) else 'downloading'} {model}"
                if self._what != what:
                    self._begin(what, total)
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
        if now - self._told < max(self._every_s, min(LONGEST_PAUSE_S, (now - self._started) / LINES_TOLD)):
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
    """A listener that moves the bars of a rich `Progress`, which the caller starts and stops.

    Parameters
    ----------
    progress : rich.progress.Progress
    tell : callable
        Takes the line below the bars: the tensor at work, and the memory taken of that allowed.
    clock : callable
        Seconds from any start; tests own it.
    """

    def __init__(
        self, progress: Progress, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._progress = progress
        self._tell = tell
        self._clock = clock
        self._bars: dict[str, TaskID] = {}
        self._allowed = 0
        self._told = -LOOK_EVERY_S

    def __call__(self, event: Event) -> None:
        """Take one event."""
        match event:
            case RunStarted(total, _, done, allowed):
                self._allowed = allowed
                self._bars[MERGING] = self._progress.add_task(MERGING, total=total, completed=done)
            case UnitFinished(tensor, stage, nbytes) if MERGING in self._bars:
                self._progress.advance(self._bars[MERGING], nbytes)
                self._look(f"{tensor} ({stage})")
            case CopyProgress(model, nbytes, total) | DownloadProgress(model, nbytes, total):
                what = f"{'copying' if isinstance(event, CopyProgress) else 'downloading'} {model}"
                if what not in self._bars:
                    self._bars[what] = self._progress.add_task(what, total=total)
                self._progress.advance(self._bars[what], nbytes)
            case ShardSealed(file, nbytes):
                self._progress.console.print(f"{file} is complete, {show_bytes(nbytes)}", markup=False, highlight=False)
            case Note(text):
                self._progress.console.print(f"note: {text}", markup=False, highlight=False)

    def _look(self, what: str) -> None:
        now = self._clock()
        if now - self._told >= LOOK_EVERY_S:
            self._told = now
            self._tell(f"memory {show_bytes(anonymous_bytes())} of {show_bytes(self._allowed)}, {what}")


@contextmanager
def progress(quiet: bool = False, stopping: Callable[[], bool] = lambda: False) -> Iterator[Listener | None]:
    """A listener for stderr, as the terminal allows; None if `quiet`. The bars say so once `stopping` is true."""
    if quiet or sys.stderr is None:
        yield None
    elif not sys.stderr.isatty():
        yield PlainProgress(sys.stderr)
    else:
        from mergepipe.cli.bars import Bars

        bars = Bars(stopping=stopping)
        bars.start()
        try:
            yield BarProgress(bars, bars.tell)
        finally:
            with suppress(OSError):  # a terminal that has gone away is no reason to lose the result
                bars.stop()
