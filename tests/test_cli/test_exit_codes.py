"""Errors become messages and the contract's exit codes; only what is unforeseen shows a traceback."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

import mergepipe
from mergepipe import errors
from mergepipe.cli import main as cli
from mergepipe.cli import methods


def run_with(monkeypatch: pytest.MonkeyPatch, raised: BaseException) -> int:
    """Exit code of a command that raises `raised`."""

    @click.command()
    def command() -> None:
        raise raised

    monkeypatch.setattr(methods, "command", command)
    return cli.main(["methods"])


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.UsageError("odd"), 2),
        (errors.RecipeError([errors.Fault("$.a", "odd"), errors.Fault("$.b", "odder")]), 3),
        (errors.CheckpointNotFoundError("odd"), 4),
        (errors.ShortReadError("odd"), 4),  # an EOFError, which click takes for an interruption
        (errors.MemoryBudgetError("odd"), 5),
        (errors.DiskFullError("odd"), 5),
        (errors.OutputExistsError("odd"), 6),
        (errors.WorkspaceError("odd"), 6),
        (errors.DamageError("odd"), 7),
        (errors.Interrupted("odd"), 130),
        (OSError(errno.ENOSPC, "odd"), 5),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_expected_errors_are_messages(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raised.add_note("while working on tensor 'w'")
    assert run_with(monkeypatch, raised) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert "odd" in err
    assert "while working on tensor 'w'" in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, RuntimeError("surprise")) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "RuntimeError: surprise" in err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130
    assert "interrupted" in capsys.readouterr().err


def test_every_fault_of_a_recipe_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run_with(monkeypatch, errors.RecipeError([errors.Fault("$.a", "odd"), errors.Fault("$.b", "odder")]))
    assert capsys.readouterr().err == "error: $.a: odd\n       $.b: odder\n"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["biuld"], "Did you mean build?"),
        (["xyzzy"], "There are init, build"),
        (["build", "--nonsense"], "No such option"),
        (["build", "--store", "elsewhere"], "elsewhere"),
        (["run", "--workers", "0"], "--workers"),
    ],
)
def test_usage_errors(args: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["build", "there-is-none.yaml"], 3),
        (["run", "-w", "there-is-none"], 6),
        (["plan", "-w", "there-is-none"], 6),
        (["inspect", "there-is-none"], 4),
        (["inspect", ".", "--stats"], 2),
        (["methods", "thais"], 2),
        (["init", "--method", "thais"], 2),
    ],
    ids=lambda value: value if isinstance(value, int) else value[0],
)
def test_what_is_not_there(
    args: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(args) == code
    assert capsys.readouterr().err.startswith("error: ")
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mergepipe, version {mergepipe.__version__}\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        code = [sys.executable, "-m", "mergepipe", "methods"]
        result = subprocess.run(code, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("args", "level"),
    [(["methods"], "WARNING"), (["-v", "methods"], "INFO"), (["methods", "-vv"], "DEBUG")],
)
def test_v_logs(
    args: list[str], level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = logging.getLogger("mergepipe")
    monkeypatch.setattr(log, "handlers", [])
    assert cli.main(args) == 0
    assert logging.getLevelName(log.level) == level
    log.warning("heard")
    assert "heard" in capsys.readouterr().err


def test_a_process_of_its_own_ends_at_once_and_whole() -> None:
    code = (
        "import atexit, sys; from mergepipe.cli.main import start; "
        "atexit.register(print, 'taken apart'); sys.argv = ['mergepipe', 'init', '--method', 'thais']; "
        "print('told', end=''); start()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "told")
    assert result.stderr.startswith("Usage: ") or result.stderr.startswith("error: ")
