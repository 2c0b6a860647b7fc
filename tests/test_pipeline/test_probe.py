"""Before a long run each way to read is tried on a sample of the inputs."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergepipe
from mergepipe.pipeline import probe, reading
from mergepipe.pipeline.events import Event, Note
from mergepipe.pipeline.probe import USUAL, WINDOW_BYTES, Way, choose, fastest, sample
from mergepipe.storage.checkpoint import FileInfo
from mergepipe.storage.direct import PAGE
from support.jobs import LARGER, build_job, hashes, write_job


def of_size(name: str, size: int) -> FileInfo:
    return FileInfo(name, size, 0, 0, "")


@given(st.lists(st.integers(1, 40 * 1024**3), min_size=1, max_size=12), st.integers(2, 4))
def test_samples_lie_inside_the_files_and_apart(sizes: list[int], ways: int) -> None:
    files = [of_size(f"{number}", size) for number, size in enumerate(sizes)]
    turns = sample(files, ways)
    windows = [window for turn in turns for share in turn for window in share]
    assert bool(windows) or sum(sizes) < 64 * 1024**3
    for window in windows:
        assert window.length == WINDOW_BYTES
        assert window.offset % PAGE == 0
        assert 0 <= window.offset <= sizes[int(window.path)] - WINDOW_BYTES
    assert all(share for turn in turns for share in turn), "each way has something to read in each turn"
    ordered = sorted((window.path, window.offset) for window in windows)
    for (path, start), (other, following) in itertools.pairwise(ordered):
        # A file's last windows may share its last bytes, no more.
        assert path != other or following - start >= WINDOW_BYTES or following + WINDOW_BYTES > sizes[int(path)] - PAGE


def test_small_inputs_are_not_probed() -> None:
    assert fastest([of_size("not opened", 7 * 1024**3)], workers=2, most=16) == (USUAL, "")


def test_a_way_has_to_win_in_every_turn() -> None:
    ways = [USUAL, Way(True, 16), Way(False, 2)]
    assert choose(ways, [[1.0, 1.0], [9.0, 1.2], [9.0, 1.9]]) == USUAL
    assert choose(ways, [[1.0, 1.0], [1.3, 1.4], [1.9, 9.0]]) == Way(True, 16)
    assert choose(ways, [[1.0], [1.3], [2.1]]) == Way(False, 2)


def test_each_way_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "WINDOW_BYTES", 16 * 1024)
    monkeypatch.setattr(probe, "WORTH", 1)
    paths = [tmp_path / "one", tmp_path / "two"]
    for path in paths:
        path.write_bytes(os.urandom(2_000_000))
    way, told = fastest([of_size(str(path), 2_000_000) for path in paths], workers=2, most=16)
    assert f"inputs are read {way}" in told
    for tried in (USUAL, Way(True, 1), Way(True, 16), Way(False, 2)):
        assert str(tried) in told
    _, told = fastest([of_size(str(path), 2_000_000) for path in paths], workers=2, most=4)
    assert "16 at once" not in told


@pytest.mark.parametrize("way", [Way(False, 2), Way(True, 16), Way(True, 1)])
def test_a_run_reads_as_was_found_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way) -> None:
    """The user is told, and the bytes are the same."""
    write_job(tmp_path, shapes=LARGER)
    build_job(tmp_path)
    mergepipe.run(tmp_path / "work", reader="mmap")
    expected = hashes(tmp_path / "merged")
    asked: list[int] = []

    def found(files: tuple[FileInfo, ...], workers: int, most: int) -> tuple[Way, str]:
        asked.append(len(files))
        return way, f"inputs are read {way}"

    monkeypatch.setattr(reading, "fastest", found)
    monkeypatch.setattr(reading, "all_direct", lambda _manifests: True)
    opened: list[tuple[bool, int]] = []
    opens = reading.Reading.open
    monkeypatch.setattr(
        reading.Reading, "open", lambda self: (opened.append((self.direct, self.depth)), opens(self))[1]
    )
    for path in (tmp_path / "merged").glob("*.safetensors"):
        path.unlink()
    heard: list[Event] = []
    mergepipe.run(tmp_path / "work", on_event=heard.append, restart=True)
    assert hashes(tmp_path / "merged") == expected
    assert asked == [3]
    assert opened == [(way.direct, way.depth if way.direct else USUAL.depth)]
    assert Note(f"inputs are read {way}") in heard
