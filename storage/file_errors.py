"""What an error of the file system means to the user: the one place where an OSError becomes an error of mergepipe.

Which error it becomes is decided by what the file is. What is read for a merge is a checkpoint; everything else that we
open is an output, a workspace, or the way to one of them. Errors that say nothing of a file or a disk (a bad
descriptor, an invalid argument) are bugs of ours and stay what they are.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from mergepipe.errors import (
    BudgetError,
    CheckpointError,
    CheckpointNotFoundError,
    DiskError,
    DiskFullError,
    InTheWayError,
    MemoryBudgetError,
    MergepipeError,
)

logger = logging.getLogger(__name__)

NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The disk, a quota or a limit on sizes is exhausted."""

_FAILING = frozenset({errno.EIO, errno.EROFS})
"""A disk fails, or went read-only; where no file is named, too."""

_GONE = frozenset(
    {
        errno.ESTALE,
        errno.ENODEV,
        errno.ENXIO,
        errno.ENOTCONN,
        errno.ECONNABORTED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
    }
)
"""What a mount that was lost says of a file."""

_REMEDIES = {
    errno.EACCES: "give this user the right to it, or choose another path",
    errno.EPERM: "give this user the right to it, or choose another path",
    errno.ENOENT: "bring it back, or choose another path",
    errno.ENOTDIR: "a file stands where that path has a folder: choose another path",
    errno.EISDIR: "a folder stands where a file belongs: move it away",
    errno.EEXIST: "something else stands there: move it away",
    errno.ENOTEMPTY: "something else lies in it: move that away",
    errno.ENAMETOOLONG: "the file system has no names so long: choose a shorter one",
    errno.ELOOP: "its links lead in a circle: choose the path that they should lead to",
    errno.EBUSY: "something else uses it: end that, then run again",
    errno.ETXTBSY: "something else uses it: end that, then run again",
}


@contextmanager
def explained(inputs: Iterable[str | os.PathLike[str]] = ()) -> Iterator[None]:
    """Raise the error of mergepipe that an OSError stands for, where it stands for one.

    Parameters
    ----------
    inputs : iterable of path-like
        Files and folders that are read for a merge.

    Raises
    ------
    MergepipeError
        As :func:`explain` says.

    Examples
    --------
    >>> with explained():
    ...     open("/dev/null/merged")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    mergepipe.errors.InTheWayError: '/dev/null/merged': Not a directory: a file stands where that path has a ...
    """
    try:
        yield
    except OSError as error:
        told = explain(error, inputs)
        if told is None:
            raise
        logger.debug("an error of the file system", exc_info=error)
        for note in getattr(error, "__notes__", ()):
            told.add_note(note)
        raise told from error


@contextmanager
def named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Say in an OSError which file it is about, where the system does not: it names none of those already open."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def explain(error: OSError, inputs: Iterable[str | os.PathLike[str]] = ()) -> MergepipeError | None:
    """The error of mergepipe that an OSError stands for.

    Parameters
    ----------
    error : OSError
    inputs : iterable of path-like
        Files and folders that are read for a merge.

    Returns
    -------
    MergepipeError or None
        :class:`CheckpointError` for a file of `inputs`; of other files, :class:`DiskError` if their disk is full, fails
        or is gone, and :class:`InTheWayError` if something is in the way; :class:`BudgetError` if the system has no
        memory or descriptors left. None if it is one of these already, or no error of a file: a bug.
    """
    if isinstance(error, MergepipeError):
        return None
    code, said = error.errno, error.strerror or str(error)
    if code in (errno.EMFILE, errno.ENFILE):
        return BudgetError(f"no more files can be open at once ({said}): allow more (`ulimit -n 4096`) and run again")
    if code == errno.ENOMEM:
        return MemoryBudgetError(f"the system has no memory left ({said}): end other programs, or lower --memory")
    path = None if isinstance(error.filename, int) or error.filename is None else os.fsdecode(error.filename)
    if path is None:
        return _without_name(code, said)
    if _is_in(path, inputs):
        if code == errno.ENOENT:
            return CheckpointNotFoundError(f"'{path}' can't be read: {said}: bring it back, or name another")
        if code in _FAILING | _GONE:
            return CheckpointError(f"'{path}' can't be read: {said}: mend or mount its disk, then run again")
        return CheckpointError(f"'{path}' can't be read: {said}: {_REMEDIES[code]}") if code in _REMEDIES else None
    if code in NO_ROOM:
        return disk_full(path, error)
    if code in _FAILING | _GONE:
        return DiskError(f"'{path}': {said}: mend or mount its disk and run again, or choose another folder")
    return InTheWayError(f"'{path}': {said}: {_REMEDIES[code]}") if code in _REMEDIES else None


def disk_full(path: str | os.PathLike[str], error: OSError) -> DiskFullError:
    """The error for a file that there is no room for."""
    said = error.strerror or str(error)
    return DiskFullError(f"no room to write '{os.fspath(path)}': {said}. Free space there, or choose another folder")


def _without_name(code: int | None, said: str) -> MergepipeError | None:
    if code in NO_ROOM:
        return DiskFullError(f"no room on the disk: {said}. Free space there and run again")
    if code in _FAILING:
        return DiskError(f"a disk fails: {said}: mend it and run again")
    if code in (errno.ENOENT, errno.EACCES) and not _has_current_folder():
        return InTheWayError(f"the current folder is gone, or can't be read: {said}: change into another one")
    return None


def _has_current_folder() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _is_in(path: str, folders: Iterable[str | os.PathLike[str]]) -> bool:
    path = os.path.abspath(path)
    tops = (os.path.abspath(folder) for folder in folders)
    return any(path == top or path.startswith(f"{top}/") for top in tops)
