"""Windows onto files: the right bytes, bounded memory, errors instead of crashes."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, ShortReadError
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Descriptors, MmapReader, Reader, in_page_cache

SIZE = 100_003


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    contents = {str(folder / name): rng.integers(0, 256, SIZE, np.uint8).tobytes() for name in "abc"}
    for path, content in contents.items():
        Path(path).write_bytes(content)
    return contents


@pytest.fixture
def reader() -> Iterator[MmapReader]:
    with MmapReader() as reader:
        yield reader


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@given(st.data())
def test_any_segments(files: dict[str, bytes], data: st.DataObject) -> None:
    drawn = data.draw(
        st.lists(st.tuples(st.sampled_from(sorted(files)), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=4)
    )
    segments = [Segment(path, min(a, b), abs(a - b)) for path, a, b in drawn]
    expected = b"".join(files[s.path][s.offset : s.offset + s.length] for s in segments)
    with MmapReader() as reader:
        with reader.window(segments, last=data.draw(st.booleans())) as window:
            assert window.dtype == np.uint8
            assert window.shape == (len(expected),)
            assert window.tobytes() == expected
            assert not window.flags.writeable
            assert window.ctypes.data % 8 == 0 or not expected
        assert reader.bytes_read == len(expected)


def test_it_is_a_reader(reader: MmapReader) -> None:
    wanted: Reader = reader
    assert wanted.bytes_read == 0


def test_one_segment_is_not_copied(files: dict[str, bytes], reader: MmapReader) -> None:
    path = next(iter(files))
    with reader.window([Segment(path, 4104, 8192)], last=False) as window:
        assert window.ctypes.data % 4096 == 4104 % 4096, "a view of the mapped pages"


def test_a_window_at_an_odd_offset_can_be_viewed_as_any_type(files: dict[str, bytes], reader: MmapReader) -> None:
    path = next(iter(files))
    with reader.window([Segment(path, 3, 16)], last=False) as window:
        assert window.view("<f8").flags.aligned
        assert window.view("<u2").tobytes() == files[path][3:19]


def test_a_file_that_is_too_short(tmp_path: Path, reader: MmapReader) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(100))
    for segments in ([Segment(str(path), 96, 5)], [Segment(str(path), 0, 8), Segment(str(path), 99, 2)]):
        with (
            pytest.raises(ShortReadError, match="short' is 100 bytes long, expected at least 101"),
            reader.window(segments, last=True),
        ):
            pass


def test_a_file_that_shrinks_between_two_windows(tmp_path: Path, reader: MmapReader) -> None:
    path = tmp_path / "shrinking"
    path.write_bytes(bytes(10_000))
    with reader.window([Segment(str(path), 0, 10_000)], last=False):
        pass
    os.truncate(path, 5_000)
    with (
        pytest.raises(ShortReadError, match="is 5000 bytes long"),
        reader.window([Segment(str(path), 0, 10_000)], last=False),
    ):
        pass
    with reader.window([Segment(str(path), 0, 5_000)], last=False) as window:
        assert window.size == 5_000


@pytest.mark.timeout(20)
def test_things_that_are_no_files(tmp_path: Path, reader: MmapReader) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, error in (("pipe", CheckpointError), ("nothing", CheckpointNotFoundError), (".", CheckpointError)):
        with pytest.raises(error), reader.window([Segment(str(tmp_path / name), 0, 8)], last=False):
            pass


def test_an_array_that_outlives_its_window_stays_readable(files: dict[str, bytes], reader: MmapReader) -> None:
    path = next(iter(files))
    with reader.window([Segment(path, 0, 50_000)], last=True) as window:
        kept = window[10_000:]
    del window
    assert kept.tobytes() == files[path][10_000:50_000]


def test_inputs_are_opened_read_only(files: dict[str, bytes]) -> None:
    import fcntl

    descriptors = Descriptors()
    with descriptors.borrow(next(iter(files))) as fd:
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    descriptors.close()


def test_descriptors_are_bounded_and_closed(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(50)]
    for path in paths:
        path.write_bytes(path.name.encode() * 8)
    gc.collect()
    before = open_descriptors()
    reader = MmapReader(descriptors=4)
    for path in [*paths, *paths]:
        with reader.window([Segment(str(path), 0, 8)], last=False) as window:
            assert window.tobytes() == (path.name.encode() * 8)[:8]
        assert open_descriptors() <= before + 5
    reader.close()
    del window
    gc.collect()
    assert open_descriptors() == before


def test_a_borrowed_descriptor_is_not_closed_by_others(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).write_bytes(name.encode())
    descriptors = Descriptors(limit=1)
    with descriptors.borrow(str(tmp_path / "a")) as first:
        for name in "bcdef":
            with descriptors.borrow(str(tmp_path / name)) as other:
                assert os.pread(other, 1, 0) == name.encode()
        descriptors.close()
        assert os.pread(first, 1, 0) == b"a"
    descriptors.close()


def test_many_threads_few_descriptors(files: dict[str, bytes]) -> None:
    paths = sorted(files)
    barrier = threading.Barrier(8)

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        barrier.wait()
        for _ in range(200):
            path, start = paths[rng.integers(3)], int(rng.integers(0, SIZE - 500))
            with reader.window([Segment(path, start, 500)], last=bool(rng.integers(2))) as window:
                assert window.tobytes() == files[path][start : start + 500]
        return 200 * 500

    with MmapReader(descriptors=1) as reader, ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == reader.bytes_read


def resident_file_pages() -> int:
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


def test_resident_memory_does_not_grow_with_the_file(tmp_path: Path, reader: MmapReader) -> None:
    path, step = tmp_path / "large", 4 << 20
    path.write_bytes(bytes(16 * step))
    before, peak = resident_file_pages(), 0
    for start in range(0, 16 * step, step):
        with reader.window([Segment(str(path), start, step)], last=True) as window:
            assert window.any() == False  # noqa: E712 - touches every page
            peak = max(peak, resident_file_pages() - before)
    del window
    assert peak < 3 * step
    assert resident_file_pages() - before < step


@pytest.mark.parametrize("missing", [None, 4096, 2**20, 2**22, 2**22 + 4095])
def test_what_the_page_cache_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: int | None) -> None:
    """One place that would have to wait for the disk is enough: the first, the last, or one every 512 KiB."""
    path = tmp_path / "file"
    path.write_bytes(bytes(2**23))

    def read(fd: int, into: list[bytearray], offset: int, flags: int) -> int:
        assert flags == os.RWF_NOWAIT
        assert offset < 2**22 + 4096
        if offset == missing:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return len(into[0])

    with monkeypatch.context() as patch, open(path, "rb") as file:
        patch.setattr(os, "preadv", read)
        found = [in_page_cache(file.fileno(), Segment(str(path), start, 2**22)) for start in (0, 4096)]
    assert found == [missing != 2**20, missing not in (4096, 2**22 + 4095)]


def test_what_was_dropped_is_not_in_the_page_cache(tmp_path: Path) -> None:
    if subprocess.run(["stat", "-f", "-c", "%T", tmp_path], capture_output=True, text=True).stdout == "tmpfs\n":
        pytest.skip("tmpfs drops nothing")
    with open(tmp_path / "file", "w+b") as file:
        file.write(bytes(2**22))
        file.flush()
        os.fsync(file.fileno())
        segment = Segment(file.name, 4096, 2**22 - 4096)
        if not in_page_cache(file.fileno(), segment):
            pytest.skip("the file system doesn't tell what is in the page cache")
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert not in_page_cache(file.fileno(), segment)
