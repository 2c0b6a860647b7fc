"""The chunk manifest: for every chunk of every tensor, the file and the byte range that hold it.

A run knows its inputs through this alone: :meth:`ChunkManifest.segments` is the only way from a tensor and an element
range to bytes. It is a plain JSON file, so it can be read, compared and (in a test) altered by hand.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mergepipe.errors import CheckpointNotFoundError, WorkspaceError
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checkpoint import Checkpoint, FileInfo, TensorEntry
from mergepipe.storage.chunks import DEFAULT_CHUNK_BYTES, chunk_lengths, chunk_shape
from mergepipe.storage.collector import paused_collector
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import check_name, tensor_bytes

FORMAT = "mergepipe chunk manifest 1"

I64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes in one file."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True, eq=False, slots=True)
class ManifestArray:
    """Where the chunks of one tensor are.

    Attributes
    ----------
    dtype : str
        Safetensors name of the type.
    shape, chunk_shape : tuple of int
        As :func:`mergepipe.storage.chunks.chunk_shape` cuts it: every chunk is contiguous in the tensor.
    files, offsets, lengths : int64 ndarray, shape (chunks,)
        Index into `ChunkManifest.files`, byte offset and number of valid bytes of every chunk, in C order of the grid.
        The last chunk of a padded dimension is shorter than the others. Not to be modified.
    starts : int64 ndarray, shape (chunks + 1,)
        First element of every chunk in the flat tensor, and the tensor's size. Follows from the shapes.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    files: I64
    offsets: I64
    lengths: I64
    starts: I64 = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts", _grid(self.dtype, self.shape, self.chunk_shape).starts)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.starts[-1])


@dataclass(frozen=True, eq=False, slots=True)
class ChunkManifest:
    """Where the chunks of one model are.

    Attributes
    ----------
    kind : {'virtual', 'copy'}
        Byte ranges of the model's own files, or files of a copied zarr store.
    files : tuple of FileInfo
    arrays : dict of str to ManifestArray
        In the order of the checkpoint: by file, then offset.
    """

    kind: Literal["virtual", "copy"]
    files: tuple[FileInfo, ...]
    arrays: dict[str, ManifestArray]

    @property
    def is_mappable(self) -> bool:
        """Whether a run of chunks can be mapped as it lies: one range of one file, at a multiple of eight bytes."""
        odd = any(bool((array.offsets % 8).any()) for array in self.arrays.values())
        return self.kind == "virtual" and not odd

    @property
    def root(self) -> str | None:
        """Folder of the copied store that the chunks lie in; None for a virtual one, or if there are no chunks."""
        name, first = next(((name, array) for name, array in self.arrays.items() if array.files.size), ("", None))
        if self.kind != "copy" or first is None:
            return None
        return os.path.dirname(self.files[int(first.files[0])].path).removesuffix(f"/{name}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as it is read."""
        return self.arrays[name].shape

    def segments(self, name: str, start: int, stop: int) -> Sequence[Segment]:
        """Bytes of the elements `start` to `stop` of a flattened tensor.

        Parameters
        ----------
        name : str
            A key of `arrays`.
        start, stop : int
            ``0 <= start <= stop <= size``.

        Returns
        -------
        sequence of Segment
            In element order; neighbours in one file are joined, so a virtual tensor is one segment. Empty if
            ``start == stop``.

        Raises
        ------
        ValueError
            If the range is not inside the tensor.
        """
        array = self.arrays[name]
        if not 0 <= start <= stop <= array.size:
            raise ValueError(f"elements {start} to {stop} are not inside {name!r}, which has {array.size}")
        itemsize = DTYPES[array.dtype].itemsize
        found: list[Segment] = []
        first = int(np.searchsorted(array.starts, start, "right")) - 1
        for chunk in range(first, int(np.searchsorted(array.starts, stop, "left")) if stop > start else first):
            begin = max(start - int(array.starts[chunk]), 0) * itemsize
            end = min(stop - int(array.starts[chunk]), int(array.starts[chunk + 1] - array.starts[chunk])) * itemsize
            path, offset = self.files[array.files[chunk]].path, int(array.offsets[chunk]) + begin
            if found and found[-1].path == path and found[-1].offset + found[-1].length == offset:
                found[-1] = Segment(path, found[-1].offset, found[-1].length + end - begin)
            else:
                found.append(Segment(path, offset, end - begin))
        return found

    def save(self, path: str | Path) -> None:
        """Write the manifest as JSON, whole or not at all.

        Raises
        ------
        DiskFullError
        """
        arrays = {
            name: {
                "dtype": array.dtype,
                "shape": array.shape,
                "chunk_shape": array.chunk_shape,
                "files": array.files.tolist(),
                "offsets": array.offsets.tolist(),
                "lengths": array.lengths.tolist(),
            }
            for name, array in self.arrays.items()
        }
        files = [asdict(info) for info in self.files]
        document = {"format": FORMAT, "kind": self.kind, "files": files, "arrays": arrays}
        write_atomic(path, json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8"))

    @classmethod
    def load(cls, path: str | Path) -> ChunkManifest:
        """Read a manifest back and check that every range lies in its file and every tensor is covered.

        Raises
        ------
        CheckpointNotFoundError
            If there is none.
        WorkspaceError
            If the file is not a manifest, or contradicts itself.
        """
        try:
            with paused_collector():
                return cls._parse(Path(path).read_bytes())
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"chunk manifest '{path}' does not exist: build the workspace") from error
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise WorkspaceError(f"'{path}' is no valid chunk manifest ({error}): build the workspace again") from error

    @classmethod
    def _parse(cls, data: bytes) -> ChunkManifest:
        document = json.loads(data)
        if document["format"] != FORMAT or document["kind"] not in {"virtual", "copy"}:
            raise ValueError(f"expected format {FORMAT!r}, found {document['format']!r}, {document['kind']!r}")
        files = tuple(FileInfo(**info) for info in document["files"])
        total = sum(info.size for info in files)
        arrays = {name: _array(name, entry, files, total) for name, entry in document["arrays"].items()}
        return cls(document["kind"], files, arrays)


def _array(name: str, entry: dict[str, Any], files: tuple[FileInfo, ...], total: int) -> ManifestArray:
    """One proven entry; `total` is what all files hold."""
    check_name(name, "manifest")
    dtype, shape, chunks = entry["dtype"], tuple(entry["shape"]), tuple(entry["chunk_shape"])
    if not {*map(type, shape), *map(type, chunks)} <= {int}:
        raise ValueError(f"{name!r}: shapes {shape} and {chunks} are not of integers")
    nbytes = tensor_bytes(dtype, shape, f"manifest: {name!r}")
    if not is_contiguous_grid(shape, chunks):
        raise ValueError(f"{name!r}: chunks of shape {chunks} are not contiguous in shape {shape}")
    if nbytes > total:
        raise ValueError(f"{name!r}: {nbytes} bytes are more than all files hold")
    which, offsets, lengths = entry["files"], entry["offsets"], entry["lengths"]
    grid = _grid(dtype, shape, chunks)
    if lengths != grid.lengths.tolist() or not len(which) == len(offsets) == len(lengths):
        raise ValueError(f"{name!r}: its chunks do not cover it exactly")
    for file, offset, length in zip(which, offsets, lengths, strict=True):
        if not 0 <= file < len(files) or not 0 <= offset <= files[file].size - length:
            raise ValueError(f"{name!r}: {length} bytes at {offset} are not inside file {file}")
    return ManifestArray(dtype, shape, chunks, np.array(which, np.int64), np.array(offsets, np.int64), grid.lengths)


class _Grid(NamedTuple):
    """The chunks of all tensors of one type and shape: bytes and first element of each. Shared, so read-only."""

    lengths: I64
    starts: I64


@lru_cache(4096)
def _grid(dtype: str, shape: tuple[int, ...], chunks: tuple[int, ...]) -> _Grid:
    elements = np.array(chunk_lengths(shape, chunks), np.int64)
    grid = _Grid(elements * DTYPES[dtype].itemsize, np.concatenate([[0], np.cumsum(elements)]))
    for array in grid:
        array.setflags(write=False)
    return grid


def is_contiguous_grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> bool:
    """Whether every chunk is one run of bytes: single indices, then one dimension cut anywhere, then full ones.

    Examples
    --------
    >>> is_contiguous_grid((4, 6), (2, 6)), is_contiguous_grid((4, 6), (2, 3))
    (True, False)
    """
    if len(shape) != len(chunks) or any(chunk < 1 for chunk in chunks):
        return False
    cut = next((axis for axis, chunk in enumerate(chunks) if chunk > 1), len(chunks))
    return all(chunk == max(size, 1) for size, chunk in list(zip(shape, chunks, strict=True))[cut + 1 :])


def virtual_manifest(checkpoint: Checkpoint, chunk_target: int = DEFAULT_CHUNK_BYTES) -> ChunkManifest:
    """Manifest of a checkpoint as it lies on disk: every chunk is a byte range of a shard. No tensor byte is read.

    Parameters
    ----------
    checkpoint : Checkpoint
    chunk_target : int
        Bytes per chunk, as for :func:`mergepipe.storage.chunks.chunk_shape`.
    """
    arrays = {name: _virtual_array(entry, chunk_target) for name, entry in checkpoint.tensors.items()}
    return ChunkManifest("virtual", checkpoint.files, arrays)


def _virtual_array(entry: TensorEntry, chunk_target: int) -> ManifestArray:
    itemsize = DTYPES[entry.dtype].itemsize
    chunks = chunk_shape(entry.shape, itemsize, chunk_target)
    grid = _grid(entry.dtype, entry.shape, chunks)
    count = len(grid.lengths)
    offsets = grid.starts[:-1] * itemsize + entry.offset
    return ManifestArray(entry.dtype, entry.shape, chunks, np.full(count, entry.file), offsets, grid.lengths)
