"""Checkpoints: Hugging Face style folders, or single files, opened from their headers alone.

The weights are safetensors, or what `torch.save` writes (:mod:`mergepipe.storage.pickled`): either way a tensor is a
byte range of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.storage.file_errors import explained
from mergepipe.storage.header import Header, open_regular, parse_json_object, read_header

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
CONFIG = "config.json"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "scheduler.bin", "optimizer.pt", "scheduler.pt"})
"""What trainers leave beside the weights."""

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
        Hex digest of its safetensors header, or of a PyTorch file's pickle and directory; empty for a file without.
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
        Absolute; the folder, or the file that was given.
    files : tuple of FileInfo
        The shards, by name.
    tensors : dict of str to TensorEntry
        In order of file, then offset.
    config : dict
        Contents of ``config.json``, of an adapter those of ``adapter_config.json``; empty if there is none.
    twins : dict of str to str
        Names left out because they stand for the very bytes of another tensor, as a PyTorch file stores tied ones.
    beside : tuple of str
        What a PyTorch file holds beside its state dict, such as the state of an optimiser.
    """

    root: Path
    files: tuple[FileInfo, ...]
    tensors: dict[str, TensorEntry]
    config: dict[str, Any]
    twins: dict[str, str] = field(default_factory=dict)
    beside: tuple[str, ...] = ()

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


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: read and prove every header, read no tensor.

    Of a folder, the first of these is taken: ``model.safetensors``, the shards that ``model.safetensors.index.json``
    names, ``pytorch_model.bin``, the shards that its index names, ``adapter_model.safetensors``, which makes it an
    adapter, the one ``*.safetensors`` file, the one ``*.bin``.

    Parameters
    ----------
    path : path-like
        A folder, or one file of weights: safetensors, or a state dict that `torch.save` has written.

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
        a regular file, or is a pickle of anything else than plain weights; if two tensor names can't stand in one zarr
        hierarchy.
    """
    root = Path(os.path.abspath(path))
    with explained([root]):
        return _open_folder(root) if root.is_dir() else _open_file(root)


def _open_folder(root: Path) -> Checkpoint:
    names, index = _choose(root)
    weight_map = None if index is None else read_index(index)
    files, tensors = _read_shards(root, names if weight_map is None else sorted(set(weight_map.values())))
    if index is not None and weight_map is not None:
        _check_index(index, weight_map, files, tensors)
    check_hierarchy(root, tensors)
    about = root / (ADAPTER_CONFIG if names == [ADAPTER] else CONFIG)
    config = read_json(about, strict=False) if os.path.lexists(about) else {}
    twins = _twins(tensors) if config and config.get("tie_word_embeddings") is not False else {}
    return Checkpoint(root, files, {n: t for n, t in tensors.items() if n not in twins}, config, twins)


def _choose(root: Path) -> tuple[list[str], Path | None]:
    """The one file that has the weights, or the index that names them."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if os.path.lexists(root / single):
            return [single], None
        if os.path.lexists(root / index):
            return [], root / index
    return [ADAPTER if os.path.lexists(root / ADAPTER) else _only_file(root)], None


def open_weights(path: str | Path) -> Checkpoint:
    """Open one file of weights as a checkpoint without a configuration.

    Raises
    ------
    CheckpointError
        As :func:`open_checkpoint`.
    """
    path = Path(os.path.abspath(path))
    sha256, entries, beside = _read_shard(path, 0)
    tensors = {entry.name: entry for entry in entries}
    check_hierarchy(path, tensors)
    return Checkpoint(path, (file_info(path, sha256),), tensors, {}, beside=beside)


def _open_file(path: Path) -> Checkpoint:
    if not path.exists():
        raise CheckpointNotFoundError(f"checkpoint folder '{path}' does not exist")
    if path.suffix not in (".safetensors", *PICKLED_SUFFIXES):
        known = ", ".join((".safetensors", *PICKLED_SUFFIXES))
        raise CheckpointError(
            f"'{path}' is a file, but not one of weights ({known}): give one, or the folder that holds {SINGLE}"
        )
    return open_weights(path)


def _read_shards(root: Path, names: Iterable[str]) -> tuple[tuple[FileInfo, ...], dict[str, TensorEntry]]:
    files: list[FileInfo] = []
    tensors: dict[str, TensorEntry] = {}
    for number, name in enumerate(names):
        sha256, entries, _ = _read_shard(root / name, number)
        files.append(file_info(root / name, sha256))
        for entry in entries:
            if entry.name in tensors:
                other = Path(files[tensors[entry.name].file].path).name
                raise CheckpointError(f"'{root}': tensor {entry.name!r} stands in both {other} and {name}")
            tensors[entry.name] = entry
    return tuple(files), tensors


def _read_shard(path: Path, number: int) -> tuple[str, list[TensorEntry], tuple[str, ...]]:
    """Fingerprint and tensors of one file, and what else it holds."""
    if path.suffix in PICKLED_SUFFIXES:
        from mergepipe.storage.pickled import read_pickled

        found = read_pickled(path)
        entries = [TensorEntry(t.name, t.dtype, t.shape, number, t.offset, t.nbytes) for t in found.tensors]
        return found.sha256, entries, found.left_out
    header: Header = read_header(path)
    start = header.data_start
    entries = [TensorEntry(t.name, t.dtype, t.shape, number, start + t.start, t.stop - t.start) for t in header.tensors]
    return header.sha256, entries, ()


def _twins(tensors: dict[str, TensorEntry]) -> dict[str, str]:
    """Tensors that are the same bytes as one before them, in the same type and shape."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, t in tensors.items():
        kept = first.setdefault((t.file, t.offset, t.dtype, t.shape), name)
        if kept != name and t.nbytes:
            found[name] = kept
    return found


def read_json(path: Path, *, strict: bool) -> dict[str, Any]:
    """Read a JSON object within bounds; see :func:`mergepipe.storage.header.parse_json_object`."""
    with open(open_regular(path), "rb") as file:
        raw = file.read(_MAX_JSON_BYTES + 1)
    if len(raw) > _MAX_JSON_BYTES:
        raise CheckpointError(f"'{path}' is larger than {_MAX_JSON_BYTES} bytes")
    return parse_json_object(raw, f"'{path}'", CheckpointError, strict=strict)


def read_index(path: Path) -> dict[str, str]:
    """Which tensor is in which file of the same folder, as an index says.

    Raises
    ------
    CheckpointError
        If it is no index, or names anything else than files of its own folder.
    """
    weight_map = read_json(path, strict=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{path}': 'weight_map' is missing, empty, or not a map from tensor to file")
    for tensor, name in weight_map.items():
        if not is_file_name(name):
            raise CheckpointError(
                f"'{path}': tensor {tensor[:200]!r} is said to be in {name!r}; "
                "expected the bare name of a file in the same folder"
            )
    return weight_map


def is_file_name(value: object) -> bool:
    """Whether a value from a file that anybody may have written is the bare name of a file.

    Examples
    --------
    >>> is_file_name("model-00001-of-00002.safetensors"), is_file_name("../model.safetensors"), is_file_name(None)
    (True, False, False)
    """
    return (
        isinstance(value, str) and value not in {"", ".", ".."} and value.isprintable() and not set(value) & set("/\\")
    )


def _check_index(
    path: Path, weight_map: dict[str, str], files: tuple[FileInfo, ...], tensors: dict[str, TensorEntry]
) -> None:
    names = [Path(info.path).name for info in files]
    for name, shard in weight_map.items():
        entry = tensors.get(name)
        found = None if entry is None else names[entry.file]
        if found != shard:
            where = "in no shard" if found is None else f"in {found}"
            raise CheckpointError(f"'{path}': tensor {name[:200]!r} is said to be in {shard}, but is {where}")
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CheckpointError(f"'{path}': tensor {name!r} is in {names[entry.file]}, but not in the index")


def _only_file(root: Path) -> str:
    os.stat(root / ".")  # what may not be looked into holds no names either: that has to be told apart
    os.listdir(root)
    found = sorted(path.name for path in root.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:5]) + (", …" if len(found) > 5 else "")
        raise CheckpointError(f"'{root}' has neither {SINGLE} nor {INDEX}, but {len(found)} other shards: {some}")
    pickles = sorted(path.name for path in root.glob("*.bin") if path.name not in NO_WEIGHTS)
    if len(pickles) == 1:
        return pickles[0]
    raise CheckpointNotFoundError(f"'{root}' holds no {SINGLE}, no {INDEX}, no {PICKLED} and no other *.safetensors")


def check_hierarchy(root: Path, tensors: dict[str, TensorEntry]) -> None:
    """Refuse names of which one would have to be the folder of another."""
    for name in tensors:
        parts = name.split("/")
        for count in range(1, len(parts)):
            if (parent := "/".join(parts[:count])) in tensors:
                raise CheckpointError(f"'{root}': tensor {parent!r} can't also be the folder of tensor {name!r}")


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash of the names, sizes, times and headers of a checkpoint's files: cheap, and another after any change."""
    record = [(Path(info.path).name, info.size, info.mtime_ns, info.header_sha256) for info in checkpoint.files]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]
