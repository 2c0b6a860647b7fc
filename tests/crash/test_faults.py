"""Full disks, syncs that fail, workers that raise, damaged journals and outputs, inputs that change, two at once."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergepipe
from mergepipe.errors import Interrupted
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.resume import Progress
from mergepipe.pipeline.status import status
from mergepipe.storage.journal import MAGIC, read_journal
from mergepipe.storage.workspace import Workspace
from support.jobs import SMALL, hashes, write_model

from .conftest import Job, Victim
from .test_kills import moments

FEW = 4
"""Cases of each fault in `make test`."""


@pytest.mark.parametrize("count", [FEW, pytest.param(200, marks=pytest.mark.slow)])
def test_the_disk_fills_up(small: Job, count: int) -> None:
    """From some write on there is no room: exit 5, and after room is made the run goes on."""
    for at in moments(small.calls, count):
        end = small.live("enospc", at)
        assert (end["end"], end["code"]) in (("error", 5), ("done", 0)), end
        small.finish()
        small.survived("full disk", end["end"] == "error")


@pytest.mark.parametrize("count", [FEW, pytest.param(200, marks=pytest.mark.slow)])
def test_a_sync_fails_once_and_the_bytes_are_gone(small: Job, count: int) -> None:
    """The kernel tells of a lost write once; whatever it says later, these bytes must not be believed."""
    for at in moments(small.calls, count):
        end = small.live("lost sync", at)
        assert (end["end"], end["code"]) in (("error", 5), ("done", 0)), end
        small.finish()
        small.survived("lost sync", end["end"] != "done")


def test_a_worker_raises(small: Job) -> None:
    for at in range(1, 5):
        end = small.live("raise", at)
        assert end["end"] == "bug"
        assert "injected" in end["message"]
        small.finish()
        small.survived("worker raising")


def half_done(job: Job) -> None:
    """Leave the job killed in the middle of its work, with a part of some shard recorded.

    How many calls it takes to come there is up to the threads: one moment is not enough.
    """
    for at in range(job.calls // 2, job.calls):
        if job.live("kill", at)["end"] == "killed" and recorded_in_part(job):
            return
        job.reset()
    pytest.fail("no kill left a part of a shard recorded")


def recorded_in_part(job: Job) -> bool:
    """Whether the journal knows of written units in a shard that is not sealed."""
    progress = Progress.replay(read_journal(job.work / "journal.log"))
    plan = Plan.from_json(Workspace(job.work).read_plan())
    sealed = {name for number in progress.sealed for name in plan.groups[number]}
    return any(plan.tensors[number].name not in sealed for number in progress.written)


@pytest.mark.parametrize("count", [FEW, pytest.param(60, marks=pytest.mark.slow)])
def test_the_journal_is_torn(small: Job, count: int) -> None:
    rng = random.Random(1)
    for _ in range(count):
        half_done(small)
        path = small.work / "journal.log"
        length = rng.randrange(path.stat().st_size)
        os.truncate(path, length)
        if length <= len(MAGIC):
            # Nothing says any more that what lies in the output folder is ours: it is not touched.
            end = small.live()
            assert (end["end"], end["code"]) == ("error", 6), end
            small.reset()
        else:
            small.finish()
        small.survived("torn journal")


@pytest.mark.parametrize("count", [FEW, pytest.param(60, marks=pytest.mark.slow)])
def test_a_bit_of_the_journal_flips(small: Job, count: int) -> None:
    rng = random.Random(2)
    for _ in range(count):
        half_done(small)
        path = small.work / "journal.log"
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        end = small.live()
        if end["end"] == "error":  # the flip hit the very start
            assert end["code"] == 6
            assert "--restart" in end["message"]
            end = small.live(options={"restart": True})
        assert end["end"] == "done", end
        small.finish()
        small.survived("bit flip in the journal")


def test_written_bytes_are_damaged(small: Job) -> None:
    """What the journal promises is read back: a damaged tensor is made again, and the user is told."""
    rng = random.Random(3)
    for _ in range(FEW):
        half_done(small)
        for part in small.merged.glob("*.part"):
            data = bytearray(part.read_bytes())
            start = 8 + int.from_bytes(data[:8], "little")
            data[start:] = bytes(byte ^ 1 << rng.randrange(8) for byte in data[start:])
            part.write_bytes(data)
        end = small.live(options={"verify": "full"})
        assert end["end"] == "done", end
        assert "made again" in end["message"]
        small.finish()
        small.survived("damaged unfinished shard")


def test_looking_at_finished_work_can_be_stopped(small: Job) -> None:
    half_done(small)
    part = max(small.merged.glob("*.part"), key=lambda path: path.stat().st_size)
    part.write_bytes(bytes(part.stat().st_size))  # what it would find, if it looked
    before = read_journal(small.work / "journal.log")
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        mergepipe.run(small.work, verify="full", stop=stop)
    assert [record["type"] for record in read_journal(small.work / "journal.log")[len(before) :]] == ["begin"]
    assert small.live(options={"verify": "full"})["end"] == "done"
    small.finish()


@pytest.mark.parametrize("how", ["gone", "short", "damaged"])
def test_a_finished_shard_is_damaged(sharded: Job, how: str) -> None:
    sharded.reset()
    for at in range(sharded.calls, 1, -1):
        sharded.live("kill", at)
        if list(sharded.merged.glob("*.safetensors")) and list(sharded.merged.glob("*.part")):
            break
        sharded.reset()
    [path, *_] = sharded.merged.glob("*.safetensors")
    if how == "gone":
        path.unlink()
    elif how == "short":
        os.truncate(path, path.stat().st_size - 1)
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    end = sharded.victim(sharded.work, options={"verify": "full"})
    assert end["end"] == "done", end
    assert "made again" in end["message"]
    sharded.finish()
    sharded.survived(f"finished shard {how}")


@pytest.mark.parametrize("how", ["gone", "short", "flipped"])
def test_a_finished_output_is_damaged(small: Job, how: str) -> None:
    """Running again makes the damaged file anew, killed on the way or not; what is whole stays as it is."""
    assert small.live()["end"] == "done"
    path, *others = sorted(small.merged.glob("*.safetensors"))
    before = [other.stat().st_ino for other in others]
    for at in (0, 8, small.calls // 4, small.calls // 2):
        if how == "gone":
            path.unlink()
        elif how == "short":
            os.truncate(path, path.stat().st_size - 1)
        else:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        small.victim(small.work, "kill", at, options={"verify": "full"})
        end = small.live(options={"verify": "full"})
        assert end["end"] == "done", end
        assert hashes(small.merged) == small.expected
        assert [other.stat().st_ino for other in others] == before
        assert "nothing to do" in small.live(options={"verify": "full"})["message"]
    small.survived(f"finished output {how}", 4)


def test_a_finished_output_is_damaged_and_nothing_tells_how_it_was_made(sharded: Job) -> None:
    sharded.reset()
    assert sharded.live()["end"] == "done"
    [path, *_] = sharded.merged.glob("*.safetensors")
    path.unlink()
    (sharded.work / "journal.log").unlink()
    end = sharded.victim(sharded.work)
    assert (end["end"], end["code"]) == ("error", 7), end
    assert f"remove '{sharded.merged}' and run again" in end["message"]
    shutil.rmtree(sharded.merged)
    sharded.finish()
    sharded.survived("finished output gone")


def test_an_input_is_replaced(victim: Victim, tmp_path: Path) -> None:
    job = Job(tmp_path, victim)
    half_done(job)
    write_model(tmp_path / "expert-1", 7, SMALL)
    end = job.live()
    assert (end["end"], end["code"]) == ("error", 6)
    path = str(tmp_path / "expert-1" / "model.safetensors")
    assert path in end["message"]
    found = status(job.work)
    assert found.changed is not None
    assert path in found.remedy
    assert "build --force" in found.remedy
    build: dict[str, Any] = {"action": "build", "recipe": str(tmp_path / "recipe.yaml")}
    options = {"out": str(job.merged), "chunk_size": "64KiB", "memory": "2GiB"}
    end = victim(job.work, **build, options=options)
    assert (end["end"], end["code"]) == ("error", 6)
    assert path in end["message"]
    assert "build --force" in end["message"]
    assert "finish it" not in end["message"], "it can't be finished"
    shutil.rmtree(tmp_path / "expert-2")
    end = job.live()
    assert "build again" in end["message"]
    write_model(tmp_path / "expert-2", 2, SMALL)
    assert victim(job.work, **build, options={**options, "force": True})["end"] == "done"
    assert victim(job.work)["end"] == "done", "the remedy helps"
    job.survived("replaced input", 2)


def test_two_at_once(victim: Victim, tmp_path: Path) -> None:
    """One proceeds, the other is refused and does not wait; when the first is killed, nothing holds the lock."""
    job = Job(tmp_path, victim)
    other = Victim()
    try:
        other.send(job.work, "hang", 10)
        while not (job.work / "journal.log").exists():
            time.sleep(0.01)
        end = job.live()
        assert (end["end"], end["code"]) == ("error", 6)
        first = re.search(r"in use by process (\d+)", end["message"])
        assert first, end["message"]
        os.kill(int(first[1]), signal.SIGKILL)  # it is alive, so the second did not wait for its end
        assert other.receive()["end"] == "killed"
    finally:
        other.close()
    job.finish()
    job.survived("second run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting is forbidden here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk_is_full(victim: Victim, small_disk: Path, tmp_path: Path) -> None:
    """The output does not fit: exit 5 before any work; with room made, the same command goes through."""
    job = Job(tmp_path, victim, shapes={f"w{i}": (512, 512) for i in range(3)})
    recipe = str(tmp_path / "recipe.yaml")
    out = {"out": str(small_disk / "merged"), "chunk_size": "64KiB", "memory": "2GiB"}
    work = tmp_path / "work-on-small-disk"
    ballast = small_disk / "ballast"
    assert victim(work, action="build", recipe=recipe, options=out)["end"] == "done"
    ballast.write_bytes(bytes(2 * 1024 * 1024))
    end = victim(work)
    assert (end["end"], end["code"]) == ("error", 5), end
    assert "make room and run again" in end["message"]
    end = victim(tmp_path / "work-2", action="build", recipe=recipe, options={**out, "out": str(small_disk / "other")})
    assert (end["end"], end["code"]) == ("error", 5), end
    ballast.unlink()
    assert victim(work)["end"] == "done"
    whole = (small_disk / "merged" / "model.safetensors").read_bytes()
    job.live()
    assert whole == (job.merged / "model.safetensors").read_bytes()
    job.survived("full disk", 2)
