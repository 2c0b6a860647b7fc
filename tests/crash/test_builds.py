"""Killed at any moment, a build is no plan or the whole one; building again is all it takes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.jobs import hashes, write_job
from support.tally import TALLY

from .conftest import Victim
from .test_kills import moments


def options(folder: Path, store: str, chunk_size: str = "64KiB") -> dict[str, Any]:
    return {"out": str(folder / "merged"), "chunk_size": chunk_size, "memory": "2GiB", "store": store}


@pytest.mark.parametrize("count", [8, pytest.param(10_000, marks=pytest.mark.slow)], ids=["some", "every"])
@pytest.mark.parametrize("store", ["virtual", "copy"])
@pytest.mark.parametrize("kind", ["kill", "power"])
def test_build_dies(victim: Victim, scratch: Path, kind: str, store: str, count: int) -> None:
    folder = scratch / f"build-{kind}-{store}-{count}"
    recipe = str(write_job(folder, shards=2))
    how = options(folder, store)
    calls = victim(folder / "whole", action="build", recipe=recipe, options=how)["calls"]
    assert victim(folder / "whole")["end"] == "done"
    expected = hashes(folder / "merged")
    kills, rng = 0, random.Random(kind)
    for at in moments(calls, min(count, calls)):
        shutil.rmtree(folder / "merged", ignore_errors=True)
        work = folder / "work"
        for again in (at, rng.randrange(1, calls)):
            end = victim(work, kind, again, seed=again, action="build", recipe=recipe, options=how)
            kills += end["end"] == "killed"
        end = victim(work)
        assert (end["end"], end["code"]) in (("error", 6), ("done", 0)), end
        shutil.rmtree(folder / "merged", ignore_errors=True)
        end = victim(work, action="build", recipe=recipe, options=how)
        assert end["end"] == "done", end
        assert victim(work)["end"] == "done"
        assert hashes(folder / "merged") == expected
        shutil.rmtree(work)
    assert kills
    TALLY[f"{kind} in build"] += kills


def test_a_small_file_is_the_old_one_or_the_new_one(victim: Victim, scratch: Path) -> None:
    """Plans, manifests and indexes: whenever the power goes, and whatever was not synced is gone."""
    folder = scratch / "small-file"
    folder.mkdir()
    path, old, new = folder / "plan.json", "old" * 1000, "new" * 2000
    write: dict[str, Any] = {"action": "write", "file": str(path), "data": new}
    path.write_text(old)
    calls, deaths = int(victim(folder, **write)["calls"]), 0
    for at in range(1, calls + 1):
        for seed in range(10):
            path.write_text(old)
            deaths += victim(folder, "power", at, seed=seed, **write)["end"] == "killed"
            assert path.read_text(encoding="utf-8") in (old, new)
    assert deaths == calls * 10
    TALLY["power"] += deaths


def test_a_copy_goes_on_chunk_by_chunk(victim: Victim, scratch: Path) -> None:
    """What was copied is not copied again."""
    folder = scratch / "copy"
    recipe = str(write_job(folder))
    how = options(folder, "copy", "16KiB")
    calls = victim(folder / "whole", action="build", recipe=recipe, options=how)["calls"]
    assert victim(folder / "work", "kill", calls // 2, action="build", recipe=recipe, options=how)["end"] == "killed"
    before = {path: path.stat().st_mtime_ns for path in (folder / "work").rglob("c.*") if ".partial" not in path.name}
    assert len(before) > 10
    assert victim(folder / "work", action="build", recipe=recipe, options=how)["end"] == "done"
    after = {str(path): path.stat().st_mtime_ns for path in (folder / "work").rglob("c.*[0-9]")}
    assert all(after[str(path).replace(".part", "")] == time for path, time in before.items())
    assert len(after) > len(before)


def test_another_recipe_withdraws_the_plan_first(victim: Victim, scratch: Path) -> None:
    """A build of B that dies over A leaves A, B or nothing: never A's plan with B's stores."""
    a, b = scratch / "a", scratch / "b"
    recipes = [str(write_job(folder)) for folder in (a, b)]
    (b / "recipe.yaml").write_text(
        (b / "recipe.yaml").read_text(encoding="utf-8").replace("weight: 0.5", "weight: 0.25")
    )
    work = scratch / "shared"
    expected = []
    for folder, recipe in zip((a, b), recipes, strict=True):
        calls = victim(folder / "w", action="build", recipe=recipe, options=options(folder, "virtual"))["calls"]
        assert victim(folder / "w")["end"] == "done"
        expected.append(hashes(folder / "merged"))
        shutil.rmtree(folder / "merged")
    assert expected[0] != expected[1]
    for at in range(1, calls + 2):
        assert victim(work, action="build", recipe=recipes[0], options=options(a, "virtual"))["end"] == "done"
        victim(work, "kill", at, action="build", recipe=recipes[1], options=options(b, "virtual"))
        end = victim(work)
        assert (end["end"], end["code"]) in (("error", 6), ("done", 0)), end
        for folder, wanted in zip((a, b), expected, strict=True):
            if (folder / "merged").exists():
                assert hashes(folder / "merged") == wanted
                shutil.rmtree(folder / "merged")
        shutil.rmtree(work)
