"""The chunk manifest: complete, exact, and the only source of a run's byte ranges."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointNotFoundError, WorkspaceError
from mergepipe.storage.checkpoint import FileInfo, open_checkpoint
from mergepipe.storage.chunks import chunk_lengths, chunk_shape
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest, ManifestArray, Segment, virtual_manifest
from support.shards import CHUNK, SHAPES, write_shard, write_sharded


def read(manifest: ChunkManifest, name: str, start: int, stop: int) -> bytes:
    parts = []
    for segment in manifest.segments(name, start, stop):
        with open(segment.path, "rb") as file:
            file.seek(segment.offset)
            parts.append(file.read(segment.length))
    return b"".join(parts)


@pytest.mark.parametrize("target", [1, 100, CHUNK, 2**23])
def test_segments_are_the_tensors_bytes(target: int, tmp_path: Path) -> None:
    data = write_sharded(tmp_path)
    manifest = virtual_manifest(open_checkpoint(tmp_path), target)
    rng = np.random.default_rng(0)
    assert list(manifest.arrays) == list(SHAPES)
    for name, (dtype, shape) in SHAPES.items():
        size, itemsize = math.prod(shape), DTYPES[dtype].itemsize
        assert manifest.arrays[name].size == size
        for start, stop in [(0, size), *np.sort(rng.integers(0, size + 1, (20, 2))).tolist()]:
            segments = manifest.segments(name, start, stop)
            assert len(segments) == (1 if stop > start else 0), "a virtual tensor is one run of bytes"
            assert read(manifest, name, start, stop) == data[name][start * itemsize : stop * itemsize]


@given(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.integers(1, 60), st.data())
def test_segments_of_scattered_chunks(shape: tuple[int, ...], target: int, data: st.DataObject) -> None:
    """Chunks anywhere in any files, as in a copied store: the elements still come in order, joined where they touch."""
    chunks = chunk_shape(shape, 2, target)
    lengths = np.array(chunk_lengths(shape, chunks), np.int64) * 2
    count = len(lengths)
    which = np.array(data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)), np.int64)
    contents = [bytearray(), bytearray(), bytearray()]
    offsets = np.zeros(count, np.int64)
    flat = np.arange(math.prod(shape), dtype="<u2").tobytes()
    position = 0
    for i in range(count):
        target_file = contents[which[i]]
        target_file.extend(bytes(data.draw(st.sampled_from([0, 0, 6]))))
        offsets[i] = len(target_file)
        target_file.extend(flat[position : position + lengths[i]])
        position += int(lengths[i])
    files = tuple(FileInfo(str(i), len(c), 0, 0, "") for i, c in enumerate(contents))
    manifest = ChunkManifest("copy", files, {"x": ManifestArray("BF16", shape, chunks, which, offsets, lengths)})
    size = math.prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    segments = manifest.segments("x", start, stop)
    found = b"".join(bytes(contents[int(s.path)][s.offset : s.offset + s.length]) for s in segments)
    assert found == flat[2 * start : 2 * stop]
    assert all(segment.length > 0 for segment in segments)
    for one, two in pairwise(segments):
        assert (one.path, one.offset + one.length) != (two.path, two.offset)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 13), (5, 4), (13, 13)])
def test_ranges_outside_the_tensor(start: int, stop: int, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"x": ("F32", (3, 4))})
    manifest = virtual_manifest(open_checkpoint(tmp_path))
    with pytest.raises(ValueError, match="not inside 'x', which has 12"):
        manifest.segments("x", start, stop)


def test_save_and_load(tmp_path: Path) -> None:
    write_sharded(tmp_path / "model")
    manifest = virtual_manifest(open_checkpoint(tmp_path / "model"), CHUNK)
    manifest.save(tmp_path / "manifest.json")
    loaded = ChunkManifest.load(tmp_path / "manifest.json")
    assert loaded.kind == "virtual"
    assert loaded.files == manifest.files
    assert list(loaded.arrays) == list(manifest.arrays)
    for name, array in manifest.arrays.items():
        other = loaded.arrays[name]
        assert (array.dtype, array.shape, array.chunk_shape) == (other.dtype, other.shape, other.chunk_shape)
        for field in ("files", "offsets", "lengths", "starts"):
            np.testing.assert_array_equal(getattr(array, field), getattr(other, field))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["manifest.json"]


def test_an_altered_entry_is_followed(tmp_path: Path) -> None:
    """A run knows its inputs through the manifest alone: alter one offset, and other bytes are read."""
    data = write_shard(tmp_path / "model.safetensors", {"a": ("BF16", (64, 4)), "b": ("BF16", (64, 4))})
    path = tmp_path / "manifest.json"
    virtual_manifest(open_checkpoint(tmp_path), 128).save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    document["arrays"]["a"]["offsets"][1] = document["arrays"]["b"]["offsets"][2]
    path.write_text(json.dumps(document))
    altered = ChunkManifest.load(path)
    assert read(altered, "a", 0, 256) == data["a"][:128] + data["b"][256:384] + data["a"][256:]
    assert len(altered.segments("a", 0, 256)) == 3
    assert altered.segments("a", 60, 70)[1] == Segment(altered.files[0].path, int(altered.arrays["a"].offsets[1]), 12)


def alter(document: dict[str, Any], path: str, value: object) -> None:
    *parents, last = path.split("/")
    for parent in parents:
        document = document[int(parent) if isinstance(document, list) else parent]
    if isinstance(document, list):
        document[int(last)] = value
    else:
        document[last] = value


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format", "mergepipe chunk manifest 0"),
        ("kind", "imaginary"),
        ("files", []),
        ("files/0/size", 100),
        ("files/0/colour", "red"),
        ("arrays", []),
        ("arrays/a/dtype", "F99"),
        ("arrays/a/dtype", "F32"),
        ("arrays/a/shape", [64, 5]),
        ("arrays/a/shape", [2**62, 4]),
        ("arrays/a/shape", [2**40, 4]),
        ("arrays/a/shape", "64"),
        ("arrays/a/chunk_shape", [16, 2]),
        ("arrays/a/chunk_shape", [0, 4]),
        ("arrays/a/chunk_shape", [16]),
        ("arrays/a/files/1", 1),
        ("arrays/a/files/1", -1),
        ("arrays/a/offsets/1", -1),
        ("arrays/a/offsets/1", 2**62),
        ("arrays/a/offsets/1", 2**70),
        ("arrays/a/offsets/1", "zero"),
        ("arrays/a/offsets", []),
        ("arrays/a/lengths/1", 64),
        ("arrays/..", {}),
    ],
)
def test_a_manifest_that_contradicts_itself(path: str, value: object, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": ("BF16", (64, 4))})
    file = tmp_path / "manifest.json"
    virtual_manifest(open_checkpoint(tmp_path), 128).save(file)
    document = json.loads(file.read_text(encoding="utf-8"))
    alter(document, path, value)
    file.write_text(json.dumps(document))
    with pytest.raises(WorkspaceError, match="no valid chunk manifest"):
        ChunkManifest.load(file)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"{}", b"\xff", b"[" * 100_000])
def test_a_manifest_that_is_none(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(WorkspaceError):
        ChunkManifest.load(tmp_path / "manifest.json")


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        ChunkManifest.load(tmp_path / "manifest.json")
