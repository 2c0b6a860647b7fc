"""Headers that are as they should be; those that lie are in tests/attacks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from mergepipe.errors import HeaderError
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import encode_header, parse_header, read_header, tensor_bytes
from support.shards import SHAPES, entry, raw_shard, write_shard


def test_reads_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype="<f4").reshape(2, 3), "a": np.arange(4, dtype="<i8"), "s": np.array(7, "<f2")}
    path = tmp_path / "x.safetensors"
    save_file(arrays, path, {"format": "np"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"format": "np"}
    assert {t.name for t in header.tensors} == set(arrays)
    for tensor in header.tensors:
        values = raw[header.data_start + tensor.start : header.data_start + tensor.stop]
        assert values == arrays[tensor.name].tobytes()
        assert tensor.shape == arrays[tensor.name].shape
    assert header.sha256 == hashlib.sha256(raw[8 : header.data_start]).hexdigest()


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    data = write_shard(path, SHAPES, align=4096)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(SHAPES)
        import torch

        for name, (_, shape) in SHAPES.items():
            tensor = file.get_tensor(name)
            assert tuple(tensor.shape) == shape
            assert tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() == data[name]


def test_tensors_come_in_the_order_of_their_bytes() -> None:
    header = raw_shard({"z": entry("U8", [2], 0, 2), "a": entry("U8", [3], 2, 5), "e": entry("U8", [0], 2, 2)})[8:]
    names = [tensor.name for tensor in parse_header(header, 8 + len(header) + 5, "x").tensors]
    assert names == ["z", "e", "a"]


def test_trailing_spaces_and_no_tensors() -> None:
    header = parse_header(b'{"__metadata__": {"a": "b"}}   ', 8 + 31, "x")
    assert header.tensors == ()
    assert header.metadata == {"a": "b"}
    assert header.data_start == 39


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=4)),
        max_size=6,
    ),
    st.sampled_from([1, 8, 64, 4096]),
    st.text("añ字\"'{}[],: ", min_size=1).filter(lambda name: name not in {".", ".."}),
)
def test_what_is_encoded_is_parsed_back(kinds: list[tuple[str, list[int]]], align: int, prefix: str) -> None:
    tensors = [(f"{prefix}{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds)]
    raw = encode_header(tensors, {"k": prefix}, align)
    assert len(raw) % align == 0
    size = sum(tensor_bytes(dtype, shape, "x") for _, dtype, shape in tensors)
    header = parse_header(raw[8:], len(raw) + size, "x")
    assert sorted((t.name, t.dtype, t.shape) for t in header.tensors) == sorted(tensors)
    assert header.data_start == len(raw)
    assert header.metadata == {"k": prefix}


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", "F32", (1,)), ("a", "F32", (1,))],
        [("__metadata__", "F32", (1,))],
        [("a", "F31", (1,))],
        [("a", "F32", (-1,))],
        [("../a", "F32", (1,))],
        [("a", "F32", (2**62,))],
    ],
)
def test_what_could_not_be_read_back_is_not_written(tensors: list[tuple[str, str, tuple[int, ...]]]) -> None:
    with pytest.raises(HeaderError):
        encode_header(tensors, {})


def test_json_is_compact_and_metadata_comes_first() -> None:
    raw = encode_header([("a", "F32", (1,))], {"format": "pt"}, 8)
    assert list(json.loads(raw[8:])) == ["__metadata__", "a"]
    assert b'"shape":[1]' in raw
