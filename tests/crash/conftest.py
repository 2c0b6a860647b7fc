"""A process to torment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.jobs import LARGER, build_job, hashes, write_job
from support.scratch import folder_in_memory
from support.tally import TALLY


class Victim:
    """Lives through runs and builds in children of a process that has everything imported and compiled."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("victim.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the victim did not start"

    def __call__(
        self, work: Path, kind: str = "none", at: int = 0, *, action: str = "run", **more: Any
    ) -> dict[str, Any]:
        """One life: how it ended."""
        self.send(work, kind, at, action=action, **more)
        return self.receive()

    def send(self, work: Path, kind: str, at: int, *, action: str = "run", **more: Any) -> None:
        """Let a life begin."""
        task = {"action": action, "work": str(work), "kind": kind, "at": at, "options": {"workers": 1}, **more}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for its end."""
        assert self._process.stdout is not None
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Job:
    """A built job, what an undisturbed run makes of it, and how many calls that takes."""

    def __init__(self, folder: Path, victim: Victim, **how: Any) -> None:
        self.folder, self.work, self.merged = folder, folder / "work", folder / "merged"
        self.victim = victim
        write_job(folder, **how)
        build_job(folder)
        whole = victim(self.work)
        assert whole["end"] == "done", whole
        self.calls = int(whole["calls"])
        self.expected = hashes(self.merged)
        self.reset()

    def reset(self) -> None:
        """As if it had never been run."""
        shutil.rmtree(self.merged, ignore_errors=True)
        shutil.rmtree(self.work / "statistics", ignore_errors=True)
        for name in ("journal.log", "events.jsonl"):
            (self.work / name).unlink(missing_ok=True)

    def live(self, kind: str = "none", at: int = 0, **more: Any) -> dict[str, Any]:
        """One run with a fault; whatever it leaves under a final name must be whole."""
        end = self.victim(self.work, kind, at, **more)
        self.check_names()
        return end

    def check_names(self) -> None:
        """Every shard under its final name is complete; an index, or a single file, means a whole model."""
        if not self.merged.exists():
            return
        found = {name: digest for name, digest in hashes(self.merged).items() if name.endswith(".safetensors")}
        for name, digest in found.items():
            assert digest == self.expected[name], f"{name} has its final name and is not complete"
        if any((self.merged / last).exists() for last in ("model.safetensors.index.json", "model.safetensors")):
            left = {name: digest for name, digest in hashes(self.merged).items() if not name.startswith(".")}
            assert left == self.expected, "what looks like a model is not whole"

    def finish(self) -> dict[str, Any]:
        """Run to the end; the output is what it should be, to the byte."""
        end = self.live()
        assert end["end"] == "done", end
        assert hashes(self.merged) == self.expected
        self.reset()
        return end

    def survived(self, kind: str, count: int = 1) -> None:
        TALLY[kind] += count


@pytest.fixture(scope="session")
def victim() -> Iterator[Victim]:
    victim = Victim()
    yield victim
    victim.close()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one: thousands of syncs of a real disk take minutes and prove no more."""
    memory = folder_in_memory()
    if memory is None:
        yield tmp_path_factory.mktemp("crash")
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="mergepipe-crash-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session", params=[1, 3], ids=["one file", "three files"])
def built(request: pytest.FixtureRequest, victim: Victim, scratch: Path) -> Job:
    """Small enough to be killed at every call."""
    return Job(scratch / f"small-{request.param}", victim, shards=request.param)


@pytest.fixture
def small(built: Job) -> Job:
    """The small job, not begun."""
    built.reset()
    return built


@pytest.fixture(scope="session")
def sharded(victim: Victim, scratch: Path) -> Job:
    """Three small files."""
    return Job(scratch / "sharded", victim, shards=3)


@pytest.fixture(scope="session")
def larger(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """On a disk, so that writes may go past the page cache."""
    return Job(tmp_path_factory.mktemp("larger"), victim, shapes=LARGER, shards=4)
