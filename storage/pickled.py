"""PyTorch's own files (`pytorch_model.bin`): where each tensor's bytes are, learned without loading or running any.

Since 1.6 `torch.save` writes a zip file: `data.pkl` says which tensors there are, and each storage is an entry of its
own, uncompressed. So a tensor is a byte range here too, and once its range is known the file is read like any other
shard. Three things stand between a stranger's pickle and that range:

1. The zip directory is proved (:mod:`mergepipe.storage.zipped`), and `data.pkl` is small and plain.
2. Its opcodes are looked through, unexecuted: it may name only what rebuilds tensors. Anything else, such as
   ``os.system``, is an error that says so.
3. torch reads it with ``weights_only=True``, from an outline without data, onto the device "meta", where tensors have
   shapes and no memory. What comes back is measured against the zip directory: type, shape, contiguity, and that each
   storage is as long as its entry.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergepipe.errors import CheckpointError
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import check_name, open_regular, tensor_bytes
from mergepipe.storage.zipped import LOCAL_HEADER, ZipEntry, read_directory

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 32_000_000
"""Of `data.pkl`, where a tensor takes some hundred bytes."""

MAX_OPCODES = 5_000_000
"""Of the same, where a tensor takes some twenty; it bounds the time and the memory that reading takes."""

_FUNCTIONS = {
    "collections OrderedDict", "torch Size", "torch device", "torch.nn.parameter Parameter", "torch Tensor",
    "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor_v3",
    "torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state",
    "torch._tensor _rebuild_from_type_v2", "torch.serialization _get_layout", "torch.storage UntypedStorage",
    "_codecs encode",
}  # fmt: skip
"""What a pickle of weights may name, beside data types and the storages of one."""

_ALIASES = {dtype.alias: dtype.name for dtype in DTYPES.values()}
_SAVE_AGAIN = "load it with torch.load(..., weights_only=True) and save it again as safetensors"


@dataclass(frozen=True, slots=True)
class PickledTensor:
    """One tensor of a PyTorch file.

    Attributes
    ----------
    name : str
    dtype : str
        Safetensors name of the type.
    shape : tuple of int
    offset, nbytes : int
        Its bytes, counted from the start of the file. Tied tensors have the same ones.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class PickledHeader:
    """What a PyTorch file holds.

    Attributes
    ----------
    tensors : tuple of PickledTensor
        By offset; tied ones in the order of the pickle.
    sha256 : str
        Hex digest of the pickle and of the zip directory (which has a checksum of every storage).
    left_out : tuple of str
        What stands in the file beside the state dict.
    """

    tensors: tuple[PickledTensor, ...]
    sha256: str
    left_out: tuple[str, ...] = ()


def read_pickled(path: str | Path) -> PickledHeader:
    """Find out where the tensors of a PyTorch file are. No tensor byte is read, nothing in it is executed.

    Parameters
    ----------
    path : path-like
        Written by `torch.save`: a state dict, or a mapping that has one under ``state_dict``.

    Returns
    -------
    PickledHeader

    Raises
    ------
    CheckpointNotFoundError
        If there is no such file.
    CheckpointError
        If it is cut off, damaged or lies about itself; of the format before torch 1.6; big-endian; has compressed
        entries; names code; holds something else than plain, contiguous tensors. The message has the remedy.
    """
    fd = open_regular(path)
    try:
        _check_kind(os.pread(fd, 8, 0), path)
        entries, directory = read_directory(fd, path)
        records = _records(entries, path)
        _check_byte_order(fd, records, path)
        pickle = records["data.pkl"]
        raw = os.pread(fd, pickle.size, pickle.offset)
    finally:
        os.close(fd)
    scan_opcodes(raw, path)
    outline, places = _outline(raw, {name: entry for name, entry in records.items() if name.startswith("data/")})
    found, left_out = _state_dict(_load(outline, path), path)
    tensors = [_locate(name, value, places, path) for name, value in found.items()]
    digest = hashlib.sha256(raw + directory).hexdigest()
    return PickledHeader(tuple(sorted(tensors, key=lambda tensor: tensor.offset)), digest, left_out)


def _check_kind(magic: bytes, path: str | Path) -> None:
    if magic[:4] == b"PK\x03\x04":
        return
    if magic[:1] == b"\x80":
        raise CheckpointError(
            f"'{path}' is a pickle in the format of torch before 1.6, whose tensors can't be read where they are: "
            f"{_SAVE_AGAIN}"
        )
    raise CheckpointError(f"'{path}' starts with {magic!r}: expected a zip file around a pickle, as torch.save writes")


def _records(entries: Mapping[str, ZipEntry], path: str | Path) -> dict[str, ZipEntry]:
    """The entries without the name of the archive that stands before all of them."""
    folders = {name.partition("/")[0] for name in entries}
    records = {name.partition("/")[2]: entry for name, entry in entries.items()}
    if "constants.pkl" in records:
        raise CheckpointError(f"'{path}' is a TorchScript archive, a program: save the model's state_dict instead")
    if len(folders) != 1 or "data.pkl" not in records:
        raise CheckpointError(f"'{path}' is a zip file without data.pkl: was it written by torch.save?")
    size = records["data.pkl"].size
    if size > MAX_PICKLE_BYTES:
        raise CheckpointError(f"'{path}': data.pkl has {size:,} bytes; at most {MAX_PICKLE_BYTES:,} are read")
    for name in ("byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"):
        if name in records and records[name].size > 1000:
            raise CheckpointError(f"'{path}': entry {name!r} has {records[name].size:,} bytes; expected a few")
    return records


def _check_byte_order(fd: int, records: Mapping[str, ZipEntry], path: str | Path) -> None:
    entry = records.get("byteorder")
    order = b"little" if entry is None else os.pread(fd, entry.size, entry.offset)
    if order != b"little":
        raise CheckpointError(f"'{path}' is of byte order {order[:20]!r}, expected b'little': {_SAVE_AGAIN}")


def scan_opcodes(raw: bytes, path: str | Path) -> None:
    """Look through a pickle without executing it.

    Raises
    ------
    CheckpointError
        If it names anything that is not needed to rebuild tensors, is too long, or is no pickle.

    Examples
    --------
    >>> import pickle
    >>> scan_opcodes(pickle.dumps({"a": 1}, 2), "example.bin")
    >>> try:
    ...     scan_opcodes(b"cposix\\nsystem\\n.", "example.bin")
    ... except CheckpointError as error:
    ...     print(str(error)[:40])
    'example.bin' asks for 'posix.system', w
    """
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if count >= MAX_OPCODES:
                raise CheckpointError(f"'{path}': data.pkl has more than {MAX_OPCODES:,} steps")
            if opcode.name in ("GLOBAL", "INST") and not _is_plain(str(argument)):
                raise _code(str(argument).replace(" ", "."), path)
            if opcode.name in ("STACK_GLOBAL", "OBJ", "NEXT_BUFFER", "EXT1", "EXT2", "EXT4"):
                raise _code(f"a step {opcode.name}", path)
    except CheckpointError:
        raise
    except Exception as error:  # genops raises what it comes upon: ValueError, IndexError, UnicodeDecodeError, ...
        raise CheckpointError(f"'{path}': data.pkl is damaged ({error}): download or copy the file again") from error


def _is_plain(name: str) -> bool:
    if name in _FUNCTIONS:
        return True
    module, _, leaf = name.partition(" ")
    return module == "torch" and (leaf.endswith("Storage") or leaf in _ALIASES or leaf in ("strided", "complex64"))


def _code(name: str, path: str | Path) -> CheckpointError:
    return CheckpointError(
        f"'{path}' asks for '{name[:200]}', which plain weights do not need: nothing of it was executed. If you trust "
        "the file, load it elsewhere and save its tensors as safetensors"
    )


def _outline(pickle: bytes, storages: Mapping[str, ZipEntry]) -> tuple[io.BytesIO, dict[int, ZipEntry]]:
    """A file for torch that has the pickle and all storages, but empty; and which of them is where in it.

    So torch sees only what has been looked through, and need not agree with us on what a strange zip file says.
    """
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickle), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{name}", data)
        for name in storages:
            archive.writestr(f"archive/{name}", b"")
        start = {info.filename: info.header_offset + LOCAL_HEADER.size for info in archive.infolist()}
    file.seek(0)
    return file, {start[f"archive/{name}"] + len(f"archive/{name}".encode()): e for name, e in storages.items()}


def _load(outline: io.BytesIO, path: str | Path) -> Any:
    """What the file holds, as tensors without memory."""
    import torch

    # Older versions read data before they drop it, unless tensors are faked; newer ones need not, and are faster so.
    knows_meta = hasattr(torch.serialization, "_is_meta_location")
    mode: AbstractContextManager[Any] = nullcontext()
    if not knows_meta:
        from torch._subclasses.fake_tensor import FakeTensorMode

        mode = FakeTensorMode()
    try:
        with mode:
            return torch.load(outline, map_location="meta" if knows_meta else None, weights_only=True)
    except Exception as error:  # a pickle of a stranger can make it raise anything
        reason = _reason(error)
        raise CheckpointError(f"'{path}' can't be read as plain weights: {type(error).__name__}: {reason}") from error


def _reason(error: Exception) -> str:
    """Why a file is not read; without torch's advice to run it, which its message begins with."""
    stranger = re.search(r"Unsupported \w+: GLOBAL (\S{1,200})", str(error))
    if stranger is not None:
        return f"it asks for {stranger[1]}, which is no tensor and is never run"
    first = str(error).strip().partition("\n")[0]
    return "it holds other things than tensors" if "weights_only" in first else first[:300]


def _state_dict(value: Any, path: str | Path) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """The tensors by name; and what else there is, where they stand under a key of their own."""
    if not isinstance(value, Mapping):
        raise CheckpointError(f"'{path}' holds a {type(value).__name__}, expected a state dict: tensors by name")
    left_out: tuple[str, ...] = ()
    if isinstance(value.get("state_dict"), Mapping):
        left_out = tuple(str(key) for key in value if key != "state_dict")
        value = value["state_dict"]
    import torch

    for name, tensor in value.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"'{path}': {str(name)[:200]!r} is a {type(tensor).__name__}, no tensor: save the state dict alone"
            )
    return dict(value), left_out


def _locate(name: str, tensor: torch.Tensor, places: Mapping[int, ZipEntry], path: str | Path) -> PickledTensor:
    import torch

    where = f"'{path}': tensor {name[:200]!r}"
    check_name(name, f"'{path}'")
    dtype = _ALIASES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg():
        raise CheckpointError(f"{where} is {tensor.dtype}, {tensor.layout}: only plain tensors of numbers are read")
    shape = tuple(int(size) for size in tensor.shape)
    nbytes = tensor_bytes(dtype, shape, where)
    if not tensor.is_contiguous():
        raise CheckpointError(
            f"{where} is not contiguous (strides {tuple(tensor.stride())} for shape {shape}), no run of bytes: "
            "call .contiguous() on it and save again"
        )
    storage = tensor.untyped_storage()
    # Where the storage is in the outline.
    start, skip = storage._checkpoint_offset, int(tensor.storage_offset()) * DTYPES[dtype].itemsize
    entry = None if start is None else places.get(start)
    if entry is None or storage.nbytes() != entry.size or skip + nbytes > entry.size:
        found = "none" if entry is None else f"{entry.size:,} bytes long"
        raise CheckpointError(
            f"{where} takes {skip + nbytes:,} bytes of a storage of {storage.nbytes():,}, but its entry is {found}: "
            "the file is damaged or lies about itself"
        )
    return PickledTensor(name, dtype, shape, entry.offset + skip, nbytes)
