"""Files that may not be opened, paths that lead nowhere: a message with what, where and a remedy, never a traceback."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mergepipe.cli.main import main

from .conftest import RECIPE

Output = pytest.CaptureFixture[str]
LONG = "x" * 300
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2  # <linux/capability.h>


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
def bound(models: Path) -> Iterator[Path]:
    """A built job, of one who has no rights but those that the modes of files give.

    Root lays down the two capabilities that stand above modes, and remains the owner of all it has: another user might
    not be able to read Python or the tree.
    """
    assert main(["build"]) == 0
    libc = ctypes.CDLL(None, use_errno=True)
    version_3, own_thread = 0x20080522, 0
    header = (ctypes.c_uint32 * 2)(version_3, own_thread)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; then those numbered from 32
    assert libc.capget(header, sets) == 0, os.strerror(ctypes.get_errno())
    before = sets[0]
    try:
        sets[0] = before & ~(CAP_DAC_OVERRIDE | CAP_DAC_READ_SEARCH)
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
        yield models
    finally:
        sets[0] = before
        assert libc.capset(header, sets) == 0, os.strerror(ctypes.get_errno())
        for path in (models, *models.iterdir()):
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
def test_what_may_not_be_opened(bound: Path, locked: str, args: list[str], code: int, capsys: Output) -> None:
    (bound / locked).chmod(0)
    err = refused(code, args, capsys)
    assert locked.split("/")[-1] in err
    assert "Permission denied" in err or "can't be" in err


def test_a_folder_that_may_not_be_written(bound: Path, capsys: Output) -> None:
    bound.chmod(0o555)
    err = refused(6, ["build", "-w", "other"], capsys)
    assert "other" in err
    assert "Permission denied" in err
    assert "merged" in refused(6, ["run"], capsys)


def in_locale(args: list[str], **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command in the C locale."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    command = [sys.executable, "-m", "mergepipe", *args]
    return subprocess.run(command, env={**kept, "LC_ALL": "C", **environment}, capture_output=True)


def test_recipes_are_utf_8_in_every_locale(models: Path) -> None:
    """Python takes file names for UTF-8 in the C locale, too, unless it is told not to: then the remedy is told."""
    (models / "expert-1").rename(models / "größe")
    recipe = RECIPE.replace("./expert-1", "./größe  # … Größe, размер")
    (models / "mergepipe.yaml").write_text(recipe, encoding="utf-8")
    done = in_locale(["build"])
    assert done.returncode == 0, done.stderr
    assert "größe" in (models / ".mergepipe" / "plan.json").read_text(encoding="utf-8")
    refused = in_locale(["build", "-w", "other"], PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert refused.returncode == 2
    assert b"PYTHONUTF8=1" in refused.stderr
    assert b"Traceback" not in refused.stderr
