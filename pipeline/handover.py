"""Handing complete shards over to a command of the user's: upload them, move them to another disk.

The command runs once a shard is complete under its final name; when it succeeds, the journal says so, and the shard is
neither read nor expected to be there again. It may run twice for the same shard, if the process dies between its end
and the record of it, or before its end: a killed process leaves its command at work, and the next run may call it
again beside that one. A shard that is gone by then is made again, and comes a second time with the same bytes.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

from mergepipe.errors import HandOverError, UsageError
from mergepipe.storage.journal import Record

PLACE = "{path}"
SHARDS_OPEN = 3
"""Unfinished shards that may take up disk space at once: two being filled, one being sealed and handed over."""


PIECE_BYTES = 64 * 1024
TAIL_BYTES = 4096
"""What is kept of what the command says: the end, however much it is."""


def check_command(command: str) -> None:
    """Refuse a command that would not learn which file it is for.

    Raises
    ------
    UsageError
    """
    if PLACE not in command:
        raise UsageError(f"the command '{command}' does not say where the file's path goes: write {PLACE} there")


def hand_over(command: str, path: Path) -> None:
    """Run a command for a complete shard, and wait for it.

    Parameters
    ----------
    command : str
        For the shell; `{path}` is replaced by the quoted path.
    path : Path

    Raises
    ------
    HandOverError
        If it fails; names its exit code and the end of what it said.

    Examples
    --------
    >>> hand_over("test -d {path}", Path("/"))
    """
    line = command.replace(PLACE, shlex.quote(str(path)))
    # A session of its own: the Ctrl-C that stops the run must not hit an upload in the middle.
    with subprocess.Popen(
        line,
        shell=True,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None, "it was asked for"
        tail = b""
        while data := os.read(process.stdout.fileno(), PIECE_BYTES):
            tail = (tail + data)[-TAIL_BYTES:]
    if process.returncode:
        said = tail.decode("utf-8", "replace").strip()[-500:]
        raise HandOverError(
            f"`{line}` failed with exit code {process.returncode}{': ' + said if said else ''}. The shard is complete "
            f"and kept: mend the command and run again"
        )


def handed_record(shard: int) -> Record:
    """The journal's record that a shard is in other hands."""
    return {"type": "handed", "shard": shard}
