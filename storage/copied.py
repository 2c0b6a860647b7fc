"""The copied store: the same hierarchy as a zarr v3 group of its own on disk, which any zarr reader opens.

A zarr reader takes a missing chunk for zeros, so a copy that was interrupted must not look like a store. Three things
see to that: chunks are synced to disk before the ``zarr.json`` of their array is written, the group's own ``zarr.json``
comes last, and the whole is built in a sibling folder (``NAME.part``) that takes its name in one step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, WrapperStore

from mergepipe.errors import DiskFullError, OutputExistsError
from mergepipe.storage import zdtype
from mergepipe.storage.atomic import fsync_path, no_room_errors, temporary_of, write_atomic
from mergepipe.storage.ballast import Ballast, held_bytes
from mergepipe.storage.checked import CHECKSUM_BYTES, is_whole_file
from mergepipe.storage.checkpoint import Checkpoint, FileInfo, file_info
from mergepipe.storage.chunks import DEFAULT_CHUNK_BYTES, grid_shape
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.hierarchy import chunk_bytes, chunk_keys, hierarchy_documents
from mergepipe.storage.manifest import ChunkManifest, ManifestArray, virtual_manifest
from mergepipe.storage.readers import MmapReader, Reader

BALLAST_NAME = "ballast.partial"
"""Disk space set aside for chunks that are still to be copied. Files with this ending are no part of a store."""


class _HeldBackStore(WrapperStore[LocalStore]):
    """Shows metadata to zarr that is not on disk yet, and writes no chunk of an input that changed."""

    def __init__(self, store: LocalStore, documents: dict[str, bytes], check_source: Callable[[], None]) -> None:
        super().__init__(store)
        self._documents = documents
        self._check_source = check_source
        self.folder = store.root

    async def set(self, key: str, value: Buffer) -> None:
        # By now all its bytes have been read, and end in their checksum: under its name a chunk is believed.
        self._check_source()
        await super().set(key, value)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        prototype = prototype or default_buffer_prototype()
        if byte_range is None and key in self._documents:
            return prototype.buffer.from_bytes(self._documents[key])
        return await self._store.get(key, prototype, byte_range)


def copied_bytes(manifest: ChunkManifest) -> int:
    """Bytes that the chunks of a copy of `manifest` take on disk, padding and checksums included."""
    return sum(len(array.lengths) * (chunk_bytes(array) + CHECKSUM_BYTES) for array in manifest.arrays.values())


def copy_store(
    checkpoint: Checkpoint,
    folder: str | Path,
    chunk_target: int = DEFAULT_CHUNK_BYTES,
    on_bytes: Callable[[int], None] = lambda count: None,
    *,
    check_source: Callable[[], None] = lambda: None,
    resume: bool = False,
    mend: bool = False,
) -> ChunkManifest:
    """Copy a checkpoint into a zarr v3 group on disk.

    Parameters
    ----------
    checkpoint : Checkpoint
        Read through its own virtual manifest, never written.
    folder : path-like
        Must not exist, unless `resume`; its parent must. A ``.part`` sibling left by an interrupted copy is replaced.
    chunk_target : int
        Bytes per chunk, as for :func:`mergepipe.storage.chunks.chunk_shape`.
    on_bytes : callable
        Called after each chunk with its number of bytes.
    check_source : callable
        Called when a chunk was read and before it is written; raises if the checkpoint's files are not what they were.
    resume : bool
        The caller knows that `folder`, or its ``.part``, is of this very checkpoint and chunk size: what is whole in it
        is kept, chunk by chunk, and what an error leaves stays for the next time.
    mend : bool
        With `resume`: a complete copy in `folder` is believed chunk by chunk only, like an unfinished one.

    Returns
    -------
    ChunkManifest
        Of kind "copy": every chunk is a file of its own, its range the raw bytes without padding and checksum.

    Raises
    ------
    OutputExistsError
        If `folder` exists.
    DiskFullError
        If there is no room, found before the first byte where possible. The unfinished copy is removed.
    ShortReadError
        If an input was truncated meanwhile.

    Notes
    -----
    Memory: about four chunks, whatever the size of the checkpoint.
    """
    folder = Path(os.path.abspath(folder))
    source = virtual_manifest(checkpoint, chunk_target)
    if resume and folder.is_dir():
        if mend:
            with no_room_errors(folder):
                _write(source, folder, on_bytes, check_source, room=None)
        return _manifest_of_copy(source, folder)
    if os.path.lexists(folder):
        raise OutputExistsError(f"'{folder}' exists already: remove it, or choose another folder for the copy")
    part = folder.with_name(folder.name + ".part")
    if os.path.lexists(part) and not resume:
        shutil.rmtree(part)
    ballast = part / BALLAST_NAME
    ballast.unlink(missing_ok=True)
    free, needed = shutil.disk_usage(folder.parent).free, copied_bytes(source) - held_bytes(part)
    if needed > free:
        raise DiskFullError(f"the copy '{folder}' needs {needed:,} bytes, its disk has {free:,} free: use another disk")
    part.mkdir(exist_ok=True)
    try:
        with no_room_errors(part), Ballast(ballast, needed) as room:
            _write(source, part, on_bytes, check_source, room)
            os.rename(part, folder)
            fsync_path(folder.parent)
    except BaseException:
        if not resume:
            with suppress(OSError):
                shutil.rmtree(part)
        raise
    return _manifest_of_copy(source, folder)


def _is_whole(chunk: Path, nbytes: int) -> bool:
    """Whether a chunk's file, left by an earlier copy, has its full length and matches the checksum at its end."""
    return is_whole_file(chunk) and chunk.stat().st_size == nbytes + CHECKSUM_BYTES


@contextmanager
def _tensor_context(name: str, where: str) -> Iterator[None]:
    """Add "while working on tensor NAME of WHERE" to any error that passes by."""
    try:
        yield
    except Exception as error:
        error.add_note(f"while working on tensor '{name}' of {where}")
        raise


def _write(
    source: ChunkManifest,
    part: Path,
    on_bytes: Callable[[int], None],
    check_source: Callable[[], None],
    room: Ballast | None,
) -> None:
    zdtype.register()
    documents = hierarchy_documents(source, checksum=True)
    store = _HeldBackStore(LocalStore(part), documents, check_source)
    with MmapReader() as reader:
        for name in source.arrays:
            with _tensor_context(name, str(part)):
                _write_chunks(store, reader, source, name, on_bytes, room)
            (part / name).mkdir(parents=True, exist_ok=True)  # a tensor without elements has no chunks
            for key in chunk_keys(source.arrays[name]):  # together, so that the disk had time to write most of them
                fsync_path(part / name / key)
            fsync_path(part / name)
            write_atomic(part / name / "zarr.json", documents.pop(f"{name}/zarr.json"))
    # What is left are the groups; children first, the root last.
    for key in reversed(documents):
        write_atomic(part / key, documents[key])
    for path, _, names in os.walk(part):
        for name in names:
            if temporary_of(name) is not None or name.endswith(".partial"):
                os.unlink(os.path.join(path, name))  # left by a copy that was killed
        fsync_path(path)


def _write_chunks(
    store: _HeldBackStore,
    reader: Reader,
    source: ChunkManifest,
    name: str,
    on_bytes: Callable[[int], None],
    room: Ballast | None,
) -> None:
    array = source.arrays[name]
    # Else an all-zero chunk would not be written, and "every chunk is a file" would not hold. (zarr 3.1 silently drops
    # the same setting when it is given to `open_array` for an array that exists.)
    target = zarr.open_array(store, path=name, mode="r+").with_config({"write_empty_chunks": True})
    native: np.dtype[Any] = np.dtype("u1") if DTYPES[array.dtype].role == "refused" else DTYPES[array.dtype].numpy
    keys = list(chunk_keys(array))
    for number, selection in enumerate(_selections(array)):
        if _is_whole(store.folder / name / keys[number], chunk_bytes(array)):
            on_bytes(int(array.lengths[number]))
            continue
        start, stop = int(array.starts[number]), int(array.starts[number + 1])
        if room is not None:
            room.spend(chunk_bytes(array) + CHECKSUM_BYTES)
        shape = tuple(part.stop - part.start for part in selection)
        with reader.window(source.segments(name, start, stop), last=True) as view:
            target[selection or ...] = view.view(native).reshape(shape)
        on_bytes(int(array.lengths[number]))


def _selections(array: ManifestArray) -> Iterator[tuple[slice, ...]]:
    """The part of the tensor that every chunk covers, in C order of the grid."""
    for index in np.ndindex(*grid_shape(array.shape, array.chunk_shape)):
        yield tuple(
            slice(i * chunk, min((i + 1) * chunk, size))
            for i, chunk, size in zip(index, array.chunk_shape, array.shape, strict=True)
        )


def _manifest_of_copy(source: ChunkManifest, folder: Path) -> ChunkManifest:
    files: list[FileInfo] = []
    arrays: dict[str, ManifestArray] = {}
    for name, array in source.arrays.items():
        which = np.arange(len(array.lengths), dtype=np.int64) + len(files)
        files.extend(file_info(folder / name / key) for key in chunk_keys(array))
        arrays[name] = replace(array, files=which, offsets=np.zeros_like(which))
    return ChunkManifest("copy", tuple(files), arrays)
