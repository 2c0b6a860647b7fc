"""Files from strangers that lie about themselves: each is an error with a message, quickly and in little memory."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, HeaderError
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.header import MAX_HEADER_BYTES, Header, parse_header, read_header
from support.shards import SHAPES, entry, raw_shard, write_shard

X = entry("F32", [2], 0, 8)
DATA = bytes(8)

LIES: dict[str, bytes] = {
    "zero length": b"",
    "seven bytes": bytes(7),
    "length only": bytes(8),
    "header length 2^64 - 1": raw_shard({"x": X}, DATA, 2**64 - 1),
    "header length 2^63": raw_shard({"x": X}, DATA, 2**63),
    "header length over the limit": raw_shard({"x": X}, DATA, MAX_HEADER_BYTES + 1),
    "header length beyond the file": raw_shard({"x": X}, DATA, 10_000),
    "header length one short": raw_shard('{"x":{}}', DATA, 7),
    "truncated data": raw_shard({"x": X}, DATA[:-1]),
    "no data": raw_shard({"x": X}),
    "trailing byte": raw_shard({"x": X}, DATA + b"!"),
    "data without tensors": raw_shard({}, b"!"),
    "not JSON": raw_shard("{x}"),
    "JSON cut off": raw_shard('{"x": {"dtype"'),
    "two JSON texts": raw_shard("{} {}"),
    "a list": raw_shard([]),
    "null": raw_shard("null"),
    "leading space": raw_shard(" {}"),
    "byte order mark": raw_shard(b"\xef\xbb\xbf{}"),
    "UTF-16": raw_shard('{"x": 1}'.encode("utf-16-le")),
    "bad UTF-8": raw_shard(b'{"\xff": 1}'),
    "overlong UTF-8": raw_shard(b'{"\xc0\xaf": 1}'),
    "NaN": raw_shard('{"x": NaN}'),
    "deep arrays": raw_shard('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}"),
    "deep objects": raw_shard('{"x":' * 50_000 + "1" + "}" * 50_000),
    "huge integer": raw_shard('{"x": ' + "9" * 100_000 + "}"),
    "duplicate tensor": raw_shard(f'{{"x": {json.dumps(X)}, "x": {json.dumps(X)}}}', DATA),
    "duplicate dtype": raw_shard('{"x": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', DATA),
    "duplicate metadata": raw_shard('{"__metadata__": {"a": "b", "a": "c"}}'),
    "metadata of numbers": raw_shard({"__metadata__": {"a": 1}}),
    "metadata a list": raw_shard({"__metadata__": []}),
    "metadata nested": raw_shard({"__metadata__": {"a": {}}}),
    "entry not an object": raw_shard({"x": 1}, DATA),
    "entry without shape": raw_shard({"x": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
    "entry with more": raw_shard({"x": X | {"strides": [1]}}, DATA),
    "dtype unknown": raw_shard({"x": entry("F33", [2], 0, 8)}, DATA),
    "dtype lower case": raw_shard({"x": entry("f32", [2], 0, 8)}, DATA),
    "dtype a list": raw_shard({"x": entry(["F32"], [2], 0, 8)}, DATA),
    "shape null": raw_shard({"x": entry("F32", None, 0, 8)}, DATA),
    "shape of text": raw_shard({"x": entry("F32", ["2"], 0, 8)}, DATA),
    "shape of floats": raw_shard({"x": entry("F32", [2.0], 0, 8)}, DATA),
    "shape of bools": raw_shard({"x": entry("F32", [True, 2], 0, 8)}, DATA),
    "shape negative": raw_shard({"x": entry("F32", [-2], 0, 8)}, DATA),
    "shape twice negative": raw_shard({"x": entry("F32", [-1, -2], 0, 8)}, DATA),
    "shape 2^63": raw_shard({"x": entry("U8", [2**63], 0, 2**63)}, DATA),
    "shape wraps to 8 bytes": raw_shard({"x": entry("F32", [2**62, 4, 2], 0, 8)}, DATA),
    "shape wraps to 0": raw_shard({"x": entry("F32", [2**32, 2**32], 0, 0)}),
    "shape overflows beside a zero": raw_shard({"x": entry("F32", [2**62, 2**62, 0], 0, 0)}),
    "too many dimensions": raw_shard({"x": entry("F32", [1] * 65 + [2], 0, 8)}, DATA),
    "shape too small": raw_shard({"x": entry("F32", [1], 0, 8)}, DATA),
    "shape too large": raw_shard({"x": entry("F32", [3], 0, 8)}, DATA),
    "offsets reversed": raw_shard({"x": entry("F32", [2], 8, 0)}, DATA),
    "offsets negative": raw_shard({"x": entry("F32", [2], -8, 0)}, DATA),
    "offsets near 2^63": raw_shard({"x": entry("F32", [2], 2**63 - 8, 2**63)}, DATA),
    "offsets near 2^64": raw_shard({"x": entry("F32", [2], 2**64 - 8, 2**64)}, DATA),
    "offsets three": raw_shard({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, DATA),
    "offsets floats": raw_shard({"x": entry("F32", [2], 0.0, 8.0)}, DATA),
    "a hole at the start": raw_shard({"x": entry("F32", [2], 4, 12)}, bytes(12)),
    "a hole": raw_shard({"x": X, "y": entry("F32", [1], 12, 16)}, bytes(16)),
    "an overlap": raw_shard({"x": X, "y": entry("F32", [2], 4, 12)}, bytes(12)),
    "an alias": raw_shard({"x": X, "y": X}, DATA),
    "an empty one inside another": raw_shard({"x": X, "y": entry("F32", [0], 4, 4)}, DATA),
    "an empty one outside": raw_shard({"x": X, "y": entry("F32", [0], 2**40, 2**40)}, DATA),
}

NAMES = [
    "", ".", "..", "/", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "a\\b", "a\nb", "a\x00b", "\x1b[2J",
    "\x9b2J", "a/zarr.json", "\ud800", "n" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("raw", LIES.values(), ids=LIES.keys())
def test_lies_are_header_errors_that_name_the_file(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "liar.safetensors"
    path.write_bytes(raw)
    started = time.perf_counter()
    with pytest.raises(HeaderError) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_that_are_no_paths(name: str) -> None:
    raw = raw_shard({name: X})[8:]
    with pytest.raises(HeaderError, match="tensor name"):
        parse_header(raw, 8 + len(raw) + 8, "liar")


def test_a_header_that_says_it_is_valid_and_huge(tmp_path: Path) -> None:
    # A sparse file: 4 TiB long, nothing on disk. The header is right, so it opens, and nothing is read or allocated.
    raw = raw_shard({"x": entry("U8", [2**42], 0, 2**42)})
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    os.truncate(path, len(raw) + 2**42)
    assert read_header(path).tensors[0].stop == 2**42


@pytest.mark.parametrize("unit", ["[],", "0,", '"a",', "{},"], ids=["lists", "numbers", "texts", "objects"])
def test_json_that_swells_in_memory_is_refused_before_it_is_parsed(unit: str, tmp_path: Path) -> None:
    text = '{"x":[' + unit * (60_000_000 // len(unit)) + "0]}"
    path = tmp_path / "liar.safetensors"
    path.write_bytes(raw_shard(text))
    script = (
        "import sys; from mergepipe.storage.header import read_header; from mergepipe.errors import HeaderError\n"
        "try: read_header(sys.argv[1])\n"
        "except HeaderError as error: assert 'commas and brackets' in str(error); sys.exit(7)"
    )
    limit = 1 << 30

    def bounded() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # its threads reserve address space, which is limited here
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], preexec_fn=bounded, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 7, done.stderr.decode()


@given(st.binary(max_size=400))
def test_any_bytes_are_a_header_or_a_header_error(raw: bytes) -> None:
    with suppress(HeaderError):
        assert isinstance(parse_header(raw, 8 + len(raw), "x"), Header)


@given(st.data())
def test_a_damaged_header_is_valid_or_a_header_error(data: st.DataObject) -> None:
    good = bytearray(raw_shard({"__metadata__": {"format": "pt"}, "x": X, "y": entry("BF16", [3, 2], 8, 20)})[8:])
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(good), 8 + len(good) + 20, "x")
    except HeaderError:
        return
    # If it passes, it is as contiguous as any.
    assert [t.start for t in header.tensors] == [0, *(t.stop for t in header.tensors)][: len(header.tensors)]
    assert not header.tensors or header.tensors[-1].stop == 20


def folder_with(tmp_path: Path, weight_map: Any, names: tuple[str, ...] = ("a.safetensors", "b.safetensors")) -> Path:
    """Two honest shards (tensor `a` and tensor `b`) under an index that says what it likes."""
    for name in names:
        write_shard(tmp_path / name, {name[0]: ("F32", (2,))})
    index = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    return tmp_path


RIGHT = {"a": "a.safetensors", "b": "b.safetensors"}


def test_the_honest_index_opens(tmp_path: Path) -> None:
    assert list(open_checkpoint(folder_with(tmp_path, RIGHT)).tensors) == ["a", "b"]


@pytest.mark.parametrize(
    "file",
    ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "..", ".", "", "sub\\b", "b\x00c", "b\nc", 7, None, ["b"]],
    ids=ascii,
)
def test_an_index_that_leads_out_of_the_folder(file: object, tmp_path: Path) -> None:
    write_shard(tmp_path / "b.safetensors", {"b": ("F32", (2,))})
    inner = tmp_path / "inner"
    inner.mkdir()
    with pytest.raises(CheckpointError, match="bare name"):
        open_checkpoint(folder_with(inner, RIGHT | {"b": file}))


@pytest.mark.parametrize(
    "weight_map",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": []}',
        '{"weight_map": {"a": "x", "a": "y"}}',
        "[" * 9999,
    ],
)
def test_an_index_that_is_none(weight_map: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(folder_with(tmp_path, weight_map))


def test_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"c\.safetensors"):
        open_checkpoint(folder_with(tmp_path, RIGHT | {"b": "c.safetensors"}))


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'b' is said to be in a\.safetensors, but is in b\.safetensors"):
        open_checkpoint(folder_with(tmp_path, RIGHT | {"b": "a.safetensors", "c": "b.safetensors"}))


def test_an_index_with_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="but is in no shard"):
        open_checkpoint(folder_with(tmp_path, RIGHT | {"c": "b.safetensors"}))


def test_a_shard_with_a_tensor_that_is_not_in_the_index(tmp_path: Path) -> None:
    folder_with(tmp_path, RIGHT)
    write_shard(tmp_path / "b.safetensors", {"b": ("F32", (2,)), "stowaway": ("F32", (1,))})
    with pytest.raises(CheckpointError, match=r"'stowaway' is in b\.safetensors, but not in the index"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder_with(tmp_path, RIGHT)
    write_shard(tmp_path / "b.safetensors", {"b": ("F32", (2,)), "a": ("F32", (1,))})
    with pytest.raises(CheckpointError, match=r"both a\.safetensors and b\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_another_ones_folder(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", {"a": ("F32", (2,)), "a/c.0": ("F32", (2,))})
    with pytest.raises(CheckpointError, match="can't also be the folder"):
        open_checkpoint(tmp_path)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.safetensors", "b.safetensors", "model.safetensors.index.json", "config.json"])
@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to a pipe", "dangling link", "loop"])
def test_something_else_in_the_place_of_a_file(what: str, name: str, tmp_path: Path) -> None:
    folder_with(tmp_path, RIGHT)
    path = tmp_path / name
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    elif what == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif what == "dangling link":
        path.symlink_to("nothing")
    else:
        path.symlink_to(name)
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [1, 100, 5000])
def test_a_truncated_shard(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, SHAPES)
    os.truncate(path, path.stat().st_size - cut)
    with pytest.raises(HeaderError, match="truncated"):
        open_checkpoint(tmp_path)


def test_a_truncated_header(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_shard(path, SHAPES)
    os.truncate(path, 100)
    with pytest.raises(HeaderError, match="truncated"):
        open_checkpoint(tmp_path)
