"""The virtual store, through zarr itself and through stock kerchunk readers."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import zarr
from zarr.abc.store import OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.dtype import data_type_registry

from mergepipe.errors import CheckpointNotFoundError, ShortReadError, WorkspaceError
from mergepipe.storage import readers, virtual, zdtype
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.kerchunk import write_references
from mergepipe.storage.manifest import ChunkManifest, Segment, virtual_manifest
from mergepipe.storage.virtual import VirtualStore, open_store
from support.shards import CHUNK, SHAPES, write_shard, write_sharded


def native(dtype: str) -> np.dtype[Any]:
    return np.dtype("u1") if DTYPES[dtype].role == "refused" else DTYPES[dtype].numpy


def assert_every_tensor(group: zarr.Group, data: dict[str, bytes]) -> None:
    for name, (dtype, shape) in SHAPES.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == shape
        assert array.dtype == native(dtype)
        assert array.attrs["safetensors_dtype"] == dtype
        assert np.asarray(array[...]).tobytes() == data[name], name


@pytest.fixture
def model(tmp_path: Path) -> tuple[ChunkManifest, dict[str, bytes]]:
    data = write_sharded(tmp_path / "model")
    return virtual_manifest(open_checkpoint(tmp_path / "model"), CHUNK), data


@pytest.mark.parametrize("target", [1, 100, CHUNK, 2**23])
def test_zarr_reads_every_tensor_bit_for_bit(target: int, tmp_path: Path) -> None:
    shapes = {name: kind for name, kind in SHAPES.items() if target > 1 or math.prod(kind[1]) < 600}
    data = write_shard(tmp_path / "model.safetensors", shapes)
    store = VirtualStore(virtual_manifest(open_checkpoint(tmp_path), target))
    group = zarr.open_group(store, mode="r")
    for name, (dtype, shape) in shapes.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert array.shape == shape
        assert array.dtype == native(dtype)
        assert np.asarray(array[...]).tobytes() == data[name], name


def test_selections_are_numpys(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    manifest, data = model
    group = zarr.open_group(VirtualStore(manifest), mode="r")
    name = "model.embed.weight"
    expected = np.frombuffer(data[name], ml_dtypes.bfloat16).reshape(SHAPES[name][1])
    array = group[name]
    for selection in [np.s_[5], np.s_[250:], np.s_[3:200:7, 5:9], np.s_[:, 47], np.s_[256:257]]:
        assert np.asarray(array[selection]).tobytes() == expected[selection].tobytes()


def test_the_hierarchy_lists_what_it_holds(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    group = zarr.open_group(VirtualStore(model[0]), mode="r")
    members = dict(group.members(max_depth=None))
    assert {name for name, node in members.items() if isinstance(node, zarr.Array)} == set(SHAPES)
    assert {name for name, node in members.items() if isinstance(node, zarr.Group)} == {"unet", "unet/down"}
    assert "model.scale" in group
    assert "model.nothing" not in group


def test_every_listed_key_exists_and_has_a_value(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    store = VirtualStore(model[0])

    async def check() -> None:
        keys = [key async for key in store.list()]
        assert len(keys) == len(set(keys))
        assert [key async for key in store.list_prefix("unet/")] == [key for key in keys if key.startswith("unet/")]
        assert [key async for key in store.list_dir("unet/down")] == ["zarr.json", "weight", "bias"]
        children = [child async for child in store.list_dir("model.scale")]
        assert children == ["zarr.json", "c"]
        for key in keys:
            assert await store.exists(key)
            value = await store.get(key, default_buffer_prototype())
            assert value is not None
            assert len(value) > 0
        chunks = [key for key in keys if not key.endswith("zarr.json")]
        assert len(chunks) == sum(len(array.lengths) for array in model[0].arrays.values())

    asyncio.run(check())


@pytest.mark.parametrize(
    "key",
    [
        "", "x", "x/zarr.json", "unet", "unet/c", "unet/down/c.0.0", "model.scale/c.0", "model.scale/d",
        "model.empty/c.0.0", "model.mask/c", "model.mask/c.0", "model.mask/c.0.0.0", "model.mask/c.1.0",
        "model.mask/c.0.1", "model.mask/c.-1.0", "model.mask/c.00.0", "model.mask/c.+0.0", "model.mask/c.0.²",
        "model.mask/c/0/0", "model.mask/c.0.0/",
    ],
)  # fmt: skip
def test_other_keys_do_not_exist(key: str, model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    store = VirtualStore(model[0])
    assert sync(store.get(key, default_buffer_prototype())) is None
    assert not sync(store.exists(key))


def test_byte_ranges(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    store = VirtualStore(model[0])
    array = model[0].arrays["model.embed.weight"]
    last = len(array.lengths) - 1
    for key in ("zarr.json", f"model.embed.weight/c.{last}.0", "model.embed.weight/c.0.0"):
        whole = sync(store.get(key, default_buffer_prototype())).to_bytes()
        for request, expected in [
            (RangeByteRequest(3, 40), whole[3:40]),
            (RangeByteRequest(10, 10**9), whole[10:]),
            (RangeByteRequest(10**9, 10**9 + 1), b""),
            (OffsetByteRequest(60), whole[60:]),
            (SuffixByteRequest(7), whole[-7:]),
            (SuffixByteRequest(10**9), whole),
        ]:
            assert sync(store.get(key, default_buffer_prototype(), request)).to_bytes() == expected
    # The padded part of the last chunk reads as zeros, not as the tensor that follows in the file.
    padded = sync(store.get(f"model.embed.weight/c.{last}.0", default_buffer_prototype())).to_bytes()
    valid = int(array.lengths[last])
    assert len(padded) > valid
    assert padded[valid:] == bytes(len(padded) - valid)


def test_it_is_read_only(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    store = VirtualStore(model[0])
    group = zarr.open_group(store, mode="r")
    with pytest.raises(ValueError, match="read-only"):
        group["model.mask"][:] = True
    with pytest.raises(ValueError, match="read-only"):
        group.create_array("new", shape=(1,), dtype="f4")
    with pytest.raises(ValueError, match="read-only"):
        sync(store.delete("zarr.json"))
    with pytest.raises(ValueError, match="never writable"):
        store.with_read_only(False)


def test_it_can_be_pickled(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    store = pickle.loads(pickle.dumps(VirtualStore(model[0])))
    assert_every_tensor(zarr.open_group(store, mode="r"), model[1])


def chunk_of(store: VirtualStore, key: str) -> np.ndarray[Any, Any]:
    found = sync(store.get(key, default_buffer_prototype()))
    assert found is not None
    return np.asarray(found.as_numpy_array())


@pytest.fixture(params=["cached", "not cached"])
def large(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[ChunkManifest, dict[str, bytes]]:
    """Two tensors of two chunks of 2 MiB each, one at an odd place; the page cache is said to hold them or not."""
    monkeypatch.setattr(virtual, "in_page_cache", lambda *_: request.param == "cached")
    data = write_shard(
        tmp_path / "model.safetensors", {"w": ("U8", (4, 2**20)), "x": ("U8", (3,)), "y": ("U8", (4, 2**20))}
    )
    return virtual_manifest(open_checkpoint(tmp_path), 2**21), data


def test_whole_chunks_are_windows_onto_the_file(large: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    """No byte is copied: what is written into the file shows."""
    manifest, data = large
    store = VirtualStore(manifest)
    first, second = chunk_of(store, "w/c.0.0"), chunk_of(store, "w/c.1.0")
    assert first.tobytes() + second.tobytes() == data["w"]
    assert not first.flags.writeable
    store.close()
    with open(manifest.files[0].path, "r+b") as file:
        file.seek(int(manifest.arrays["w"].offsets[1]) + 5)
        file.write(bytes([second[5] ^ 255]))
    assert second[5] == data["w"][2**21 + 5] ^ 255
    assert first.tobytes() == data["w"][: 2**21]


def test_only_what_may_wait_for_the_disk_is_left_to_a_thread(
    large: tuple[ChunkManifest, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def remember(fd: int, segment: Segment) -> None:
        threads.append(threading.current_thread())

    monkeypatch.setattr(readers, "check_size", remember)
    store = VirtualStore(large[0])

    async def both() -> None:
        for key in ("w/c.0.0", "y/c.0.0"):
            await store.get(key, default_buffer_prototype())

    asyncio.run(both())
    cached = virtual.in_page_cache(-1, Segment("", 0, 1))
    assert [thread is threading.current_thread() for thread in threads] == [cached, cached]


def test_chunks_at_odd_places_are_copied(large: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    manifest, data = large
    assert manifest.arrays["y"].offsets[0] % 8
    store = VirtualStore(manifest)
    found = [chunk_of(store, f"y/c.{number}.0") for number in range(2)]
    assert b"".join(part.tobytes() for part in found) == data["y"]
    assert all(part.ctypes.data % 8 == 0 for part in found)


def test_what_zarr_reads_is_its_own(large: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    manifest, data = large
    array = zarr.open_group(VirtualStore(manifest), mode="r")["w"]
    assert isinstance(array, zarr.Array)
    whole, chunk = np.asarray(array[...]), np.asarray(array[:2])
    os.truncate(manifest.files[0].path, 4000)
    assert whole.tobytes() == data["w"]
    assert chunk.tobytes() == data["w"][: 2**21]


def test_chunks_are_copied_where_no_more_can_be_mapped(
    large: tuple[ChunkManifest, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_more(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(readers.mmap, "mmap", no_more)
    found = chunk_of(VirtualStore(large[0]), "w/c.0.0")
    assert found.tobytes() == large[1]["w"][: 2**21]


@pytest.mark.parametrize("left", [0, 2**21, 2**22])
def test_a_truncated_shard_is_an_error_for_mapped_chunks(
    large: tuple[ChunkManifest, dict[str, bytes]], left: int
) -> None:
    manifest, _ = large
    os.truncate(manifest.files[0].path, left)
    with pytest.raises(ShortReadError):
        chunk_of(VirtualStore(manifest), "w/c.1.0")


def test_a_truncated_shard_is_an_error(model: tuple[ChunkManifest, dict[str, bytes]]) -> None:
    manifest, _ = model
    os.truncate(manifest.files[0].path, 4000)
    with pytest.raises(ShortReadError):
        zarr.open_group(VirtualStore(manifest), mode="r")["model.embed.weight"][:]


def test_open_store_on_a_saved_manifest(model: tuple[ChunkManifest, dict[str, bytes]], tmp_path: Path) -> None:
    manifest, data = model
    manifest.save(tmp_path / "manifest.json")
    before = sorted(tmp_path.rglob("*"))
    assert_every_tensor(open_store(tmp_path / "manifest.json"), data)
    assert sorted(tmp_path.rglob("*")) == before, "no zarr.json may appear on disk"


def test_open_store_on_something_else(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        open_store(tmp_path / "nothing")
    with pytest.raises(CheckpointNotFoundError, match=r"holds no store"):
        open_store(tmp_path)
    (tmp_path / "x").write_text("x")
    with pytest.raises(WorkspaceError):
        open_store(tmp_path / "x")


def test_an_altered_entry_is_followed(model: tuple[ChunkManifest, dict[str, bytes]], tmp_path: Path) -> None:
    manifest, data = model
    path = tmp_path / "manifest.json"
    manifest.save(path)
    document = json.loads(path.read_text(encoding="utf-8"))
    entry = document["arrays"]["model.layers.0.up.weight"]
    entry["offsets"][0], entry["offsets"][1] = entry["offsets"][1], entry["offsets"][0]
    path.write_text(json.dumps(document))
    found = np.asarray(open_store(path)["model.layers.0.up.weight"][...]).tobytes()
    first, second = entry["lengths"][:2]
    original = data["model.layers.0.up.weight"]
    assert found == original[first : first + second] + original[:first] + original[first + second :]


@pytest.mark.filterwarnings("ignore:.*asynchronous.*")
def test_stock_kerchunk_reader(model: tuple[ChunkManifest, dict[str, bytes]], tmp_path: Path) -> None:
    from fsspec.implementations.reference import ReferenceFileSystem
    from zarr.storage import FsspecStore

    manifest, data = model
    path = tmp_path / "references.json"
    write_references(manifest, path)
    references = json.loads(path.read_bytes())
    inlined = [key for key, value in references.items() if isinstance(value, str) and value.startswith("base64:")]
    assert inlined, "the last tensor of a file is padded beyond its end"
    assert len(inlined) <= 2 * len(manifest.files)
    fs = ReferenceFileSystem(fo=json.loads(path.read_text(encoding="utf-8")), asynchronous=True)
    store = FsspecStore(fs, read_only=True, path="")
    assert_every_tensor(zarr.open_group(store, mode="r"), data)


READ_ALONE = """
import json, sys
import zarr
from fsspec.implementations.reference import ReferenceFileSystem
from zarr.storage import FsspecStore
from mergepipe.storage import zdtype
zdtype.register()
with open(sys.argv[1]) as file:
    fs = ReferenceFileSystem(json.load(file), asynchronous=True)
group = zarr.open_group(FsspecStore(fs, path="", read_only=True), mode="r")
print(str(group[sys.argv[2]].dtype), group[sys.argv[2]][...].tobytes().hex())
assert "mergepipe.storage.virtual" not in sys.modules
"""


def test_a_stock_reader_needs_the_data_type_alone(
    model: tuple[ChunkManifest, dict[str, bytes]], tmp_path: Path
) -> None:
    """References and zarr read bfloat16 in a process that knows nothing of ours but the data type."""
    manifest, data = model
    write_references(manifest, tmp_path / "references.json")
    name = next(name for name, (dtype, shape) in SHAPES.items() if dtype == "BF16" and math.prod(shape) > 1)
    command = [sys.executable, "-c", READ_ALONE, str(tmp_path / "references.json"), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["bfloat16", data[name].hex()]


def test_open_store_on_a_models_folder(model: tuple[ChunkManifest, dict[str, bytes]], tmp_path: Path) -> None:
    manifest, data = model
    (tmp_path / "0-base").mkdir()
    manifest.save(tmp_path / "0-base" / "manifest.json")
    assert_every_tensor(open_store(tmp_path / "0-base"), data)


def test_huge_empty_dimensions(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"x": ("U8", (2**62, 0))})
    manifest = virtual_manifest(open_checkpoint(tmp_path))
    array = zarr.open_group(VirtualStore(manifest), mode="r")["x"]
    assert isinstance(array, zarr.Array)
    assert array.shape == (2**62, 0)
    write_references(manifest, tmp_path / "references.json")
    assert len(json.loads((tmp_path / "references.json").read_bytes())) == 2


def test_bfloat16_data_type() -> None:
    zdtype.register()
    zdtype.register()
    assert [name for name in data_type_registry.contents if name == "bfloat16"] == ["bfloat16"]
    dtype = np.dtype(ml_dtypes.bfloat16)
    group = zarr.create_group(zarr.storage.MemoryStore())
    for fill in (1.5, math.nan, math.inf, -math.inf):
        array = group.create_array(f"x{fill}", shape=(5,), chunks=(2,), dtype=dtype, fill_value=fill)
        array[:2] = np.array([0.1, 3e38], dtype)
        again = group[f"x{fill}"]
        assert isinstance(again, zarr.Array)
        assert again.dtype == dtype
        np.testing.assert_array_equal(
            again[:].astype("f4"), np.array([0.1, 3e38, fill, fill, fill], dtype).astype("f4")
        )
    assert zdtype.BFloat16().from_json_scalar("0x7fc1", zarr_format=3).view(np.uint16) == 0x7FC1
    with pytest.raises(TypeError):
        zdtype.BFloat16().cast_scalar("text")
    with pytest.raises(ValueError, match="zarr format 2"):
        zarr.create_array(zarr.storage.MemoryStore(), shape=(1,), dtype=zdtype.BFloat16(), zarr_format=2)
