"""An append-only log in which a record is a promise: what it says is durable.

    magic ┊ length · crc32c · payload ┊ length · crc32c · payload ┊ …

A record is made durable before `append` returns, so whoever writes it must have made durable first what it promises.
Reading stops at the first record that is short or does not match its checksum: a torn tail, left by a crash in the
middle of an append, is cut off, and so is everything behind a damaged record. Less is believed then, never something
false.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c

from mergepipe.errors import WorkspaceError
from mergepipe.storage.atomic import fsync_path, no_room_errors
from mergepipe.storage.ballast import Ballast

MAGIC = b"mergepipe journal 1\n"
_FRAME = struct.Struct("<II")
MAX_RECORD = 256 * 1024 * 1024
"""A longer record is damage."""

Record = dict[str, Any]


class Journal:
    """A journal open for appending. One process at a time, any of its threads.

    Parameters
    ----------
    path : Path
        Made if it does not exist.

    Attributes
    ----------
    records : list of dict
        What was in it when it was opened, in order.
    torn_bytes : int
        Length of the damaged tail that was cut off.
    ballast : Ballast or None
        Disk space set aside for what is appended, if there is any.

    Raises
    ------
    WorkspaceError
        If the file is no journal.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self.ballast: Ballast | None = None
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            data = _read_all(self._fd)
            if len(data) <= len(MAGIC) or not data.strip(b"\0"):
                data = data if data == MAGIC else b""  # nothing was ever promised; a power cut leaves zeros, too
            elif not data.startswith(MAGIC):
                raise WorkspaceError(
                    f"'{path}' is damaged at its very start, or no journal of mergepipe: drop the unfinished work with "
                    f"`mergepipe run --restart`"
                )
            self.records, end = parse(data)
            self.torn_bytes = len(data) - end
            with no_room_errors(path):
                if end < len(MAGIC):
                    self._write(MAGIC, 0)
                    end = len(MAGIC)
                os.ftruncate(self._fd, end)
                os.fsync(self._fd)
            self._end = end
            fsync_path(path.parent)
        except BaseException:
            os.close(self._fd)
            raise

    def append(self, records: Iterable[Record]) -> None:
        """Add records; they are durable when this returns.

        Raises
        ------
        DiskFullError
            If there is no room. What was there before stays valid.
        """
        data = b"".join(_framed(record) for record in records)
        if not data:
            return
        with self._lock, no_room_errors(self._path):
            if self.ballast is not None:
                self.ballast.spend(len(data))
            self._write(data, self._end)
            os.fdatasync(self._fd)
            self._end += len(data)

    def close(self) -> None:
        """Give the file descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, data: bytes, offset: int) -> None:
        view = memoryview(data)
        while len(view):
            written = os.pwrite(self._fd, view, offset)
            view, offset = view[written:], offset + written


def parse(data: bytes) -> tuple[list[Record], int]:
    """Records of a journal's bytes, and where the last good one ends; 0 if not even the magic is whole.

    Examples
    --------
    >>> whole = MAGIC + _framed({"a": 1}) + _framed({"b": 2})
    >>> parse(whole)[0], parse(whole[:-1])[0]
    ([{'a': 1}, {'b': 2}], [{'a': 1}])
    """
    if not data.startswith(MAGIC):
        return [], 0
    records = []
    at = len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        payload = data[at + _FRAME.size : at + _FRAME.size + length]
        if length > MAX_RECORD or len(payload) < length or google_crc32c.value(payload) != checksum:
            break
        try:
            record = json.loads(payload)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict):
            break
        records.append(record)
        at += _FRAME.size + length
    return records, at


def read_journal(path: Path) -> list[Record]:
    """Records of a journal, without opening it for writing; none if there is no such file."""
    try:
        return parse(path.read_bytes())[0]
    except FileNotFoundError:
        return []


def _framed(record: Record) -> bytes:
    payload = json.dumps(record, separators=(",", ":")).encode()
    return _FRAME.pack(len(payload), google_crc32c.value(payload)) + payload


def _read_all(fd: int) -> bytes:
    with os.fdopen(os.dup(fd), "rb") as file:
        file.seek(0)
        return file.read()
