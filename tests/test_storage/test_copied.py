"""The copied store, through zarr itself, through tensorstore, and under interruption."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from mergepipe.errors import DiskFullError, OutputExistsError, ShortReadError
from mergepipe.storage import copied
from mergepipe.storage.checkpoint import Checkpoint, open_checkpoint
from mergepipe.storage.copied import copied_bytes, copy_store
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.virtual import open_store
from support.shards import CHUNK, SHAPES, write_shard, write_sharded


@pytest.fixture
def model(tmp_path: Path) -> tuple[Checkpoint, dict[str, bytes]]:
    data = write_sharded(tmp_path / "model")
    return open_checkpoint(tmp_path / "model"), data


def test_zarr_reads_every_tensor_bit_for_bit(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    checkpoint, data = model
    counts: list[int] = []
    copy_store(checkpoint, tmp_path / "copy", CHUNK, counts.append)
    assert sum(counts) == sum(map(len, data.values()))
    for group in (open_store(tmp_path / "copy"), zarr.open_group(tmp_path / "copy", mode="r")):
        for name, (dtype, shape) in SHAPES.items():
            array = group[name]
            assert isinstance(array, zarr.Array)
            assert array.shape == shape
            assert array.attrs["safetensors_dtype"] == dtype
            assert np.asarray(array[...]).tobytes() == data[name], name
        assert {name for name, _ in group.members(max_depth=None)} == {*SHAPES, "unet", "unet/down"}


def test_tensorstore_reads_it(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    checkpoint, data = model
    copy_store(checkpoint, tmp_path / "copy", CHUNK)
    for name, (dtype, shape) in SHAPES.items():
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path / "copy" / name)}}
        array = tensorstore.open(spec).result()
        assert array.shape == shape
        expected = "uint8" if DTYPES[dtype].role == "refused" else DTYPES[dtype].alias
        assert array.dtype.name == expected
        assert array.read().result().tobytes() == data[name], name


def test_the_manifest_points_to_the_raw_bytes(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    checkpoint, data = model
    manifest = copy_store(checkpoint, tmp_path / "copy", CHUNK)
    assert manifest.kind == "copy"
    virtual = virtual_manifest(checkpoint, CHUNK)
    manifest.save(tmp_path / "manifest.json")
    rng = np.random.default_rng(0)
    with MmapReader() as reader:
        for source in (manifest, ChunkManifest.load(tmp_path / "manifest.json")):
            assert list(source.arrays) == list(virtual.arrays)
            for name, array in source.arrays.items():
                itemsize = DTYPES[array.dtype].itemsize
                for start, stop in [(0, array.size), *np.sort(rng.integers(0, array.size + 1, (5, 2))).tolist()]:
                    with reader.window(source.segments(name, start, stop), last=True) as window:
                        assert window.tobytes() == data[name][start * itemsize : stop * itemsize]
    # The saved manifest of a copy opens as a group as well.
    group = open_store(tmp_path / "manifest.json")
    assert np.asarray(group["unet/down/weight"][...]).tobytes() == data["unet/down/weight"]


def test_size_on_disk_is_known_before(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    manifest = copy_store(model[0], tmp_path / "copy", CHUNK)
    assert sum(info.size for info in manifest.files) == copied_bytes(virtual_manifest(model[0], CHUNK))


def test_all_zero_chunks_are_written(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"x": ("BF16", (64, 8))})
    path = tmp_path / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:-1024] + bytes(1024))
    manifest = copy_store(open_checkpoint(tmp_path), tmp_path / "copy", 128)
    assert len(manifest.files) == 8
    assert sorted(p.name for p in (tmp_path / "copy" / "x").iterdir()) == sorted(
        ["zarr.json", *(f"c.{i}.0" for i in range(8))]
    )


def test_damage_is_found_by_the_checksum(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    manifest = copy_store(model[0], tmp_path / "copy", CHUNK)
    path = Path(manifest.files[manifest.arrays["model.layers.0.up.weight"].files[2]].path)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    array = open_store(tmp_path / "copy")["model.layers.0.up.weight"]
    with pytest.raises(ValueError, match="checksum"):
        array[...]


def test_metadata_appears_only_after_its_chunks(
    model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made durable, in order: chunks, then their zarr.json, then the root's, then the name."""
    events: list[str] = []
    part = tmp_path / "copy.part"

    def fsync(path: Path) -> None:
        events.append(f"sync {Path(path).relative_to(tmp_path)}")

    def write(path: Path, data: bytes) -> None:
        assert json.loads(data)["zarr_format"] == 3
        events.append(f"write {path.relative_to(tmp_path)}")
        path.write_bytes(data)

    monkeypatch.setattr(copied, "fsync_path", fsync)
    monkeypatch.setattr(copied, "write_atomic", write)
    seen: list[int] = []

    def on_bytes(count: int) -> None:
        seen.append(count)
        assert not (part / "zarr.json").exists()
        assert not (tmp_path / "copy").exists()

    copy_store(model[0], tmp_path / "copy", CHUNK, on_bytes)
    assert len(seen) == sum(event.startswith("sync copy.part/") and "/c" in event for event in events)
    for name in SHAPES:
        chunks = [i for i, event in enumerate(events) if event.startswith(f"sync copy.part/{name}/c")]
        document = events.index(f"write copy.part/{name}/zarr.json")
        assert all(i < document for i in chunks)
    writes = [event for event in events if event.startswith("write")]
    assert writes[-3:] == [f"write copy.part/{key}" for key in ("unet/down/zarr.json", "unet/zarr.json", "zarr.json")]
    assert events[-1] == "sync ."


class Stop(BaseException):
    """Stands for a Ctrl-C."""


def test_an_interrupted_copy_leaves_nothing(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    counts: list[int] = []

    def stop(count: int) -> None:
        counts.append(count)
        if len(counts) == 20:
            raise Stop

    with pytest.raises(Stop):
        copy_store(model[0], tmp_path / "copy", CHUNK, stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_killed_copy_is_no_store_and_is_replaced(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    script = (
        "import os, sys; from mergepipe.storage.checkpoint import open_checkpoint\n"
        "from mergepipe.storage.copied import copy_store\n"
        "count = 0\n"
        "def on_bytes(n):\n"
        "    global count; count += 1\n"
        "    if count == 40: os.kill(os.getpid(), 9)\n"
        f"copy_store(open_checkpoint(sys.argv[1]), sys.argv[2], {CHUNK}, on_bytes)"
    )
    arguments = [sys.executable, "-c", script, str(model[0].root), str(tmp_path / "copy")]
    assert subprocess.run(arguments, check=False).returncode == -9
    part = tmp_path / "copy.part"
    assert not (tmp_path / "copy").exists()
    assert part.is_dir()
    assert not (part / "zarr.json").exists()
    for document in part.rglob("zarr.json"):
        array = zarr.open_array(document.parent, mode="r")
        assert array.nchunks == sum(path.name.startswith("c") for path in document.parent.iterdir())
    copy_store(model[0], tmp_path / "copy", CHUNK)
    assert not part.exists()
    assert np.asarray(open_store(tmp_path / "copy")["model.last"][...]).tobytes() == model[1]["model.last"]


@pytest.mark.parametrize("what", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(what: str, model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    target = tmp_path / "copy"
    if what == "folder":
        target.mkdir()
    elif what == "file":
        target.write_text("mine")
    else:
        target.symlink_to("nothing")
    with pytest.raises(OutputExistsError, match="exists already"):
        copy_store(model[0], target, CHUNK)


def test_a_full_disk_is_found_before_the_first_byte(
    model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(DiskFullError, match=r"needs .* bytes"):
        copy_store(model[0], tmp_path / "copy", CHUNK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_a_disk_that_fills_up_meanwhile(
    model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copied, "fsync_path", full)
    with pytest.raises(DiskFullError, match="no room"):
        copy_store(model[0], tmp_path / "copy", CHUNK)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_input_that_was_truncated_meanwhile(model: tuple[Checkpoint, dict[str, bytes]], tmp_path: Path) -> None:
    checkpoint, _ = model
    os.truncate(checkpoint.files[1].path, checkpoint.files[1].size - 1)
    with pytest.raises(ShortReadError) as caught:
        copy_store(checkpoint, tmp_path / "copy", CHUNK)
    assert any("while working on tensor" in note for note in caught.value.__notes__)
    assert not (tmp_path / "copy.part").exists()


def test_every_bfloat16_pattern_survives(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"x": ("BF16", (256, 256))})
    path = tmp_path / "model.safetensors"
    patterns = np.arange(65536, dtype="<u2")
    path.write_bytes(path.read_bytes()[: -patterns.nbytes] + patterns.tobytes())
    copy_store(open_checkpoint(tmp_path), tmp_path / "copy", 9000)
    found = np.asarray(open_store(tmp_path / "copy")["x"][...])
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found.view(np.uint16).ravel(), patterns)


def test_a_checkpoint_without_tensors(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {})
    manifest = copy_store(open_checkpoint(tmp_path), tmp_path / "copy")
    assert manifest.files == ()
    assert list(open_store(tmp_path / "copy")) == []
