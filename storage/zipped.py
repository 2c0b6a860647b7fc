"""The directory of a zip file whose entries are stored as they are: names, and where in the file the bytes lie.

`torch.save` writes such files. The directory is input from strangers, so it is read within bounds, and what it says is
proved before anything uses it: nothing is compressed or encrypted, every entry lies inside the file, no two overlap.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

from mergepipe.errors import CheckpointError

MAX_DIRECTORY_BYTES = 64_000_000
"""Some 600,000 entries as torch names them."""

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
_FULL = 0xFFFFFFFF
_LONGEST_COMMENT = 65_535


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry: its bytes are `size` bytes from `offset` on, counted from the start of the file."""

    name: str
    offset: int
    size: int


def read_directory(fd: int, where: str | Path) -> tuple[dict[str, ZipEntry], bytes]:
    """Read and prove the directory of an open zip file.

    Parameters
    ----------
    fd : int
        Of a regular file; not closed.
    where : path
        The file, for messages.

    Returns
    -------
    dict of str to ZipEntry
        In the order of the directory.
    bytes
        The directory as it is in the file, from which a fingerprint can be made.

    Raises
    ------
    CheckpointError
        If it is no zip file, is cut off, or is anything else than the module's docstring says.
    """
    size = os.fstat(fd).st_size
    start, length, count = _find_directory(fd, size, where)
    if length > MAX_DIRECTORY_BYTES:
        raise CheckpointError(f"'{where}': a zip directory of {length:,} bytes, more than {MAX_DIRECTORY_BYTES:,}")
    if start + length > size:
        raise _cut_off(where, "its directory ends beyond the file")
    raw = _read(fd, start, length, where)
    entries: dict[str, ZipEntry] = {}
    position = 0
    try:
        for _ in range(count):
            entry, position = _parse_entry(fd, raw, position, where)
            if entry.name in entries:
                raise CheckpointError(f"'{where}': entry {entry.name[:200]!r} stands there twice")
            entries[entry.name] = entry
    except (struct.error, UnicodeDecodeError) as error:
        raise CheckpointError(f"'{where}': its zip directory is damaged ({error})") from error
    _check_places(entries, start, where)
    return entries, raw


def _find_directory(fd: int, size: int, where: str | Path) -> tuple[int, int, int]:
    """Where the directory starts, how long it is, and how many entries it has."""
    tail_start = max(0, size - _END.size - _LONGEST_COMMENT)
    tail = _read(fd, tail_start, size - tail_start, where)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + _END.size > len(tail):
        raise _cut_off(where, "a zip file ends with its directory, and this one has none")
    _, _, _, _, count, length, start, _ = _END.unpack_from(tail, at)
    locator = tail_start + at - _LOCATOR.size
    if _FULL in (length, start) or count == 0xFFFF:
        if locator < 0:
            raise _cut_off(where, "the large part of its directory is missing")
        magic, _, end64, _ = _LOCATOR.unpack(_read(fd, locator, _LOCATOR.size, where))
        if magic != b"PK\x06\x07" or end64 + _END64.size > size:
            raise _cut_off(where, "the large part of its directory is missing")
        found = _END64.unpack(_read(fd, end64, _END64.size, where))
        if found[0] != b"PK\x06\x06":
            raise _cut_off(where, "the large part of its directory is missing")
        count, length, start = found[7], found[8], found[9]
    return start, length, count


def _parse_entry(fd: int, raw: bytes, position: int, where: str | Path) -> tuple[ZipEntry, int]:
    fields = _CENTRAL.unpack_from(raw, position)
    magic, flags, method = fields[0], fields[3], fields[4]
    packed, size, name_length, extra_length, comment_length, header = *fields[8:13], fields[16]
    if magic != b"PK\x01\x02":
        raise CheckpointError(f"'{where}': its zip directory is damaged")
    begin = position + _CENTRAL.size
    name = raw[begin : begin + name_length].decode("utf-8")
    extra = raw[begin + name_length : begin + name_length + extra_length]
    if _FULL in (size, packed, header):
        size, packed, header = _large(extra, size, packed, header)
    if method != 0 or flags & 1 or size != packed:
        how = "encrypted" if flags & 1 else "compressed"
        raise CheckpointError(
            f"'{where}': entry {name[:200]!r} is {how}, so its bytes can't be read where they are: unpack it, and save "
            "the weights with torch.save or as safetensors"
        )
    local = LOCAL_HEADER.unpack(_read(fd, header, LOCAL_HEADER.size, where))
    if local[0] != b"PK\x03\x04":
        raise CheckpointError(f"'{where}': entry {name[:200]!r} is not where the zip directory says")
    offset = header + LOCAL_HEADER.size + local[9] + local[10]
    return ZipEntry(name, offset, size), begin + name_length + extra_length + comment_length


def _large(extra: bytes, *values: int) -> list[int]:
    """Sizes and offset of an entry, those that do not fit 32 bits taken from its extra field."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(numbers, value) if value == _FULL else value for value in values]
        position += 4 + length
    return list(values)


def _check_places(entries: dict[str, ZipEntry], end: int, where: str | Path) -> None:
    position, before = 0, "the start"
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < position:
            raise CheckpointError(f"'{where}': entries {before} and {entry.name[:200]!r} overlap")
        position, before = entry.offset + entry.size, repr(entry.name[:200])
    if position > end:
        raise _cut_off(where, f"entry {before} ends beyond the directory")


def _read(fd: int, offset: int, length: int, where: str | Path) -> bytes:
    try:
        raw = os.pread(fd, length, offset)
    except (OSError, OverflowError) as error:
        raise CheckpointError(f"'{where}': {length} bytes at {offset} can't be read: {error}") from error
    if len(raw) != length:
        raise _cut_off(where, f"it has no {length} bytes at {offset}")
    return raw


def _cut_off(where: str | Path, what: str) -> CheckpointError:
    return CheckpointError(f"'{where}' is cut off or no zip file: {what}. Download or copy it again")
