"""Files that may not be opened, paths that lead nowhere: a message with what, where and a remedy, never a traceback."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergepipe.cli.main import main

from .conftest import RECIPE

Output = pytest.CaptureFixture[str]
LONG = "x" * 300


def refused(code: int, args: list[str], capsys: Output) -> str:
    """What a command says that ends with `code`."""
    capsys.readouterr()
    assert main(args) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert "error: " in err
    return err


@pytest.mark.parametrize(
    ("args", "code", "names"),
    [
        (["build", "-w", "file/work"], 6, "file"),
        (["run", "-w", "file/work"], 6, "file"),
        (["status", "-w", LONG], 6, LONG),
        (["build", "-w", LONG], 6, LONG),
        (["build", "--out", "file/merged"], 6, "file"),
        (["build", "--out", LONG], 6, LONG),
        (["build", "--set", f"base_model=./{LONG}"], 4, LONG),
        (["inspect", LONG], 4, LONG),
        (["verify", LONG], 6, LONG),
    ],
    ids=lambda value: " ".join(value).replace(LONG, "LONG") if isinstance(value, list) else "",
)
def test_paths_that_lead_nowhere(models: Path, args: list[str], code: int, names: str, capsys: Output) -> None:
    (models / "file").write_text("")
    assert names in refused(code, args, capsys)


def test_folders_in_the_place_of_files(models: Path, capsys: Output) -> None:
    assert main(["build"]) == 0
    (models / ".mergepipe" / "journal.log").mkdir()
    for command in ("run", "status"):
        assert "journal.log" in refused(6, [command], capsys)
    (models / ".mergepipe" / "plan.json").unlink()
    (models / ".mergepipe" / "plan.json").mkdir()
    for command in ("run", "status", "plan"):
        assert "plan.json" in refused(6, [command], capsys)


def test_an_output_that_was_blocked_since_the_build(models: Path, capsys: Output) -> None:
    assert main(["build", "--out", "later/merged"]) == 0
    (models / "later").write_text("")
    assert "later" in refused(6, ["run"], capsys)


@pytest.fixture
def nobody(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A built job, whose owner has no rights but those that the modes of files give."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory(prefix="mergepipe-test-", ignore_cleanup_errors=True) as name:
        place = Path(name)
        place.chmod(0o777)
        for path in models.iterdir():
            path.rename(place / path.name)
        (place / "mergepipe.yaml").write_text(RECIPE)
        monkeypatch.chdir(place)
        if user == 0:
            for path in (place, *place.rglob("*")):
                os.chown(path, 65534, -1)
            os.seteuid(65534)
        try:
            assert main(["build"]) == 0
            yield place
        finally:
            os.seteuid(user)
            for path in (place, *place.iterdir()):
                path.chmod(0o755)


@pytest.mark.parametrize(
    ("locked", "args", "code"),
    [
        ("expert-1", ["run"], 4),
        ("expert-1", ["build"], 4),
        ("expert-1", ["inspect", "expert-1"], 4),
        ("expert-1/model.safetensors", ["run"], 4),
        ("expert-1/model.safetensors", ["build"], 4),
        (".mergepipe/LOCK", ["run"], 6),
        (".mergepipe/LOCK", ["clean", "--yes"], 6),
        (".mergepipe/plan.json", ["status"], 6),
        (".mergepipe", ["status"], 6),
        ("mergepipe.yaml", ["build"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_may_not_be_opened(nobody: Path, locked: str, args: list[str], code: int, capsys: Output) -> None:
    (nobody / locked).chmod(0)
    err = refused(code, args, capsys)
    assert locked.split("/")[-1] in err
    assert "Permission denied" in err or "can't be" in err


def test_a_folder_that_may_not_be_written(nobody: Path, capsys: Output) -> None:
    nobody.chmod(0o555)
    err = refused(6, ["build", "-w", "other"], capsys)
    assert "other" in err
    assert "Permission denied" in err
    assert "merged" in refused(6, ["run"], capsys)
