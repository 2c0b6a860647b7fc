"""Files that appear whole or not at all, and that are still there after a power cut."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from mergepipe.storage.file_errors import NO_ROOM, disk_full, named

COPIED_AT_ONCE = 1 << 20


@contextmanager
def no_room_errors(path: str | Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into :class:`DiskFullError`.

    Parameters
    ----------
    path : path-like
        What is being written; the message names it, and any other error of the system does.

    Raises
    ------
    DiskFullError
    """
    try:
        with named(path):
            yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise disk_full(path, error) from error


def fsync_path(path: str | Path) -> None:
    """Make a file's bytes, or a folder's entries, durable."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with named(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that lack, each durable in the one that it lies in.

    One that is there may have been made by a process that died before it was durable.
    """
    lacking = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(lacking or [folder]):
        with suppress(PermissionError):  # a folder of others, whose entries may not be read
            fsync_path(path.parent)


def temporary_of(name: str) -> str | None:
    """The file that a temporary sibling called `name` was to become; None if it is no such sibling.

    Examples
    --------
    >>> temporary_of(".config.json.4711.tmp"), temporary_of("config.json")
    ('config.json', None)
    """
    match = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
    return match[1] if match else None


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a small file so that a reader sees the old contents or the new, never a part.

    The bytes go to a temporary sibling, are synced, and the sibling takes the name in one step; then the folder is
    synced, because a rename that only memory knows of is undone by a power cut. A process killed halfway leaves the
    temporary sibling (``.NAME.PID.tmp``) and the old file.

    Parameters
    ----------
    path : path-like
        Its folder must exist.
    data : bytes
        The whole contents.

    Raises
    ------
    DiskFullError
        If there is no room; the old file stays.
    OSError
        For anything else the filesystem says.
    """
    _replace(Path(path), lambda file: file.write(data))


def copy_atomic(source: str | Path, path: str | Path) -> None:
    """Copy the bytes of a file, a piece at a time, as :func:`write_atomic` writes them; raises likewise."""
    with open(source, "rb") as original:
        _replace(Path(path), lambda file: shutil.copyfileobj(original, file, COPIED_AT_ONCE))


def _replace(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with no_room_errors(path):
        try:
            with open(temporary, "wb") as file:
                fill(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        fsync_path(path.parent)
