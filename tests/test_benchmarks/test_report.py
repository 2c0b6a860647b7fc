"""What is saved with figures: the commit that they are of."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks.report import commit, versions


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_commits_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    (tmp_path / "file").write_text("one", encoding="utf-8")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init"], ["add", "file"], [*who, "commit", "-m", "one"]):
        subprocess.run(["git", *command], cwd=tmp_path, capture_output=True, check=True)
    first = commit(tmp_path)
    (tmp_path / "file").write_text("two", encoding="utf-8")
    assert commit(tmp_path) == f"{first}-dirty"
    subprocess.run(["git", *who, "commit", "-a", "-m", "two"], cwd=tmp_path, capture_output=True, check=True)
    assert commit(tmp_path) not in (first, f"{first}-dirty", "unknown")


def test_outside_of_a_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    assert commit(tmp_path) == "unknown"


def test_without_git_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions()["commit"] == "unknown"
