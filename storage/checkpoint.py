"""Checkpoints: Hugging Face style folders of safetensors files, opened from their headers alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.storage.header import Header, open_regular, parse_json_object, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_MAX_JSON_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file, and how to see later that it is still the same one.

    Attributes
    ----------
    path : str
        Absolute; a link is not resolved.
    size, mtime_ns, inode : int
        Of the file that the path leads to.
    header_sha256 : str
        Hex digest of its safetensors header; empty for a file that has none.
    """

    path: str
    size: int
    mtime_ns: int
    inode: int
    header_sha256: str


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint.

    Attributes
    ----------
    name : str
    dtype : str
        Safetensors name of the type, such as "BF16".
    shape : tuple of int
    file : int
        Index into `Checkpoint.files`.
    offset, nbytes : int
        Its bytes in that file, counted from the file's start.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers are valid and agree with its index.

    Attributes
    ----------
    root : Path
        Absolute.
    files : tuple of FileInfo
        The shards, by name.
    tensors : dict of str to TensorEntry
        In order of file, then offset.
    config : dict
        Contents of ``config.json``, of an adapter those of ``adapter_config.json``; empty if there is none.
    """

    root: Path
    files: tuple[FileInfo, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        """Whether this is a LoRA adapter as PEFT writes it, not a whole model."""
        return len(self.files) == 1 and Path(self.files[0].path).name == ADAPTER


def file_info(path: str | Path, header_sha256: str = "") -> FileInfo:
    """Look at a file without opening it.

    Raises
    ------
    CheckpointNotFoundError
        If it does not exist.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"'{path}' does not exist, or is a link to nothing") from error
    return FileInfo(os.path.abspath(path), found.st_size, found.st_mtime_ns, found.st_ino, header_sha256)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint: read and prove every header, read no tensor.

    Taken is ``model.safetensors``; without it the shards that ``model.safetensors.index.json`` names; without that
    ``adapter_model.safetensors``, which makes it an adapter, or the one ``*.safetensors`` file of the folder.

    Parameters
    ----------
    folder : path-like

    Returns
    -------
    Checkpoint

    Raises
    ------
    CheckpointNotFoundError
        If the folder, its weights, or a shard that the index names is missing.
    HeaderError
        If a header is not valid or does not fit its file.
    CheckpointError
        If the index is not valid, names something outside the folder or disagrees with the shards; if a shard is not
        a regular file; if two tensor names can't stand in one zarr hierarchy.
    """
    root = Path(os.path.abspath(folder))
    if not root.is_dir():
        if root.exists():
            raise CheckpointError(f"'{root}' is a file: give the folder that holds {SINGLE} or {INDEX}")
        raise CheckpointNotFoundError(f"checkpoint folder '{root}' does not exist")
    weight_map: dict[str, str] | None = None
    if os.path.lexists(root / SINGLE):
        names = [SINGLE]
    elif os.path.lexists(root / INDEX):
        weight_map = _read_index(root / INDEX)
        names = sorted(set(weight_map.values()))
    elif os.path.lexists(root / ADAPTER):
        names = [ADAPTER]
    else:
        names = [_only_file(root)]
    files, tensors = _read_shards(root, names)
    if weight_map is not None:
        _check_index(root / INDEX, weight_map, files, tensors)
    _check_hierarchy(root, tensors)
    about = root / (ADAPTER_CONFIG if names == [ADAPTER] else CONFIG)
    config = _read_json(about, strict=False) if os.path.lexists(about) else {}
    return Checkpoint(root, files, tensors, config)


def _read_shards(root: Path, names: Iterable[str]) -> tuple[tuple[FileInfo, ...], dict[str, TensorEntry]]:
    files: list[FileInfo] = []
    tensors: dict[str, TensorEntry] = {}
    for number, name in enumerate(names):
        header: Header = read_header(root / name)
        files.append(file_info(root / name, header.sha256))
        for t in header.tensors:
            if t.name in tensors:
                other = Path(files[tensors[t.name].file].path).name
                raise CheckpointError(f"'{root}': tensor {t.name!r} stands in both {other} and {name}")
            offset = header.data_start + t.start
            tensors[t.name] = TensorEntry(t.name, t.dtype, t.shape, number, offset, t.stop - t.start)
    return tuple(files), tensors


def _read_json(path: Path, *, strict: bool) -> dict[str, Any]:
    with open(open_regular(path), "rb") as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise CheckpointError(f"'{path}' is larger than {_MAX_JSON_BYTES} bytes")
    return parse_json_object(raw, f"'{path}'", CheckpointError, strict=strict)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = _read_json(path, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{path}': 'weight_map' is missing, empty, or not a map from tensor to file")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or name in {"", ".", ".."} or not name.isprintable() or set(name) & set("/\\"):
            raise CheckpointError(
                f"'{path}': tensor {tensor[:200]!r} is said to be in {name!r}; "
                "expected the bare name of a file in the same folder"
            )
    return weight_map


def _check_index(
    path: Path, weight_map: dict[str, str], files: tuple[FileInfo, ...], tensors: dict[str, TensorEntry]
) -> None:
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        found = None if entry is None else Path(files[entry.file].path).name
        if found != shard:
            where = "in no shard" if found is None else f"in {found}"
            raise CheckpointError(f"'{path}': tensor {name[:200]!r} is said to be in {shard}, but is {where}")
    for name, entry in tensors.items():
        if name not in weight_map:
            shard = Path(files[entry.file].path).name
            raise CheckpointError(f"'{path}': tensor {name!r} is in {shard}, but not in the index")


def _only_file(root: Path) -> str:
    found = sorted(path.name for path in root.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise CheckpointError(f"'{root}' has neither {SINGLE} nor {INDEX}, but {len(found)} other shards: {some}")
    pickles = sorted(path.name for path in root.glob("*.bin"))
    hint = f"; {pickles[0]} is a pickle: save it with save_pretrained(..., safe_serialization=True)" if pickles else ""
    raise CheckpointNotFoundError(f"'{root}' holds no {SINGLE}, no {INDEX} and no other *.safetensors file{hint}")


def _check_hierarchy(root: Path, tensors: dict[str, TensorEntry]) -> None:
    for name in tensors:
        parts = name.split("/")
        for count in range(1, len(parts)):
            if (parent := "/".join(parts[:count])) in tensors:
                raise CheckpointError(f"'{root}': tensor {parent!r} can't also be the folder of tensor {name!r}")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the names, sizes, times and headers of a checkpoint's files: cheap, and another after any change."""
    record = [(Path(info.path).name, info.size, info.mtime_ns, info.header_sha256) for info in checkpoint.files]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]
