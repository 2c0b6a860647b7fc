"""PyTorch files are byte ranges like any other, and a pickle that is more than weights is refused unexecuted."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.manifest import virtual_manifest
from mergepipe.storage.pickled import MAX_PICKLE_BYTES, read_pickled
from mergepipe.storage.readers import MmapReader

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip


def weights() -> OrderedDict[str, torch.Tensor]:
    """One tensor of every type, and the odd cases."""
    generator = torch.Generator().manual_seed(0)
    found: OrderedDict[str, torch.Tensor] = OrderedDict()
    for dtype in DTYPES:
        found[f"layer.{str(dtype)[6:]}"] = torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
    whole = torch.randn(10, 4, generator=generator)
    found["whole"], found["rows"] = whole, whole[3:7]
    found["parameter"] = torch.nn.Parameter(torch.randn(6, generator=generator))
    found["scalar"], found["empty"] = torch.tensor(2.5), torch.zeros(0, 3)
    found["one_wide"] = torch.randn(5, 1, generator=generator).t().t()
    return found


def test_every_tensor_is_read_from_where_it_lies(tmp_path: Path) -> None:
    """Byte for byte what torch.load gives, through the ordinary manifest and reader; offsets can be mapped."""
    expected = weights()
    torch.save(expected, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == expected.keys()
    manifest = virtual_manifest(checkpoint)
    with MmapReader() as reader:
        for name, tensor in expected.items():
            entry = checkpoint.tensors[name]
            assert entry.shape == tuple(tensor.shape)
            with reader.window(manifest.segments(name, 0, tensor.numel()), last=True) as window:
                plain = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                np.testing.assert_array_equal(window, plain.numpy())
    assert manifest.is_mappable


def test_shards_with_an_index(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = open_checkpoint(tmp_path)
    assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {"a": 0, "b": 1}
    assert len({info.header_sha256 for info in checkpoint.files}) == 2


def test_safetensors_win_and_leftovers_of_trainers_do_not_count(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "weights.bin")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    assert list(open_checkpoint(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize(("config", "names"), [({}, ["emb", "head"]), ({"x": 1}, ["emb"])], ids=["raw", "model"])
def test_tied_tensors(config: dict[str, Any], names: list[str], tmp_path: Path) -> None:
    """With a configuration that may tie, the second name of the same bytes is left out; of a raw dict none is."""
    tied = torch.randn(4, 4)
    torch.save({"emb": tied, "head": tied}, tmp_path / "pytorch_model.bin")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    assert list(checkpoint.tensors) == names
    assert checkpoint.twins == ({"head": "emb"} if config else {})
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": false}')
    assert list(open_checkpoint(tmp_path).tensors) == ["emb", "head"]


def test_a_state_dict_under_its_key(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(2)}}, tmp_path / "last.ckpt")
    found = read_pickled(tmp_path / "last.ckpt")
    assert ([tensor.name for tensor in found.tensors], found.left_out) == (["a"], ("epoch",))


def test_a_changed_weight_changes_the_fingerprint(tmp_path: Path) -> None:
    digests = set()
    for value in (0.0, 1.0):
        torch.save({"a": torch.full((3,), value)}, tmp_path / "x.bin")
        digests.add(read_pickled(tmp_path / "x.bin").sha256)
    assert len(digests) == 2


class Attack:
    """Runs when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call


def _touch(path: str) -> None:
    Path(path).write_text("executed", encoding="utf-8")


REFUSED: dict[str, tuple[Any, str]] = {
    "a model": (torch.nn.Linear(2, 2), r"asks for 'torch\.nn\.modules\.linear\.Linear'"),
    "bytearray": ({"a": Attack(bytearray, 1 << 40)}, r"asks for '\w*\.bytearray'"),
    "eval": ({"a": Attack(eval, "1")}, r"asks for '\w*\.eval'"),
    "a number": ({"a": torch.zeros(1), "b": 3}, "'b' is a int, no tensor"),
    "a number as name": ({1: torch.zeros(1)}, "'1' is a Tensor, no tensor"),
    "a list": ([torch.zeros(1)], "holds a list"),
    "a tensor": (torch.zeros(1), "expected a state dict"),
    "transposed": ({"w": torch.zeros(3, 4).t()}, r"'w' is not contiguous .*\.contiguous\(\)"),
    "expanded": ({"w": torch.zeros(3, 1).expand(3, 4)}, "'w' is not contiguous"),
    "complex": ({"w": torch.zeros(2, dtype=torch.complex64)}, r"'w' is torch\.complex64"),
    "sparse": ({"w": torch.eye(3).to_sparse()}, "asks for|can't be read|only plain"),
    "a path as name": ({"../w": torch.zeros(1)}, "path segment"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_plain_state_dict_is_refused(case: str, tmp_path: Path) -> None:
    value, message = REFUSED[case]
    torch.save(value, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "pytorch_model.bin" in str(caught.value)


def repacked(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write a PyTorch file again with other entries: by their names without the archive's."""
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    folder = next(iter(entries)).partition("/")[0]
    entries |= {f"{folder}/{name}": data for name, data in change.items() if data is not None}
    for name in (name for name, data in change.items() if data is None):
        del entries[f"{folder}/{name}"]
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in entries.items():
            new.writestr(name, data)


def test_code_is_named_and_never_executed(tmp_path: Path) -> None:
    """Whatever protocol the pickle is of, and whichever way it names the function."""
    witness, path = tmp_path / "witness", tmp_path / "pytorch_model.bin"
    for protocol in range(6):
        torch.save({"a": torch.zeros(2)}, path)
        repacked(path, {"data.pkl": pickle.dumps({"a": Attack(_touch, str(witness))}, protocol)})
        with pytest.raises(CheckpointError, match="nothing of it was executed"):
            open_checkpoint(tmp_path)
    torch.save({"a": torch.zeros(2)}, path)
    repacked(path, {"data.pkl": b"(S'" + str(witness).encode() + b"'\niposix\nsystem\n."})
    with pytest.raises(CheckpointError, match=r"posix\.system"):
        open_checkpoint(tmp_path)
    assert not witness.exists()


LIES: dict[str, tuple[dict[str, bytes | None], str]] = {
    "a shorter storage": ({"data/0": bytes(4)}, "but its entry is 4 bytes long"),
    "a longer storage": ({"data/0": bytes(400)}, "but its entry is 400 bytes long"),
    "no storage": ({"data/0": None}, "can't be read|but its entry is"),
    "no pickle": ({"data.pkl": None}, r"without data\.pkl"),
    "an empty pickle": ({"data.pkl": b""}, "damaged"),
    "half a pickle": ({"data.pkl": b"\x80\x02}q\x00X"}, "damaged"),
    "a pickle of nonsense": ({"data.pkl": b"\xff" * 50}, "damaged"),
    "a stack that is empty": ({"data.pkl": b"\x80\x02."}, "damaged|can't be read"),
    "a pickle too long": ({"data.pkl": b"0" * (MAX_PICKLE_BYTES + 1)}, "at most"),
    "what torch does not know": ({"data.pkl": pickle.dumps({"a": frozenset([1])}, 4)}, "other things than tensors"),
    "a big-endian file": ({"byteorder": b"big"}, "byte order"),
    "a program": ({"constants.pkl": b""}, "TorchScript"),
}


@pytest.mark.parametrize("case", LIES)
def test_files_that_lie(case: str, tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0)}, path)
    repacked(path, LIES[case][0])
    with pytest.raises(CheckpointError, match=LIES[case][1]) as caught:
        open_checkpoint(tmp_path)
    assert "weights_only=False" not in str(caught.value), "torch's advice is to run what the file holds"


def test_sizes_near_the_end_of_64_bits(tmp_path: Path) -> None:
    """A pickle that claims more than its storage has, by shape, by offset or by the storage's own size."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(77.0)}, path)
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        plain = archive.read(name)
    count = b"KM"
    assert plain.count(count) == 2  # elements of the storage, and the shape
    first, second, rest = plain.split(count)
    for size in (78, 2**31, 2**62, 2**63, 2**70):
        lie = pickle.dumps(size, 2)[2:-1]
        for left, right in ((lie, count), (count, lie), (lie, lie)):
            repacked(path, {"data.pkl": first + left + second + right + rest})
            with pytest.raises(CheckpointError):
                open_checkpoint(tmp_path)


def test_compressed_entries(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    repacked(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="is compressed"):
        open_checkpoint(tmp_path)


def test_the_format_before_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"format of torch before 1\.6.*save it again"):
        open_checkpoint(tmp_path)


def test_every_truncation_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0)}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_damaged_directories(tmp_path: Path) -> None:
    """A flipped byte anywhere in the directory is an error or changes no tensor's place."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0)}, path)
    whole = path.read_bytes()
    start = struct.unpack("<L", whole[-6:-2])[0]
    expected = read_pickled(path).tensors
    for position in range(start, len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            found = read_pickled(path).tensors
        except CheckpointError:
            continue
        assert found == expected, position


def test_large_files_have_a_large_directory(tmp_path: Path) -> None:
    """Beyond 4 GiB sizes and offsets are in extra fields; a sparse file has them, too."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.arange(12.0), "b": torch.ones(3)}, path)
    with zipfile.ZipFile(path) as archive:
        data = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("z/filler", b"")
        hole = 5 << 30
        archive.fp.seek(hole)  # type: ignore[union-attr]
        archive.start_dir = hole
        for name, content in data.items():
            archive.writestr("z/" + name.partition("/")[2], content)
    found = {tensor.name: tensor for tensor in read_pickled(path).tensors}
    assert found["a"].offset > hole
    with path.open("rb") as file:
        file.seek(found["a"].offset)
        assert np.array_equal(np.frombuffer(file.read(48), np.float32), np.arange(12.0))


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointNotFoundError):
        open_checkpoint(tmp_path)
