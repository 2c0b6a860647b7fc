"""`mergepipe run`: do what the plan says."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Literal

import click

from mergepipe.cli.options import STOPPING, json_option, print_json, show_bytes, show_seconds, work_option
from mergepipe.errors import Interrupted


@click.command("run")
@work_option
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Move the output, before work on it has begun; with --add the new output (by default OLD+MODEL).",
)
@click.option("--memory", metavar="SIZE", help="Ceiling of this run's memory; the plan's by default.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads that compute; by default one per processor, or as many as the ceiling has room for.",
)
@click.option(
    "--verify",
    type=click.Choice(["none", "sample", "full"]),
    default="sample",
    show_default=True,
    help="How much of an earlier run's work is read back before going on with it.",
)
@click.option(
    "--reader",
    type=click.Choice(["auto", "mmap", "direct"]),
    default="auto",
    show_default=True,
    help="Read inputs through the page cache, or past it; auto: past it where the filesystem allows, and from 8 GiB on "
    "whichever way reads a sample of them fastest.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where whole matrices are worked on (MDA and its relatives) and rows are scored (SCF-RKL).",
)
@click.option(
    "--add", metavar="MODEL", help="Add one more model to the finished merge, without reading those in it (opcm)."
)
@click.option("--restart", is_flag=True, help="Forget the work of earlier runs.")
@click.option(
    "--sha256",
    type=click.Choice(["auto", "no"]),
    default="auto",
    show_default=True,
    help="Record the SHA-256 of each output file, or leave it out.",
)
@click.option(
    "--on-shard",
    metavar="CMD",
    help="Shell command that takes over each complete output file, named by {path} in it.",
)
@click.option(
    "--diagnostics",
    is_flag=True,
    help="Read output and inputs again in the end: how norms, rows and directions have changed, what was kept.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@json_option
def command(
    work: str,
    out: str | None,
    memory: str | None,
    workers: int | None,
    device: str,
    reader: Literal["auto", "mmap", "direct"],
    verify: Literal["none", "sample", "full"],
    add: str | None,
    restart: bool,
    sha256: str,
    on_shard: str | None,
    diagnostics: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Carry out the plan, or go on with it.

    The first Ctrl-C finishes and keeps the work under way and says how to go on; the second ends it at once.

    \b
    Example:
      mergepipe run
      mergepipe run --memory 1GiB --workers 4
      mergepipe run --add ./another-expert
    """
    from mergepipe.pipeline.machine import one_blas_thread
    from mergepipe.storage.collector import imports_that_stay

    with one_blas_thread(), imports_that_stay():
        from mergepipe.cli.progress import progress
        from mergepipe.pipeline.run import run

    with stop_on_signal() as stop, progress(quiet, stop.is_set) as listener:
        if add is not None:
            from mergepipe.pipeline.add import add_model

            add_model(work, add, out=out, memory=memory, workers=workers, verify=verify, on_event=listener)
        result = run(
            work,
            out=None if add is not None else out,
            memory=memory,
            workers=workers,
            device=device,
            reader=reader,
            sha256=sha256 != "no",
            verify=verify,
            restart=restart,
            on_shard=on_shard,
            diagnostics=diagnostics,
            stop=stop,
            on_event=listener,
        )
    found = result.manifest
    if as_json:
        print_json({"output": str(result.output), "manifest": found})
        return
    click.echo(f"merged    {result.output}")
    click.echo(f"time      {show_seconds(found['seconds'])}")
    read, written = found["disk_bytes_read"], found["disk_bytes_written"]
    click.echo(f"disk      {show_bytes(read)} read, {show_bytes(written)} written")
    click.echo(f"memory    {show_bytes(found['peak_anonymous_bytes'])} at the peak")


@contextmanager
def stop_on_signal() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second ends the process there and then."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        # Straight to the descriptor: the signal may have come amidst a write to stderr. Nobody may be listening there.
        with suppress(OSError):
            if not stop.is_set():
                os.write(2, f"\n{STOPPING}\n".encode())
            elif os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the bars have hidden the cursor
        if stop.is_set():
            os._exit(Interrupted.exit_code)
        stop.set()

    previous = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in previous:
        signal.signal(each, on_signal)
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)
