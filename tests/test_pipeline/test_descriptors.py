"""Outputs of many files under low limits of open files, each in a process of its own."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from support.jobs import hashes, write_job

FILES = 200


def limited(soft: int, hard: int, *args: str) -> subprocess.CompletedProcess[str]:
    """A command of mergepipe under limits of open files."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    command = [sys.executable, "-m", "mergepipe", *args]
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe over models of many tensors, in as many files as the tensors."""
    folder = tmp_path_factory.mktemp("many-files")
    write_job(folder, {f"layers.{number}.weight": (8,) for number in range(FILES)}, shards=FILES)
    return folder


def build(job: Path, soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    out = ["--out", str(job / "merged"), "-w", str(job / "work")]
    return limited(soft, hard, "build", str(job / "recipe.yaml"), *out, "--shard-size", "1")


def test_more_files_than_the_shell_allows(job: Path) -> None:
    """Inputs and output have more files than the soft limit; it is raised where the system lets us."""
    built = build(job, 128, 4096)
    assert built.returncode == 0, built.stderr
    ran = limited(128, 4096, "run", "-w", str(job / "work"))
    assert ran.returncode == 0, ran.stderr
    assert sum(name.endswith(".safetensors") for name in hashes(job / "merged")) == FILES + 1


def test_more_files_than_the_system_allows(job: Path) -> None:
    refused = build(job, 128, 512)
    assert refused.returncode == 5, refused.stderr
    assert "--shard-size" in refused.stderr
    assert build(job, 128, 4096).returncode == 0
    refused = limited(128, 512, "run", "-w", str(job / "work"), "--restart", "--out", str(job / "other"))
    assert refused.returncode == 5, refused.stderr
    assert not (job / "other").exists()
