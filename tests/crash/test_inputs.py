"""Inputs that change while they are read: what was made of them is never believed, whatever happens to them later."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from support.jobs import hashes, write_job
from support.tally import TALLY

from .conftest import Job, Victim
from .test_builds import options
from .test_kills import moments

JOBS: dict[str, dict[str, Any]] = {
    "per tensor": {"shards": 3},
    "rounds": {"scope": "model"},
}


@pytest.fixture(scope="module", params=JOBS)
def read(request: pytest.FixtureRequest, victim: Victim, scratch: Path) -> Job:
    """A job whose inputs are changed; each kind of record is made in one of them."""
    return Job(scratch / f"read-{request.param.replace(' ', '-')}", victim, **JOBS[request.param])


@pytest.fixture(scope="module")
def copied(victim: Victim, scratch: Path) -> Job:
    """A job that reads a copied store."""
    folder = scratch / "read-copy"
    job = Job(folder, victim, shards=3)
    shutil.rmtree(job.work)
    how = options(folder, "copy", "16KiB")
    assert victim(job.work, action="build", recipe=str(folder / "recipe.yaml"), options=how)["end"] == "done"
    assert job.live()["end"] == "done"
    job.reset()
    return job


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Give a file its old contents and times back, in place, as `cp -p` does."""
    data, status = path.read_bytes(), path.stat()
    yield
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def statistics(job: Job) -> dict[str, bytes]:
    group = zarr.open_group(job.work / "statistics", mode="r")
    return {name: np.asarray(array[...]).tobytes() for name, array in group.arrays()}


@pytest.mark.parametrize("count", [5, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("calls", [0, 3], ids=["for good", "for a moment"])
def test_an_input_is_rewritten_during_a_run(read: Job, calls: int, count: int) -> None:
    """Restored after it or during it, the next run ends in the bytes of one that nobody disturbed."""
    read.reset()
    assert read.live()["end"] == "done"
    expected = statistics(read)
    path = sorted((read.folder / "expert-1").glob("*.safetensors"))[0]
    refused = 0
    for at in moments(read.calls * 3 // 4, min(count, read.calls)):
        read.reset()
        with kept(path):
            end = read.live("rewritten", at, file=str(path), calls=calls)
        assert end["end"] == "done" or (end["code"] == 6 and str(path) in end["message"]), end
        refused += end["end"] == "error"
        end = read.live(options={"verify": "full"})
        assert end["end"] == "done", end
        assert statistics(read) == expected
        read.finish()
    assert refused > 1
    read.survived("input rewritten in a run", refused)


def test_a_chunk_of_a_copy_is_rewritten_during_a_run(copied: Job) -> None:
    """It was compared with its checksum when it was opened; that says nothing of what is read from it later."""
    path = next(path for path in sorted((copied.work / "stores").rglob("*up.weight/c.0.0")) if "1-" in str(path))
    refused = 0
    for calls in (0, 3):
        for at in moments(copied.calls, 4):
            copied.reset()
            with kept(path):
                end = copied.live("rewritten", at, file=str(path), calls=calls)
            assert end["end"] == "done" or end["code"] in (6, 7), end
            refused += end["end"] == "error"
            copied.finish()
    assert refused > 2
    copied.survived("input rewritten in a run", refused)


@pytest.mark.parametrize("count", [5, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("calls", [0, 3], ids=["for good", "for a moment"])
def test_an_input_is_rewritten_while_it_is_copied(victim: Victim, scratch: Path, calls: int, count: int) -> None:
    """Chunks that were read meanwhile are not taken for whole by the next build."""
    folder = scratch / f"rewritten-{calls}"
    recipe = str(write_job(folder))
    build: dict[str, Any] = {"action": "build", "recipe": recipe, "options": options(folder, "copy", "16KiB")}
    whole = int(victim(folder / "whole", **build)["calls"])
    assert victim(folder / "whole")["end"] == "done"
    expected = hashes(folder / "merged")
    path, work, refused = folder / "expert-1" / "model.safetensors", folder / "work", 0
    for at in moments(whole, min(count, whole)):
        with kept(path):
            end = victim(work, "rewritten", at, file=str(path), calls=calls, **build)
        assert end["end"] == "done" or (end["code"] == 6 and str(path) in end["message"]), end
        refused += end["end"] == "error"
        assert victim(work, **build)["end"] == "done"
        shutil.rmtree(folder / "merged", ignore_errors=True)
        assert victim(work)["end"] == "done"
        assert hashes(folder / "merged") == expected
        shutil.rmtree(work)
        shutil.rmtree(folder / "merged")
    assert refused
    TALLY["input rewritten in a build"] += refused
