"""What the file system says becomes an error of mergepipe by what the file is; what says nothing of a file is a bug."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mergepipe.errors import CheckpointNotFoundError, DiskFullError, InputChangedError
from mergepipe.storage.file_errors import explain, explained, named

MODEL = "/models/base"


@pytest.mark.parametrize(
    ("code", "of_input", "of_output"),
    [
        (errno.EIO, 4, 5),
        (errno.ESTALE, 4, 5),
        (errno.ENOTCONN, 4, 5),
        (errno.EROFS, 4, 5),
        (errno.ENOSPC, None, 5),  # nothing is written to inputs
        (errno.EDQUOT, None, 5),
        (errno.EFBIG, None, 5),
        (errno.EACCES, 4, 6),
        (errno.EPERM, 4, 6),
        (errno.ENOENT, 4, 6),
        (errno.ENOTDIR, 4, 6),
        (errno.EISDIR, 4, 6),
        (errno.ENAMETOOLONG, 4, 6),
        (errno.ELOOP, 4, 6),
        (errno.EMFILE, 5, 5),
        (errno.ENFILE, 5, 5),
        (errno.ENOMEM, 5, 5),
        (errno.EBADF, None, None),
        (errno.EINVAL, None, None),
        (errno.EDOM, None, None),
    ],
    ids=lambda value: errno.errorcode[value] if isinstance(value, int) and value not in (4, 5, 6) else "",
)
def test_the_exit_code_is_decided_by_the_file(code: int, of_input: int | None, of_output: int | None) -> None:
    for path, expected in ((f"{MODEL}/model.safetensors", of_input), ("/models/base-merged/model.part", of_output)):
        error = OSError(code, os.strerror(code), path)
        told = explain(error, [MODEL])
        assert (None if told is None else told.exit_code) == expected
        if told is not None:
            assert os.strerror(code) in str(told)
            assert ": " in str(told), "a remedy follows"
            assert path in str(told) or code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def test_bugs_stay_bugs() -> None:
    for error in (OSError("odd"), OSError(errno.EBADF, "Bad file descriptor"), BrokenPipeError(errno.EPIPE, "pipe")):
        with pytest.raises(type(error)) as found, explained():
            raise error
        assert found.value is error


def test_errors_of_ours_are_left_alone() -> None:
    for error in (DiskFullError("no room"), CheckpointNotFoundError("gone"), InputChangedError("changed")):
        with pytest.raises(type(error)) as found, explained([MODEL]), named("/elsewhere"):
            raise error
        assert found.value is error
        assert str(error) in ("no room", "gone", "changed")


def test_a_descriptor_gets_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Bad file") as found, named(tmp_path / "shard"):
        os.fsync(1 << 20)
    assert found.value.filename == str(tmp_path / "shard")


def test_the_folder_we_stand_in_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here").rmdir()
    try:
        os.getcwd()
    except OSError as error:
        told = explain(error)
    assert told is not None
    assert told.exit_code == 6
    assert "current folder" in str(told)
