"""Opening folders as Hugging Face tools leave them behind."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.storage.checkpoint import open_checkpoint
from support.shards import SHAPES, write_shard, write_sharded

ONE = {"a": ("F32", (2, 3))}


def test_a_sharded_folder(tmp_path: Path) -> None:
    data = write_sharded(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.root == tmp_path
    assert [Path(info.path).name for info in checkpoint.files] == sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert list(checkpoint.tensors) == list(SHAPES)
    for name, tensor in checkpoint.tensors.items():
        assert (tensor.dtype, tensor.shape) == SHAPES[name]
        raw = Path(checkpoint.files[tensor.file].path).read_bytes()
        assert raw[tensor.offset : tensor.offset + tensor.nbytes] == data[name]
    assert checkpoint.config == {"model_type": "made-up", "limit": math.inf}  # Infinity stands in real configs


def test_fingerprints(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", ONE)
    (info,) = open_checkpoint(tmp_path).files
    found = (tmp_path / "model.safetensors").stat()
    assert (info.size, info.mtime_ns, info.inode) == (found.st_size, found.st_mtime_ns, found.st_ino)
    assert len(info.header_sha256) == 64


def test_a_relative_path_is_stored_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "model.safetensors", ONE)
    monkeypatch.chdir(tmp_path.parent)
    checkpoint = open_checkpoint(tmp_path.name)
    assert checkpoint.root == tmp_path
    assert checkpoint.files[0].path == str(tmp_path / "model.safetensors")


def test_a_hub_cache_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    data = write_sharded(blobs)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(blobs.iterdir())):
        blob = path.rename(blobs / f"{number:064x}")
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == set(data)
    assert all(info.path.startswith(str(snapshot)) for info in checkpoint.files)
    assert checkpoint.config["model_type"] == "made-up"


def test_the_single_file_wins_over_the_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    write_shard(tmp_path / "model.safetensors", ONE)
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


def test_one_file_of_another_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "diffusion_pytorch_model.safetensors", ONE)
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == ["a"]
    assert checkpoint.config == {}


def test_a_file_that_is_given_itself(tmp_path: Path) -> None:
    write_shard(tmp_path / "unet.safetensors", ONE)
    (tmp_path / "config.json").write_text('{"a": 1}')
    checkpoint = open_checkpoint(tmp_path / "unet.safetensors")
    assert (checkpoint.root, list(checkpoint.tensors), checkpoint.config) == (tmp_path / "unet.safetensors", ["a"], {})


def test_several_files_without_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", ONE)
    write_shard(tmp_path / "y.safetensors", ONE)
    with pytest.raises(CheckpointError, match=r"2 other shards: x\.safetensors, y\.safetensors"):
        open_checkpoint(tmp_path)


def test_missing_things_say_what_and_where(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"nowhere' does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"holds no model\.safetensors"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, but not one of weights"):
        open_checkpoint(tmp_path / "notes.txt")
    assert issubclass(CheckpointNotFoundError, FileNotFoundError)


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", ONE)
    (tmp_path / "model.safetensors").chmod(0)
    if os.access(tmp_path / "model.safetensors", os.R_OK):
        pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match="can't be opened"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"'])
def test_a_config_that_is_none(text: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", ONE)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_a_shard_order_that_is_not_the_index_order(tmp_path: Path) -> None:
    write_shard(tmp_path / "m-1.safetensors", {"z": ("F32", (2,))})
    write_shard(tmp_path / "m-2.safetensors", {"a": ("F32", (2,))})
    weight_map = {"a": "m-2.safetensors", "z": "m-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert list(open_checkpoint(tmp_path).tensors) == ["z", "a"]
