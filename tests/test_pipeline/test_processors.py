"""Machines of many processors: as many workers as the ceiling has room for, the same in build, plan and run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.memory import MIB
from mergepipe.pipeline.schedule import ceiling_of, schedule
from mergepipe.pipeline.summary import scheduled, summarize
from mergepipe.storage.header import encode_header
from support.jobs import Shapes, hashes, write_job, write_recipe

MANY = (48, 96, 128)
WIDE: Shapes = {"up.weight": (4096, 14336)}
"""The largest matrix of an 8B model."""


@pytest.fixture(params=MANY)
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many processors, wherever they are counted."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(request.param)))
    count: int = request.param
    return count


def write_holes(folder: Path, models: int) -> None:
    """Models of one wide matrix that take no disk, as only their headers are read."""
    header = encode_header([(name, "BF16", shape) for name, shape in WIDE.items()], {"format": "pt"})
    for name in ("base", *(f"expert-{number}" for number in range(1, models + 1))):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(header)
        os.truncate(folder / name / "model.safetensors", len(header) + 2 * 4096 * 14336)
        (folder / name / "config.json").write_text("{}")
    write_recipe(folder, "ties", models)


def build(folder: Path, **how: Any) -> mergepipe.Plan:
    return mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **how)


@pytest.mark.parametrize("models", [2, 3])
def test_the_default_ceiling_has_room_for_the_default_workers(models: int, processors: int, tmp_path: Path) -> None:
    """TIES under 512 MiB: refused at 128 processors once, though every one of them fits with fewer workers."""
    write_holes(tmp_path, models)
    plan = build(tmp_path)
    ceiling = ceiling_of(plan, None, None)
    assert 8 < ceiling.workers <= processors
    assert summarize(plan)["projected_bytes"] <= plan.allowed == 512 * MIB
    assert scheduled(plan) == scheduled(plan, ceiling.workers)
    if ceiling.workers < processors:
        with pytest.raises(MemoryBudgetError):
            schedule(plan, ceiling_of(plan, None, ceiling.workers + 1), gathered=[True] * len(plan.models))
    with pytest.raises(MemoryBudgetError, match=r"512 workers need .* or use fewer --workers"):
        build(tmp_path, workers=512)


def test_a_run_has_the_workers_of_its_plan(processors: int, tmp_path: Path) -> None:
    """And makes the bytes of any other number; under a smaller ceiling it has fewer, or as many as are asked for."""
    write_job(tmp_path)
    plan = build(tmp_path)
    fitting, less = ceiling_of(plan, None, None).workers, ceiling_of(plan, "300MiB", None).workers
    assert 1 < less < fitting <= processors
    made = []
    for how, workers in (({}, fitting), ({"memory": "300MiB"}, less), ({"memory": "300MiB", "workers": 2}, 2)):
        assert mergepipe.run(tmp_path / "work", restart=True, **how).manifest["workers"] == workers
        made.append(hashes(tmp_path / "merged"))
        shutil.rmtree(tmp_path / "merged")
    assert made[0] == made[1] == made[2]
    with pytest.raises(MemoryBudgetError, match="workers need"):
        mergepipe.run(tmp_path / "work", memory="300MiB", workers=processors, restart=True)


def test_vectors_are_compared_by_as_many_as_fit(processors: int, tmp_path: Path) -> None:
    """What `--diagnostics` looks at may take more than the merge did: no reason to fail when that is done."""
    rng = np.random.default_rng(0)
    for name in ("base", "expert-1"):
        (tmp_path / name).mkdir()
        values = {"v": rng.standard_normal(4 * 65536).astype(np.float16)}
        save_file(values, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "expert-1"), "parameters": {"weight": 1.0}}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    build(tmp_path, memory="288MiB")
    manifest = mergepipe.run(tmp_path / "work", diagnostics=True).manifest
    assert manifest["tensors"]["v"]["change"]["norm"] > 0
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == {"v"}


def test_one_worker_that_does_not_fit_is_told_what_would_do(processors: int, tmp_path: Path) -> None:
    write_holes(tmp_path, 2)
    with pytest.raises(MemoryBudgetError, match=r"one worker needs .* --memory \d+MiB$"):
        build(tmp_path, memory="1MiB")
