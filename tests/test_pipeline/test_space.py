"""Disk space is counted for everything a job writes, and allocated before its first unit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import DiskFullError
from mergepipe.pipeline.events import Event, RunStarted
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ceiling_of
from mergepipe.pipeline.space import Need, check_room, journal_need, mask_bytes, output_need
from mergepipe.pipeline.summary import summarize
from mergepipe.storage.workspace import Workspace
from support.jobs import build_job, write_job

from .test_status import interrupt

SHAPES = {"up.weight": (300, 256), "down.weight": (64, 1024), "norm.weight": (500,)}
HEAD_BYTES = 2 * 1000 * 64


def disk_of(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Every disk has `free` bytes left."""
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12 - free, free))


def give_heads(folder: Path) -> None:
    """Give every expert a head of a shape of its own."""
    for number, name in enumerate(("base", "expert-1", "expert-2")):
        path = folder / name / "model.safetensors"
        tensors = load_file(path) | {"classifier.weight": np.ones((1000 + number, 64), np.float16)}
        save_file(tensors, path)


@pytest.fixture(params=["heads", "masks"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A job with files beside its weights."""
    if request.param == "heads":
        write_job(tmp_path, SHAPES, heads="separate")
        give_heads(tmp_path)
    else:
        write_job(tmp_path, SHAPES, method="emr_unified")
        recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
        for model in recipe["models"]:
            del model["parameters"]
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    build_job(tmp_path)
    return tmp_path


def need(job: Path) -> Need:
    workspace = Workspace(job / "work")
    plan = Plan.from_json(workspace.read_plan())
    return output_need(plan)


def beside(job: Path) -> list[Path]:
    """Files of heads and masks, finished or not."""
    return [path for name in ("heads", "tasks") for path in (job / "merged" / name).rglob("*.safetensors*")]


def test_needs_on_one_disk_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_of(monkeypatch, 100)
    check_room([Need(tmp_path / "a" / "b", 60, "one"), Need(tmp_path, 40, "two"), Need(tmp_path, -999, "held")])
    with pytest.raises(
        DiskFullError, match=r"one in '.*a' needs 61 bytes, two in '.*' needs 40 bytes, 100 are free on"
    ):
        check_room([Need(tmp_path / "a", 61, "one"), Need(tmp_path, 40, "two")])
    with pytest.raises(DiskFullError, match=r"'.*' needs 101 bytes, 100 are free: make room"):
        check_room([Need(tmp_path, 101, "one")])


def test_what_lies_beside_the_weights_is_counted_and_allocated(job: Path) -> None:
    told = need(job).nbytes
    plan = Plan.from_json(Workspace(job / "work").read_plan())
    statistics = journal_need(plan, Workspace(job / "work"), ceiling_of(plan, None, None)).nbytes
    assert summarize(plan)["disk_bytes"] == told + statistics > plan.layout().nbytes + statistics
    allocated: list[int] = []
    ballast: list[int] = []

    def look(event: Event) -> None:
        if isinstance(event, RunStarted):
            allocated.extend(path.stat().st_blocks * 512 for path in beside(job))
            ballast.append((job / "work" / "ballast").stat().st_blocks * 512)

    mergepipe.run(job / "work", on_event=look)
    final = [path.stat().st_size for path in beside(job)]
    assert len(allocated) == len(final) == 2
    assert all(early >= late for early, late in zip(sorted(allocated), sorted(final), strict=True))
    assert ballast[0] > 0
    assert not (job / "work" / "ballast").exists()
    taken = sum(path.stat().st_size for path in (job / "merged").rglob("*.safetensors"))
    assert taken <= told <= taken + 32 * 1024


def test_what_a_resume_holds_is_not_asked_for_again(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(job / "work", 2)
    assert need(job).nbytes <= 0
    workspace = Workspace(job / "work")
    plan = Plan.from_json(workspace.read_plan())
    disk_of(monkeypatch, journal_need(plan, workspace, ceiling_of(plan, None, None)).nbytes)
    build_job(job)
    mergepipe.run(job / "work")


def test_build_says_what_does_not_fit(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan.from_json(Workspace(job / "work").read_plan())
    shards = plan.layout().nbytes
    assert need(job).nbytes > shards + (HEAD_BYTES if plan.side else sum(mask_bytes(plan).values()) - 1)
    disk_of(monkeypatch, shards + 10_000)
    with pytest.raises(DiskFullError, match=r"the output in '.*' needs [\d,]+ bytes, the journal with"):
        mergepipe.build(job / "recipe.yaml", work=job / "w2", out=job / "elsewhere")
    assert not (job / "w2").exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(kib: int) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", folder]
        mounted = subprocess.run(command, capture_output=True)
        if mounted.returncode:
            pytest.skip(f"mounting is forbidden here: {mounted.stderr.decode().strip()}")
        return folder

    yield make
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_disk_without_room_for_what_lies_beside(job: Path, disk: Callable[[int], Path]) -> None:
    """The weights fit, heads or masks don't: exit 5 before the first unit, and resumable."""
    plan = Plan.from_json(Workspace(job / "work").read_plan())
    folder = disk(plan.layout().nbytes // 1024 + 8)
    work = json.loads((job / "work" / "plan.json").read_bytes())
    (job / "work" / "plan.json").write_text(json.dumps(work | {"output": str(folder / "merged")}))
    started: list[Event] = []
    with pytest.raises(DiskFullError):
        mergepipe.run(job / "work", on_event=lambda event: started.append(event))
    assert not any(isinstance(event, RunStarted) for event in started)
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    mergepipe.run(job / "work")


def test_a_copy_takes_its_space_first(tmp_path: Path, disk: Callable[[int], Path]) -> None:
    write_job(tmp_path, {"w": (1024, 512)})
    folder = disk(1500)
    events: list[Event] = []
    with pytest.raises(DiskFullError, match="the copied store"):
        build_work(tmp_path, folder, events)
    assert not (folder / "work").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    build_work(tmp_path, folder, events)
    assert not list((folder / "work" / "stores").rglob("*.partial"))


def build_work(job: Path, folder: Path, events: list[Event]) -> None:
    options: dict[str, Any] = {"store": "copy", "out": job / "merged", "on_event": events.append}
    mergepipe.build(job / "recipe.yaml", work=folder / "work", chunk_size="64KiB", **options)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_like_all_others_of_the_user(job: Path, mask: int) -> None:
    """Modes follow the umask, whatever those of the inputs are; for what lies beside the weights, too."""
    for name in ("base", "expert-1"):
        (job / name / "tokenizer.json").chmod(0o400)
        (job / name / "additional_chat_templates").mkdir()
        (job / name / "additional_chat_templates" / "tool.jinja").write_text("{}")
        (job / name / "additional_chat_templates" / "tool.jinja").chmod(0o400)
        (job / name / "additional_chat_templates").chmod(0o500)
    before = os.umask(mask)
    try:
        build_job(job, store="copy")
        mergepipe.run(job / "work")
    finally:
        os.umask(before)
    for folder in (job / "merged", job / "work" / "statistics", job / "work" / "stores" / "0-base" / "zarr"):
        for path in folder.rglob("*"):
            status = path.stat()
            assert status.st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~mask, path
            assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
