"""Any chunk, any order, the same file; a name only for what is whole."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergepipe.errors import DamageError, DiskFullError
from mergepipe.storage.checksum import crc32c
from mergepipe.storage.layout import OutputTensor, ShardLayout, lay_out
from mergepipe.storage.writer import ShardWriter, crc32c_of_range, matches, publish_part


@pytest.fixture
def layout() -> ShardLayout:
    tensors = [OutputTensor("a", "F32", (1000, 70)), OutputTensor("b", "F16", (5003,)), OutputTensor("c", "F32", ())]
    return lay_out([tensors], {"format": "pt"}).shards[0]


def values(layout: ShardLayout) -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    return {
        t.name: rng.standard_normal(t.nbytes // 4 + 1).astype(np.float32).tobytes()[: t.nbytes] for t in layout.tensors
    }


def fill(writer: ShardWriter, layout: ShardLayout, seed: int, step: int) -> None:
    data = values(layout)
    pieces = [(t, at) for t in layout.tensors for at in range(0, t.nbytes, step)]
    random.Random(seed).shuffle(pieces)
    for tensor, at in pieces:
        piece = np.frombuffer(data[tensor.name][at : at + step], np.uint8)
        writer.write(tensor.offset + at, piece)


def test_any_order_the_same_file(layout: ShardLayout, tmp_path: Path) -> None:
    digests = set()
    for seed, step in enumerate((512, 4096, 65_537, 10**7)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        writer = ShardWriter(folder, layout)
        fill(writer, layout, seed, step)
        writer.sync()
        sealed = writer.seal()
        assert [path.name for path in folder.iterdir()] == ["model.safetensors.part"], "no name before it is published"
        writer.publish()
        writer.close()
        path = folder / "model.safetensors"
        assert os.listdir(folder) == [path.name]
        assert sealed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert sealed.size == path.stat().st_size
        assert matches(path, sealed, "full")
        digests.add(sealed.sha256)
        assert {name: array.tobytes() for name, array in load_file(path).items()} == values(layout)
    assert len(digests) == 1


def test_goes_on_with_what_is_there(layout: ShardLayout, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, layout)
    fill(writer, layout, 0, 4096)
    writer.close()
    again = ShardWriter(tmp_path, layout)
    assert again.seal().sha256 is not None
    again.publish()
    assert {name: array.tobytes() for name, array in load_file(tmp_path / layout.file).items()} == values(layout)


def test_damage_is_seen_at_sealing(layout: ShardLayout, tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, layout)
    writer.write(20, np.frombuffer(b"XXXX", np.uint8))
    with pytest.raises(DamageError, match="after sealing"):
        writer.seal(sha256=False)
    os.truncate(writer.part, layout.size - 1)
    with pytest.raises(DamageError, match="expected"):
        writer.seal(sha256=False)
    writer.close()
    assert not writer.final.exists()


def test_no_room(layout: ShardLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match="make room and run again"):
        ShardWriter(tmp_path, layout)


def test_the_file_belongs_to_its_user(layout: ShardLayout, tmp_path: Path) -> None:
    """Modes like those of any other file of the user."""
    before = os.umask(0o027)
    try:
        writer = ShardWriter(tmp_path, layout)
        (tmp_path / "plain").touch()
    finally:
        os.umask(before)
    assert writer.part.stat().st_mode == (tmp_path / "plain").stat().st_mode
    writer.close()


def test_checksums_of_ranges(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"..123456789")
    assert crc32c_of_range(path, 2, 9) == crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283
    assert crc32c_of_range(path, 2, 900) == 0xE3069283, "of what there is"


def test_publishing_twice_is_fine(tmp_path: Path) -> None:
    (tmp_path / "m.part").write_bytes(b"x")
    publish_part(tmp_path / "m")
    publish_part(tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"x"
