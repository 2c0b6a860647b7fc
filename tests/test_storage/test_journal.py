"""A record that was appended is there again; a damaged end is cut off, and nothing false is ever believed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.errors import DiskFullError, WorkspaceError
from mergepipe.pipeline.resume import Progress
from mergepipe.storage.journal import _FRAME, MAGIC, Journal, parse, read_journal

RECORDS = [{"type": "plan", "plan": "x", "version": "1"}, {"type": "units", "units": [[0, 0, 8, 5]]}, {"n": 1}]


def write(path: Path, records: list[dict[str, Any]] | None = None) -> bytes:
    journal = Journal(path)
    for record in RECORDS if records is None else records:
        journal.append([record])
    journal.close()
    journal.close()
    return path.read_bytes()


def framed(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), google_crc32c.value(payload)) + payload


def test_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    assert read_journal(path) == []
    write(path)
    assert read_journal(path) == RECORDS
    journal = Journal(path)
    assert (journal.records, journal.torn_bytes) == (RECORDS, 0)
    journal.append([])
    journal.append([{"n": 2}])
    journal.close()
    assert read_journal(path) == [*RECORDS, {"n": 2}]


def test_every_torn_end_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    data = write(path)
    whole = [len(MAGIC)]
    for record in RECORDS:
        whole.append(whole[-1] + _FRAME.size + len(json.dumps(record, separators=(",", ":"))))
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        journal = Journal(path)
        expected = max((n for n, end in enumerate(whole) if end <= length), default=0)
        assert journal.records == RECORDS[:expected]
        journal.append([{"after": length}])
        journal.close()
        assert read_journal(path) == [*RECORDS[:expected], {"after": length}]


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    data = write(tmp_path / "journal.log")
    for bit in range(8 * len(MAGIC), 8 * len(data)):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        records, end = parse(bytes(damaged))
        assert records == RECORDS[: len(records)]
        assert len(records) < len(RECORDS)
        assert end <= bit // 8


@pytest.mark.parametrize("left", [b"", MAGIC[:7], bytes(20), bytes(4096)], ids=["empty", "torn", "zeros", "a page"])
def test_what_a_power_cut_leaves_of_a_new_journal(tmp_path: Path, left: bytes) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(left)
    assert write(path).startswith(MAGIC)
    assert read_journal(path) == RECORDS


def test_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.log"
    path.write_bytes(b"something else altogether")
    with pytest.raises(WorkspaceError, match="--restart"):
        Journal(path)
    assert path.read_bytes() == b"something else altogether"


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there before stays valid, and a later append takes the place of the torn one."""
    path = tmp_path / "journal.log"
    journal = Journal(path)
    journal.append(RECORDS)

    def fail(fd: int, data: memoryview, offset: int) -> int:
        os.lseek(fd, offset, os.SEEK_SET)
        os.write(fd, data[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(DiskFullError):
            journal.append([{"lost": True}])
    assert read_journal(path) == RECORDS
    journal.append([{"kept": True}])
    journal.close()
    assert read_journal(path) == [*RECORDS, {"kept": True}]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KINDS = st.sampled_from(["plan", "units", "state", "sealed", "forget", "handed", "begin", "other"])
KEYS = ["plan", "version", "units", "tensor", "state", "shard", "file", "size", "crc32c", "sha256", "tensors", "shards"]


@pytest.mark.parametrize("examples", [150, pytest.param(3_000, marks=pytest.mark.slow)])
def test_fuzz(examples: int) -> None:
    """Any bytes: the journal's parser and the replay answer, or refuse with the documented error."""
    runs = 0
    started = time.monotonic()

    @settings(max_examples=examples)
    @given(st.binary(max_size=200), st.lists(st.tuples(KINDS, st.dictionaries(st.sampled_from(KEYS), VALUES))))
    def check(tail: bytes, records: list[tuple[str, dict[str, Any]]]) -> None:
        nonlocal runs
        runs += 1
        wanted = [{**values, "type": kind} for kind, values in records]
        data = MAGIC + b"".join(framed(json.dumps(record).encode()) for record in wanted) + tail
        found, end = parse(data)
        assert found[: len(wanted)] == json.loads(json.dumps(wanted))
        assert end <= len(data)
        parse(tail)
        with contextlib.suppress(WorkspaceError):
            Progress.replay(found)

    check()
    print(f"journal: {runs} inputs in {time.monotonic() - started:.1f} s")


@pytest.mark.parametrize("payload", [b"[" * 100_000, b"", b"[1]", b"\xff", b"{", b"NaN"])
def test_payloads_that_are_no_records(payload: bytes) -> None:
    good = framed(b'{"n":1}')
    assert parse(MAGIC + good + framed(payload) + good) == ([{"n": 1}], len(MAGIC) + len(good))
