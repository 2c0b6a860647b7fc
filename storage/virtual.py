"""The virtual zarr store: a zarr v3 hierarchy over a chunk manifest. No byte is copied and no file is written.

Metadata documents (:mod:`mergepipe.storage.hierarchy`) are made in memory, chunks are byte ranges of the files that the
manifest names.
"""

from __future__ import annotations

import asyncio
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from mergepipe.errors import CheckpointNotFoundError
from mergepipe.storage import zdtype
from mergepipe.storage.chunks import grid_shape
from mergepipe.storage.hierarchy import chunk_bytes, chunk_keys, hierarchy_documents
from mergepipe.storage.manifest import ChunkManifest, ManifestArray, Segment
from mergepipe.storage.readers import U8, Descriptors, filled_map, in_page_cache, mapped_bytes, new_map

MAPPED_BYTES = 256 * 1024
"""Chunks, and parts of them, from this size on are mapped; below it, a copy costs no more than a map does."""


class VirtualStore(Store):
    """A read-only zarr store whose chunks are the byte ranges of a manifest.

    Parameters
    ----------
    manifest : ChunkManifest
        Kept, not copied.

    Notes
    -----
    A whole chunk is a read-only window onto the page cache, into which the kernel has read it before anybody sees it:
    no byte is copied, and a truncated file is an error. As with any map, one that is truncated while somebody holds a
    chunk of it kills the process when the lost pages are touched, and what is written into it shows. Whoever reads
    arrays through zarr holds no chunks: zarr copies them into arrays of its own at once. Small chunks, padded ones,
    whose missing part reads as zeros, and those at odd places are copied.

    Examples
    --------
    ``zarr.open_group(VirtualStore(manifest), mode="r")["lm_head.weight"][:16]``
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, manifest: ChunkManifest) -> None:
        super().__init__(read_only=True)
        zdtype.register()
        self._manifest = manifest
        self._documents = hierarchy_documents(manifest)
        self._descriptors = Descriptors()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VirtualStore) and self._manifest is other._manifest

    __hash__ = Store.__hash__

    def __repr__(self) -> str:
        return f"VirtualStore({self._manifest.kind}, {len(self._manifest.arrays)} tensors)"

    def __reduce__(self) -> tuple[type[VirtualStore], tuple[ChunkManifest]]:
        return VirtualStore, (self._manifest,)

    def with_read_only(self, read_only: bool = False) -> VirtualStore:
        """A new store over the same manifest; a writable one is refused."""
        if not read_only:
            raise ValueError("a virtual store lies over input files and is never writable: copy the group instead")
        return VirtualStore(self._manifest)

    def close(self) -> None:
        """Close all files."""
        self._descriptors.close()
        super().close()

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Value of a key, or a part of it; None if there is no such key."""
        if (document := self._documents.get(key)) is not None:
            start, stop = _limits(byte_range, len(document))
            return prototype.buffer.from_bytes(document[start:stop])
        if (found := self._find(key)) is None:
            return None
        start, stop = _limits(byte_range, chunk_bytes(found[0]))
        values = await self._read(self._segment(*found, start, stop), stop - start)
        return prototype.buffer.from_array_like(values)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several values or parts of them, in order."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    def _find(self, key: str) -> tuple[ManifestArray, int] | None:
        """The tensor and the number of the chunk that a key stands for."""
        name, _, leaf = key.rpartition("/")
        array = self._manifest.arrays.get(name)
        kind, *parts = leaf.split(".")
        if array is None or kind != "c" or len(parts) != len(array.shape):
            return None
        number = 0
        for part, count in zip(parts, grid_shape(array.shape, array.chunk_shape), strict=True):
            if not (part.isascii() and part.isdigit()) or str(int(part)) != part or int(part) >= count:
                return None
            number = number * count + int(part)
        return array, number

    def _segment(self, array: ManifestArray, number: int, start: int, stop: int) -> Segment:
        """Where a part of a chunk lies; the chunk's padding lies nowhere."""
        path = self._manifest.files[array.files[number]].path
        valid = min(max(int(array.lengths[number]) - start, 0), stop - start)
        return Segment(path, int(array.offsets[number]) + start, valid)

    async def _read(self, segment: Segment, size: int) -> U8:
        # A thread is for what may wait for the disk: to have one do a little takes longer than the little.
        if not self._is_cached(segment):
            return await asyncio.to_thread(self._fetch, segment, size, filled_map)
        return self._fetch(segment, size, new_map)

    def _is_cached(self, segment: Segment) -> bool:
        with self._descriptors.borrow(segment.path) as fd:
            return in_page_cache(fd, segment)

    def _fetch(self, segment: Segment, size: int, map_of: Callable[[int, Segment], mmap.mmap]) -> U8:
        if segment.length == size >= MAPPED_BYTES and segment.offset % 8 == 0:
            # It fails if somebody holds so many chunks that there is no descriptor or map left.
            with suppress(OSError), self._descriptors.borrow(segment.path) as fd:
                return mapped_bytes(map_of(fd, segment), segment)
        out = np.empty(size, np.uint8)
        self._descriptors.read_into(segment, out[: segment.length].data)
        out[segment.length :] = 0
        return out

    async def exists(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self._documents or self._find(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Refused: the store is read-only."""
        self._check_writable()

    async def delete(self, key: str) -> None:
        """Refused: the store is read-only."""
        self._check_writable()

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for key in self._keys():
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that start with `prefix`."""
        for key in self._keys():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """What stands directly below `prefix`."""
        folder = f"{prefix.rstrip('/')}/" if prefix.rstrip("/") else ""
        below = (key[len(folder) :] for key in self._documents if key.startswith(folder))
        for child in dict.fromkeys(key.split("/")[0] for key in below):
            yield child
        if (array := self._manifest.arrays.get(folder[:-1])) is not None:
            for key in chunk_keys(array):
                yield key

    def _keys(self) -> Iterator[str]:
        yield from self._documents
        for name, array in self._manifest.arrays.items():
            for key in chunk_keys(array):
                yield f"{name}/{key}"


def _limits(byte_range: ByteRequest | None, size: int) -> tuple[int, int]:
    start, stop = 0, size
    if isinstance(byte_range, RangeByteRequest):
        start, stop = byte_range.start, byte_range.end
    elif isinstance(byte_range, OffsetByteRequest):
        start = byte_range.offset
    elif isinstance(byte_range, SuffixByteRequest):
        start = size - byte_range.suffix
    start = min(max(start, 0), size)
    return start, min(max(stop, start), size)


def open_store(path: str | os.PathLike[str]) -> zarr.Group:
    """Open a saved chunk manifest or a copied store as a read-only zarr group.

    Parameters
    ----------
    path : path-like
        A manifest file, the folder of a copied store, or the folder of one model in a workspace
        (`.mergepipe/stores/0-base`), whichever kind it holds.

    Returns
    -------
    zarr.Group
        One array per tensor, ``group["model.norm.weight"][:]``; bfloat16 arrays come as `ml_dtypes.bfloat16`.

    Raises
    ------
    CheckpointNotFoundError
        If there is neither.
    WorkspaceError
        If the file is no valid manifest.
    """
    path = Path(path)
    if (path / "zarr" / "zarr.json").is_file():
        path /= "zarr"
    elif (path / "manifest.json").is_file():
        path /= "manifest.json"
    if path.is_dir():
        if not (path / "zarr.json").is_file():
            raise CheckpointNotFoundError(f"'{path}' holds no store: expected zarr.json, zarr/ or manifest.json in it")
        zdtype.register()
        return zarr.open_group(LocalStore(path, read_only=True), mode="r")
    return zarr.open_group(VirtualStore(ChunkManifest.load(path)), mode="r")
