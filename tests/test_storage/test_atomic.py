"""Small files that are the old ones or the new ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergepipe.errors import DiskFullError
from mergepipe.storage.atomic import make_folder, no_room_errors, write_atomic


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")
    write_atomic(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_the_old_file_stays_if_anything_fails(step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(DiskFullError, match=r"x\.json"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x.json"]


def test_other_errors_pass_through() -> None:
    with pytest.raises(PermissionError), no_room_errors("x"):
        raise PermissionError(13, "Permission denied")


def test_every_folder_that_is_made_is_durable_in_the_one_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("mergepipe.storage.atomic.fsync_path", lambda path: synced.append(Path(path)))
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    make_folder(tmp_path / "a")
    assert synced[3:] == [tmp_path]
