"""Runs over adapters and 8-bit weights: interrupted, over changed files, and within their ceiling."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import InputChangedError, Interrupted, MemoryBudgetError
from mergepipe.pipeline.events import Event, UnitFinished
from mergepipe.pipeline.memory import MIB, parse_bytes

TESTS = Path(__file__).parents[1]


def write(folder: Path, rows: int, width: int, rank: int, tensors: int) -> Path:
    """A base, and two adapters of it (the second a DoRA); a TIES recipe of base and both."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{number}.w" for number in range(tensors)]
    weights = {f"{name}.weight": torch.randn(rows, width, generator=generator).bfloat16() for name in names}
    (folder / "base").mkdir(parents=True)
    save_file(weights, folder / "base" / "model.safetensors")
    for dora in (False, True):
        factors: dict[str, torch.Tensor] = {}
        for name in names:
            factors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator)
            factors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
            if dora:
                factors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(rows, generator=generator)
        adapter = folder / f"lora-{int(dora)}"
        adapter.mkdir()
        save_file(factors, adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": 1, "use_dora": dora}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
    models = [
        {"model": f"{folder}/base+{folder}/lora-{number}", "parameters": {"weight": 0.5, "density": 0.3}}
        for number in range(2)
    ]
    recipe = {"merge_method": "ties", "base_model": str(folder / "base"), "models": models}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def merged(folder: Path) -> bytes:
    return (folder / "merged" / "model.safetensors").read_bytes()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    recipe = write(tmp_path, 64, 48, 4, 3)
    mergepipe.build(recipe, tmp_path / "work", out=tmp_path / "merged", chunk_size=2000)
    return tmp_path


@pytest.mark.parametrize("units", [1, 4, 9])
def test_an_interrupted_run_goes_on_to_the_same_bytes(units: int, job: Path, tmp_path: Path) -> None:
    stop = threading.Event()
    seen = 0

    def count(event: Event) -> None:
        nonlocal seen
        seen += isinstance(event, UnitFinished)
        if seen >= units:
            stop.set()

    with pytest.raises(Interrupted):
        mergepipe.run(job / "work", stop=stop, on_event=count)
    mergepipe.run(job / "work")
    whole = tmp_path / "whole"
    mergepipe.build(job / "recipe.yaml", whole / "work", out=whole / "merged")
    mergepipe.run(whole / "work")
    assert merged(job) == merged(whole)


def test_an_adapter_that_changed_is_refused_by_name(job: Path) -> None:
    path = job / "lora-1" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(InputChangedError, match=r"lora-1/adapter_model\.safetensors' changed"):
        mergepipe.run(job / "work")


def test_another_scale_is_another_plan(job: Path) -> None:
    """What the adapter's configuration says is part of the plan's id, though that file is no shard."""
    recipe, options = job / "recipe.yaml", {"out": job / "other"}
    first = mergepipe.build(recipe, job / "w", **options).id  # type: ignore[arg-type]
    config = job / "lora-0" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text(encoding="utf-8")) | {"lora_alpha": 2}))
    assert mergepipe.build(recipe, job / "w", **options).id != first  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_measured_memory_stays_under_the_smallest_ceiling(workers: int, tmp_path: Path) -> None:
    """In a fresh process, with factors that are larger than everything else a unit takes."""
    recipe = write(tmp_path, 1536, 1024, 256, 2 * workers)
    options: dict[str, Any] = {"out": tmp_path / "merged", "workers": workers}
    with pytest.raises(MemoryBudgetError) as caught:
        mergepipe.build(recipe, tmp_path / "work", memory="1MiB", **options)
    found = re.search(r"--memory (\d+MiB)", str(caught.value))
    assert found, caught.value
    mergepipe.build(recipe, tmp_path / "work", memory=found[1], **options)
    command = [sys.executable, "-m", "support.peak", str(tmp_path / "work"), json.dumps({"workers": workers})]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)["peak"]
    print(f"{peak / MIB:.0f} MiB of {found[1]} measured with {workers} workers")
    assert peak <= parse_bytes(found[1])


def test_an_adapter_on_a_merge_of_the_same_recipe(tmp_path: Path) -> None:
    """A name with an adapter after it is that merge with the adapter: as if it had been made by another recipe."""
    write(tmp_path, 64, 48, 4, 2)
    models = [{"model": str(tmp_path / "base"), "parameters": {"weight": 2}}]
    first: dict[str, Any] = {"merge_method": "linear", "models": models, "parameters": {"normalize": False}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(first))
    mergepipe.build(tmp_path / "r.yaml", tmp_path / "w", out=tmp_path / "made")
    mergepipe.run(tmp_path / "w")
    lora = tmp_path / "lora-0"
    second: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": f"first+{lora}"}]}
    chained = run_chain(tmp_path / "chain", [{"name": "first", **first}, second])
    second["models"] = [{"model": f"{tmp_path}/made+{lora}"}]
    assert chained == run_chain(tmp_path / "plain", [second])


def run_chain(folder: Path, recipe: list[dict[str, Any]]) -> dict[str, Any]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all(recipe))
    mergepipe.build(folder / "recipe.yaml", folder / "work", out=folder / "merged")
    mergepipe.run(folder / "work")
    return {name: value.float().tolist() for name, value in load_file(folder / "merged" / "model.safetensors").items()}


def test_diagnostics_compare_with_the_adapted_base(tmp_path: Path) -> None:
    """The change from a base with an adapter to a merge that is just that is nothing but one rounding."""
    write(tmp_path, 64, 48, 4, 1)
    adapted = f"{tmp_path}/base+{tmp_path}/lora-1"
    recipe = {"merge_method": "task_arithmetic", "base_model": adapted, "models": [{"model": str(tmp_path / "base")}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"parameters": {"weight": 0.0}}))
    mergepipe.build(tmp_path / "recipe.yaml", tmp_path / "work", out=tmp_path / "merged", memory="2GiB")
    manifest = mergepipe.run(tmp_path / "work", diagnostics=True).manifest
    change = manifest["tensors"]["layers.0.w.weight"]["change"]
    assert 0 < change["norm"] < 0.03, change
