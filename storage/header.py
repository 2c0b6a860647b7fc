"""Safetensors headers, proved valid before anything is read through them.

A safetensors file is 8 bytes (the length of the header, little-endian), the header (JSON) and the data. The header is
input from strangers: it says where to read and how much memory that takes. :func:`parse_header` proves, in one place,
everything that later code relies on: offsets are contiguous from zero, without hole, overlap or trailing bytes; every
range is as long as its shape and type say; no product overflows; names are unique and can be paths in a zarr hierarchy.
A :class:`Header` that exists is valid.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, HeaderError
from mergepipe.storage.dtypes import DTYPES

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""

MAX_JSON_TOKENS = 2_000_000
"""Commas and opening brackets in one JSON text. A tensor takes eight or so, so this is 250,000 tensors in one file; it
bounds what parsing takes to some 250 MB beside the text (a list of empty lists is twenty times as large in memory)."""

MAX_DIMENSIONS = 32
"""What every numpy can represent."""

_INT64_MAX = 2**63 - 1


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a header.

    Attributes
    ----------
    name : str
    dtype : str
        Safetensors name of the type, a key of `DTYPES`.
    shape : tuple of int
    start, stop : int
        Byte range, counted from the start of the data section.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """A valid header.

    Attributes
    ----------
    tensors : tuple of HeaderTensor
        In the order of their bytes in the file.
    metadata : dict of str to str
        The ``__metadata__`` entry; empty if there is none.
    data_start : int
        Where in the file the data section starts.
    sha256 : str
        Hex digest of the header's JSON, a cheap fingerprint of the file's layout.
    """

    tensors: tuple[HeaderTensor, ...]
    metadata: dict[str, str]
    data_start: int
    sha256: str


def open_regular(path: str | Path) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes.

    A symbolic link is followed. Opening never waits: a named pipe in the place of a shard is an error, not a hang.

    Raises
    ------
    CheckpointNotFoundError
        If there is nothing.
    CheckpointError
        If it is not a regular file, or may not be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"'{path}' is not a regular file: expected a file or a link to one")
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"'{path}' does not exist, or is a link to nothing") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # no fault of the file
        raise CheckpointError(f"'{path}' can't be opened: {error.strerror}") from error
    # Asked again of the descriptor, because the name may point to something else by now.
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"'{path}' is not a regular file: expected a file or a link to one")
    return fd


def parse_json_object(
    raw: bytes, where: str, kind: type[CheckpointError] = HeaderError, *, strict: bool = True
) -> dict[str, Any]:
    """Parse a JSON object from a stranger within bounded memory and stack.

    Parameters
    ----------
    raw : bytes
        UTF-8.
    where : str
        Begins the message of an error.
    kind : type
        The error to raise.
    strict : bool, default True
        Refuse duplicate keys and the constants NaN and Infinity, which JSON does not have.

    Returns
    -------
    dict

    Raises
    ------
    CheckpointError
        Of the given `kind`, if it is anything else than one well-formed object of sane size.

    Examples
    --------
    >>> parse_json_object(b'{"a": 1}', "example")
    {'a': 1}
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise kind(f"{where}: key {twice[:200]!r} stands there twice")
        return found

    def refuse(constant: str) -> float:
        raise kind(f"{where}: {constant} is not JSON")

    tokens = raw.count(b",") + raw.count(b"[") + raw.count(b"{")
    if tokens > MAX_JSON_TOKENS:
        raise kind(f"{where}: {tokens:,} commas and brackets in one JSON text; at most {MAX_JSON_TOKENS:,} are read")
    hooks: dict[str, Any] = {"object_pairs_hook": unique, "parse_constant": refuse} if strict else {}
    try:
        value = json.loads(raw.decode("utf-8"), **hooks)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, an integer of 10,000 digits, or nested deeply
        raise kind(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise kind(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")


def check_name(name: str, where: str) -> None:
    """Refuse tensor names that can't be paths of a zarr hierarchy, or could lead out of one.

    Raises
    ------
    HeaderError
        If `name` is empty, longer than file systems allow, holds control characters, backslashes or lone surrogates,
        or has a path segment that is empty, ".", ".." or "zarr.json".
    """
    # Nearly all names are of this kind, and a large mixture of experts has 45,000 of them.
    if len(name) <= 255 and _PLAIN_NAME.fullmatch(name) and name not in {".", "..", "zarr.json"}:
        return
    problem = ""
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in name):
        problem = "holds control characters or lone surrogates"
    elif "\\" in name:
        problem = "holds a backslash"
    elif any(segment in {"", ".", "..", "zarr.json"} for segment in name.split("/")):
        problem = "has a path segment that is empty, '.', '..' or 'zarr.json'"
    elif len(name.encode()) > 1000 or any(len(segment.encode()) > 255 for segment in name.split("/")):
        problem = "is longer than 1,000 bytes, or has a path segment longer than 255"
    if problem:
        raise HeaderError(f"{where}: tensor name {name[:200]!r} {problem}; such a name can't be a path in a zarr store")


def tensor_bytes(dtype: str, shape: Sequence[int], where: str) -> int:
    """Bytes that a tensor takes.

    Raises
    ------
    HeaderError
        If the type is unknown, or a dimension or the product is negative or does not fit 63 bits (zero dimensions left
        out, since numpy and zarr refuse those products too).

    Examples
    --------
    >>> tensor_bytes("BF16", (3, 5), "example")
    30
    """
    if dtype not in DTYPES:
        raise HeaderError(f"{where}: unknown dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if len(shape) > MAX_DIMENSIONS:
        raise HeaderError(f"{where}: {len(shape)} dimensions; at most {MAX_DIMENSIONS} are possible")
    product = DTYPES[dtype].itemsize
    for dimension in shape:
        if not 0 <= dimension <= _INT64_MAX:
            raise HeaderError(f"{where}: dimension {dimension} is outside 0 to 2^63 - 1")
        product *= dimension or 1
        if product > _INT64_MAX:
            raise HeaderError(f"{where}: shape {tuple(shape)} overflows 63 bits")
    return 0 if 0 in shape else product


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Prove a header valid.

    Parameters
    ----------
    raw : bytes
        The JSON alone, without the eight bytes of its length.
    file_size : int
        Length of the whole file.
    where : str
        The file, for messages.

    Returns
    -------
    Header

    Raises
    ------
    HeaderError
        If anything at all is not as the module's docstring says.

    Examples
    --------
    >>> raw = b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}'
    >>> parse_header(raw, 8 + len(raw) + 8, "example").tensors[0].shape
    (2,)
    """
    if raw[:1] != b"{":
        raise HeaderError(f"{where}: the header starts with {raw[:1]!r}, not with '{{'; is it a safetensors file?")
    entries = parse_json_object(raw, f"{where}: header")
    metadata = _parse_metadata(entries.pop("__metadata__", {}), where)
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    tensors = [_parse_tensor(name, entry, where, sizes) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.start, t.stop))
    data_start = 8 + len(raw)
    _check_contiguous(tensors, file_size - data_start, where)
    return Header(tuple(tensors), metadata, data_start, hashlib.sha256(raw).hexdigest())


def _parse_metadata(metadata: Any, where: str) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError(f"{where}: __metadata__ is not a map from text to text")
    return metadata


def _parse_tensor(name: str, entry: Any, where: str, sizes: dict[tuple[str, tuple[int, ...]], int]) -> HeaderTensor:
    """One proven entry; `sizes` keeps what tensors of a type and shape take, of which there are few."""
    check_name(name, where)
    here = f"{where}: tensor {name[:200]!r}"
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise HeaderError(f"{here}: expected exactly the keys dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise HeaderError(f"{here}: dtype is not text")
    if not _is_integers(shape):
        raise HeaderError(f"{here}: shape is not a list of integers")
    if not _is_integers(offsets) or len(offsets) != 2:
        raise HeaderError(f"{here}: data_offsets is not a pair of integers")
    start, stop = offsets
    if not 0 <= start <= stop <= _INT64_MAX:
        raise HeaderError(f"{here}: data_offsets {offsets} do not satisfy 0 <= begin <= end < 2^63")
    dimensions = tuple(shape)
    nbytes = sizes.get((dtype, dimensions))
    if nbytes is None:
        nbytes = sizes[dtype, dimensions] = tensor_bytes(dtype, shape, here)
    if stop - start != nbytes:
        raise HeaderError(f"{here}: {dtype} of shape {dimensions} takes {nbytes} bytes, its range {stop - start}")
    return HeaderTensor(name, dtype, dimensions, start, stop)


def _is_integers(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int}  # a bool is an int, but no dimension


def _check_contiguous(tensors: Iterable[HeaderTensor], data_bytes: int, where: str) -> None:
    position, before = 0, "the start"
    for tensor in tensors:
        if tensor.start != position:
            what = "a hole" if tensor.start > position else "an overlap"
            raise HeaderError(
                f"{where}: {what} of {abs(tensor.start - position)} bytes between {before} and {tensor.name[:200]!r}"
            )
        position, before = tensor.stop, repr(tensor.name[:200])
    if position > data_bytes:
        raise HeaderError(
            f"{where}: truncated: the header describes {position} bytes of data, the file has {max(data_bytes, 0)}. "
            "Download or copy it again"
        )
    if position < data_bytes:
        raise HeaderError(
            f"{where}: {data_bytes - position} bytes after the last tensor belong to none. Download or copy it again"
        )


def read_header(path: str | Path) -> Header:
    """Read and prove the header of one file. No tensor byte is read.

    Raises
    ------
    CheckpointNotFoundError
        If the file does not exist.
    CheckpointError
        If it is not a regular file or may not be read.
    HeaderError
        If the header is not valid or does not fit the file.
    """
    fd = open_regular(path)
    with open(fd, "rb") as file:
        size = os.fstat(fd).st_size
        if size < 8:
            raise HeaderError(f"{path}: {size} bytes are no safetensors file: download or copy it again")
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            raise HeaderError(
                f"{path}: a header of {length} bytes, {MAX_HEADER_BYTES} are allowed: damaged, or no safetensors file"
            )
        if 8 + length > size:
            raise HeaderError(
                f"{path}: truncated: the header takes {8 + length} bytes, the file has {size}. "
                "Download or copy it again"
            )
        raw = file.read(length)
    if len(raw) != length:
        raise HeaderError(f"{path}: the file became shorter while its header was read")
    return parse_header(raw, size, str(path))


def encode_header(
    tensors: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str], align: int = 4096
) -> bytes:
    """Write the header of a new file.

    Parameters
    ----------
    tensors : iterable of (name, dtype, shape)
        In the order of their bytes; each follows its predecessor without a hole.
    metadata : mapping of str to str
        Left out if empty.
    align : int, default 4096
        The data section starts on a multiple of this; the JSON is padded with spaces.

    Returns
    -------
    bytes
        Length, JSON and padding: what stands before the data section.

    Raises
    ------
    HeaderError
        If a tensor could not be read back: bad or repeated name, unknown type, or a header beyond the limit.

    Examples
    --------
    >>> len(encode_header([("x", "F32", (2,))], {"format": "pt"}))
    4096
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        check_name(name, "new header")
        if name in entries or name == "__metadata__":
            raise HeaderError(f"new header: name {name!r} is taken")
        stop = position + tensor_bytes(dtype, shape, f"new header: tensor {name!r}")
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    raw = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    raw += b" " * (-(8 + len(raw)) % align)
    if len(raw) > MAX_HEADER_BYTES:
        raise HeaderError(f"new header: {len(raw)} bytes; at most {MAX_HEADER_BYTES} are allowed")
    return len(raw).to_bytes(8, "little") + raw
