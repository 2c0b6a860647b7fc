"""The bars on a terminal; apart from the rest because of what rich takes to import."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.text import Text

from mergepipe.cli.options import STOPPING


class Bars(Progress):
    """Bars with bytes, rate and time left, and one line of text below them.

    Parameters
    ----------
    console : rich.console.Console, optional
        stderr by default.
    stopping : callable
        Whether the user has asked for the end; the line says what happens then.
    """

    def __init__(self, console: Console | None = None, stopping: Callable[[], bool] = lambda: False) -> None:
        self._line = ""
        self._stopping = stopping
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=console or Console(stderr=True),
        )

    def tell(self, line: str) -> None:
        """Put another line below the bars; what does not fit the width is cut off."""
        self._line = line

    def get_renderables(self) -> Iterable[RenderableType]:
        """What is drawn: the bars, and the line."""
        yield from super().get_renderables()
        line = STOPPING if self._stopping() else self._line
        if line:
            yield Text(line, no_wrap=True, overflow="ellipsis")
