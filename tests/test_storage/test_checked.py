"""Files that end in their checksum: nobody reads from one that does not match it."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, DamageError
from mergepipe.storage.checked import CheckedFiles, is_whole_file
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Descriptors, MmapReader
from support.scratch import folder_in_memory


def write_chunk(path: Path, size: int) -> bytes:
    data = np.random.default_rng(size).bytes(size)
    path.write_bytes(data + google_crc32c.value(data).to_bytes(4, "little"))
    return data


@pytest.mark.parametrize("size", [0, 1, 256 * 1024 - 1, 256 * 1024, 256 * 1024 + 1, 1_000_000])
def test_any_size_is_compared_to_its_end(size: int, tmp_path: Path) -> None:
    path = tmp_path / "chunk"
    write_chunk(path, size)
    assert is_whole_file(path)
    data = bytearray(path.read_bytes())
    for at in {0, len(data) // 2, len(data) - 1}:
        data[at] ^= 1
        path.write_bytes(data)
        assert not is_whole_file(path), at
        data[at] ^= 1
    path.write_bytes(data[:-1])
    assert not is_whole_file(path)


@given(st.binary(max_size=40))
def test_any_bytes_are_whole_or_not(data: bytes) -> None:
    with tempfile.TemporaryDirectory(dir=folder_in_memory(), prefix="mergepipe-test-") as folder:
        path = Path(folder, "chunk")
        path.write_bytes(data)
        whole = len(data) >= 4 and google_crc32c.value(data[:-4]).to_bytes(4, "little") == data[-4:]
        assert is_whole_file(path) == whole


def test_only_what_lies_in_a_copied_store_is_compared(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store-of-others").mkdir()
    paths = [tmp_path / name / "chunk" for name in ("store", "store-of-others")]
    for path in paths:
        path.write_bytes(b"no checksum")
    files = CheckedFiles([tmp_path / "store"])
    os.close(files.open(str(paths[1])))
    with pytest.raises(DamageError, match="mergepipe build"):
        files.open(str(paths[0]))
    assert files.damaged == [str(paths[0])]
    with pytest.raises(CheckpointNotFoundError):
        files.open(str(tmp_path / "store" / "gone"))
    os.mkfifo(tmp_path / "store" / "pipe")
    with pytest.raises(CheckpointError, match="regular"):
        files.open(str(tmp_path / "store" / "pipe"))


def test_a_reader_hands_out_no_byte_of_a_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "chunk"
    data = write_chunk(path, 1000)
    segments = [Segment(str(path), 8, 100)]
    with MmapReader(files=CheckedFiles([tmp_path])) as reader, reader.window(segments, last=True) as window:
        assert window.tobytes() == data[8:108]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with MmapReader(files=CheckedFiles([tmp_path])) as reader:
        for _ in range(2):
            with pytest.raises(DamageError), reader.window(segments, last=True):
                pass


def test_a_slow_opener_holds_up_nobody_else(tmp_path: Path) -> None:
    """Each file is opened once, by whoever comes first; other files are borrowed meanwhile."""
    for name in ("slow", "quick"):
        (tmp_path / name).write_bytes(name.encode())
    opened: list[str] = []
    begun, go_on = threading.Event(), threading.Event()

    def opener(path: str) -> int:
        opened.append(path)
        if path.endswith("slow"):
            begun.set()
            assert go_on.wait(10)
        return os.open(path, os.O_RDONLY)

    descriptors = Descriptors(opener=opener)
    found: list[bytes] = []

    def borrow() -> None:
        with descriptors.borrow(str(tmp_path / "slow")) as fd:
            found.append(os.pread(fd, 9, 0))

    threads = [threading.Thread(target=borrow) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    with descriptors.borrow(str(tmp_path / "quick")) as fd:
        assert os.pread(fd, 9, 0) == b"quick"
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == [b"slow"] * 3
    assert [Path(path).name for path in opened] == ["slow", "quick"]
    descriptors.close()
