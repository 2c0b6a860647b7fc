"""Copied stores whose chunks are damaged: noticed before a wrong byte is used, and mended chunk by chunk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import pytest

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import DamageError
from mergepipe.pipeline.events import Event, Note
from mergepipe.pipeline.status import status
from mergepipe.pipeline.verify import verify
from mergepipe.storage.virtual import open_store
from support.jobs import build_job, hashes, write_job

from .test_status import interrupt

SHAPES = {"first.weight": (300, 256), "second.weight": (300, 256), "third.weight": (64,)}


class Notes:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.texts.append(event.text)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected")
    write_job(folder, shapes=SHAPES)
    mergepipe.run(build_job(folder))
    return hashes(folder / "merged")


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_job(tmp_path, shapes=SHAPES)
    build_job(tmp_path, store="copy")
    return tmp_path


def chunk(job: Path, tensor: str) -> Path:
    """The last chunk of a tensor of the second model."""
    return sorted((job / "work" / "stores" / "2-expert-2" / "zarr" / tensor).glob("c.*"))[-1]


def flip(path: Path) -> None:
    """Let one bit rot: neither size nor time of the file tell of it."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 16
    with open(path, "r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("tensor", SHAPES)
@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_a_damaged_chunk_ends_the_run_and_is_mended(
    reader: Literal["mmap", "direct"],
    tensor: str,
    job: Path,
    expected: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = chunk(job, tensor)
    whole = path.read_bytes()
    flip(path)
    for _ in range(2):
        with pytest.raises(DamageError, match="does not match its checksum") as caught:
            mergepipe.run(job / "work", reader=reader)
        assert str(path) in str(caught.value)
        assert "mergepipe build" in str(caught.value)
    assert not (job / "merged" / "model.safetensors").exists()
    found = status(job / "work")
    assert found.state == "damaged"
    assert str(path) in found.damage[0]
    assert "mergepipe build" in found.remedy
    assert main(["run", "-w", str(job / "work"), "--quiet"]) == 7
    assert str(path) in capsys.readouterr().err
    others = {other: other.stat().st_mtime_ns for other in path.parents[1].rglob("c*") if other != path}
    notes = Notes()
    build_job(job, store="copy", on_event=notes)
    assert any("damaged" in text for text in notes.texts)
    assert path.read_bytes() == whole
    assert {other: other.stat().st_mtime_ns for other in others} == others, "what is whole stays as it is"
    assert status(job / "work").state == "interrupted"
    mergepipe.run(job / "work", reader=reader)
    assert hashes(job / "merged") == expected
    assert open_store(job / "work" / "stores" / "2-expert-2")[tensor][...].shape == SHAPES[tensor]


def test_work_before_the_damage_is_kept(job: Path, expected: dict[str, str]) -> None:
    interrupt(job / "work", 1)
    done = status(job / "work").done_bytes
    assert done > 0
    flip(chunk(job, "third.weight"))
    with pytest.raises(DamageError):
        mergepipe.run(job / "work")
    assert status(job / "work").done_bytes >= done
    build_job(job, store="copy")
    notes = Notes()
    mergepipe.run(job / "work", on_event=notes)
    assert any("going on with an earlier run" in text for text in notes.texts)
    assert hashes(job / "merged") == expected


def test_what_verify_finds_is_mended_too(job: Path, expected: dict[str, str]) -> None:
    path = chunk(job, "first.weight")
    flip(path)
    assert [item.file for item in verify(job / "work", full=True).damage] == [str(path)]
    build_job(job, store="copy")
    assert not verify(job / "work", full=True).damage
    mergepipe.run(job / "work")
    assert hashes(job / "merged") == expected


@pytest.mark.parametrize("how", ["gone", "short", "touched", "folder gone"])
def test_a_copy_with_other_files_is_mended(how: str, job: Path, expected: dict[str, str]) -> None:
    """`run` says that `build` makes it anew, and that helps."""
    path = chunk(job, "second.weight")
    if how == "gone":
        path.unlink()
    elif how == "short":
        os.truncate(path, 100)
    elif how == "touched":
        os.utime(path)
    else:
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()
    with pytest.raises(DamageError, match=r"c\.\d\.0', a chunk of a copied store.*`mergepipe build` makes it anew"):
        mergepipe.run(job / "work")
    build_job(job, store="copy")
    mergepipe.run(job / "work")
    assert hashes(job / "merged") == expected
