"""The command `mergepipe`: finds the commands, turns errors into messages and exit codes, sets up the log."""

from __future__ import annotations

import gc
import os
import select
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import TextIO

import click

import mergepipe
from mergepipe.cli.options import verbose_option
from mergepipe.errors import Interrupted, MergepipeError, UsageError
from mergepipe.storage.file_errors import explained

COMMANDS = {
    "init": "mergepipe.cli.init",
    "build": "mergepipe.cli.build",
    "check": "mergepipe.cli.check",
    "run": "mergepipe.cli.run",
    "plan": "mergepipe.cli.plan",
    "status": "mergepipe.cli.status",
    "verify": "mergepipe.cli.verify",
    "clean": "mergepipe.cli.clean",
    "inspect": "mergepipe.cli.inspect",
    "methods": "mergepipe.cli.methods",
    "materialize": "mergepipe.cli.materialize",
    "stability": "mergepipe.cli.stability",
    "lora-extract": "mergepipe.cli.lora_extract",
    "demo": "mergepipe.cli.demo",
}
"""Command to the module whose `command` it is, in the order of the help."""

OBJECTS_BETWEEN_COLLECTIONS = 50_000
"""What imports and plans make stays: looking through it for cycles every 700 objects took a tenth of a start."""


class LazyGroup(click.Group):
    """A group that imports the module of a command when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all commands, as the help lists them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command `cmd_name`, with ``-v`` among its options, or None."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        if not any(option.name == "verbose" for option in command.params):
            command.params.append(verbose_option())
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` start with; an unknown one is answered with the nearest names."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            near = get_close_matches(args[0], COMMANDS)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No such command '{args[0]}'. {hint}", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; turn what it raises on purpose into a message and an exit code.

        This has to happen inside of click, which takes any EOFError (such as our ShortReadError) for an interruption
        and any broken pipe for a failure.
        """
        try:
            with explained():
                return super().invoke(ctx)
        except MergepipeError as error:
            show_error(error)
            ctx.exit(error.exit_code)
        except UnicodeEncodeError as error:
            if error.encoding == "utf-8":
                raise
            text = f"'{error.object}' has no name in the encoding of this locale, {error.encoding}: use one of UTF-8"
            show_error(UsageError(f"{text}, or set PYTHONUTF8=1"))
            ctx.exit(UsageError.exit_code)
        except BrokenPipeError as error:
            # Whoever read our stdout has seen enough (`mergepipe plan | head`): results are printed after the work.
            if not reader_has_gone(sys.stdout):
                raise RuntimeError("a pipe of our own broke, so the work is not done") from error
            # Python flushes it once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)


@click.command(
    cls=LazyGroup,
    params=[verbose_option()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 a bug, 2 usage, 3 recipe, 4 checkpoint, 5 memory or disk, "
    "6 something in the way or changed, 7 damage found, 130 interrupted.",
)
@click.version_option(mergepipe.__version__, prog_name="mergepipe")
def group() -> None:
    """Merge large model checkpoints out of core.

    Two commands are a merge: `build` checks everything and writes a plan, `run` does what the plan says.

    \b
    Example:
      mergepipe init --method ties     # writes mergepipe.yaml: fill in your models
      mergepipe build && mergepipe run
    """


def show_error(error: BaseException) -> None:
    """Print `error` on stderr as ``error: message``, its notes and nothing else; where nobody reads it, nothing."""
    lines = str(error).splitlines() or [type(error).__name__]
    with suppress(OSError):
        click.echo("error: " + "\n       ".join(lines), err=True)
        for note in getattr(error, "__notes__", ()):
            click.echo(f"       {note}", err=True)


def reader_has_gone(stream: TextIO) -> bool:
    """Whether nobody reads the pipe that a stream writes to."""
    watch = select.poll()
    watch.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watch.poll(0))


def open_standard_streams() -> None:
    """Give a process that was started without them (``2>&-``) streams that lead nowhere.

    Otherwise the next file that is opened gets the number 2, and whatever libraries say on stderr is written into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in the order of their numbers
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the process ends


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    args : sequence of str, optional
        The arguments without the program's name; those of the process by default.

    Returns
    -------
    int
        The exit code: that of the error's class for errors of mergepipe, whose message goes to stderr; 1 with a
        traceback for everything unforeseen.

    Examples
    --------
    >>> main(["methods", "--help"])  # doctest: +ELLIPSIS
    Usage: mergepipe methods ...
    0
    """
    try:
        outcome = group.main(args=args, prog_name="mergepipe", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        return MergepipeError.exit_code
    return outcome if isinstance(outcome, int) else 0


def start() -> None:
    """Run the command line as a process of its own, and end the process.

    It ends at once: nothing is left to do, and taking numba and its compiled kernels apart, object by object, took
    half a second. Threads that write have been joined by whoever began them.
    """
    open_standard_streams()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    code = main()
    with suppress(OSError):
        sys.stderr.flush()
    with suppress(OSError):
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)  # what can't be written is for Python to report
