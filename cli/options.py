"""Options that several commands share, and how numbers are shown."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

import click

LEVELS = {0: logging.WARNING, 1: logging.INFO}
"""Level of the log by number of ``-v``; more is DEBUG."""

STOPPING = "stopping: the work under way is finished and kept; once more ends at once"
"""What the first Ctrl-C is answered with."""


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic for the type checker only
    """Writes to whatever ``sys.stderr`` is at that moment, which a progress bar may have replaced."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        """The current stderr."""
        return sys.stderr


def set_up_log(ctx: click.Context, param: click.Parameter, count: int) -> None:
    """Send the log to stderr, at the level that `count` times ``-v`` asks for."""
    log = logging.getLogger("mergepipe")
    if not any(isinstance(handler, StderrHandler) for handler in log.handlers):
        handler = StderrHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
    if count or ctx.parent is None:  # an earlier command of this process may have asked for more
        log.setLevel(LEVELS.get(count, logging.DEBUG))


def verbose_option() -> click.Option:
    """The option ``-v``, which stands before and after the command's name."""
    return click.Option(
        ["-v", "--verbose"],
        count=True,
        expose_value=False,
        callback=set_up_log,
        help="Log to stderr; -vv logs more.",
    )


work_option = click.option(
    "-w",
    "--work",
    type=click.Path(file_okay=False),
    default=".mergepipe",
    show_default=True,
    help="The workspace: plan, manifests and statistics.",
)

tensors_option = click.option(
    "--tensors",
    type=click.Choice(["union", "intersection"]),
    help="Merge tensors that not every model has from those that have them, or leave them out; else an error.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")


def print_json(value: object) -> None:
    """Print `value` on stdout as indented JSON."""
    click.echo(json.dumps(value, indent=2, allow_nan=False))


def show_bytes(count: float) -> str:
    """A number of bytes in the largest binary unit that it fills.

    Examples
    --------
    >>> show_bytes(0), show_bytes(1536), show_bytes(141 * 1024**3)
    ('0 bytes', '1.5 KiB', '141.0 GiB')
    """
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        size = 1024**power
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} bytes"


def show_count(count: int) -> str:
    """A number of parameters as people say it.

    Examples
    --------
    >>> show_count(950), show_count(582_000_000), show_count(70_553_706_496)
    ('950', '582.0 M', '70.6 B')
    """
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)


def show_shape(shape: tuple[int, ...]) -> str:
    """A shape as ``4096 x 14336``; a scalar's is ``scalar``.

    Examples
    --------
    >>> show_shape((4096, 14336)), show_shape((7,)), show_shape(())
    ('4096 x 14336', '7', 'scalar')
    """
    return " x ".join(map(str, shape)) or "scalar"


def show_seconds(seconds: float) -> str:
    """A duration in the two units that matter.

    Examples
    --------
    >>> show_seconds(0.25), show_seconds(42.3), show_seconds(754), show_seconds(7384)
    ('0.2 s', '42 s', '12 min 34 s', '2 h 03 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
