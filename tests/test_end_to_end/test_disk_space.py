"""What a run leaves in its workspace is never more than was asked for, and what is asked for is not far from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

import mergepipe
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ceiling_of
from mergepipe.pipeline.space import journal_need
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks.registry import METHODS, SPARSIFIERS
from support.plain_adapters import write_adapter

from .test_invariance import NARROW_ONLY, models, recipe_for

__all__ = ["models"]

FACTOR = 4
"""What is asked for is at most so many times what is taken, and a fixed part:"""
FIXED = 512 * 1024


def taken(*places: Path) -> int:
    """Bytes of disk that files and folders take up."""
    inside = [path for place in places for path in (place, *place.rglob("*"))]
    return sum(os.lstat(path).st_blocks * 512 for path in inside)


def compare(recipe: dict[str, Any], folder: Path, **how: Any) -> tuple[int, int]:
    """What journals and statistics of a merge take, and what was asked for them."""
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mergepipe.build(path, work=folder / "work", out=folder / "merged", **how)
    workspace = Workspace(folder / "work")
    plan = Plan.from_json(workspace.read_plan())
    asked = journal_need(plan, workspace, ceiling_of(plan, None, None)).nbytes
    mergepipe.run(folder / "work")
    stages = [workspace] if plan.first_stage is None else [workspace, workspace.first_stage]
    used = taken(*(place for stage in stages for place in (stage.statistics, stage.journal_file)))
    assert used <= asked <= FACTOR * used + len(stages) * FIXED
    return used, asked


TADROP: list[dict[str, Any]] = [
    {"metric": "hoyer", "rescale": "l1"},
    {"target_density": 0.3, "unstack_3d": True},
    {"unstack_3d": True, "rescale": "l2", "tie_rule": "index"},
]


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].takes == "models"))
def test_no_method_takes_more_than_was_asked_for(name: str, models: list[Path], tmp_path: Path) -> None:
    compare(recipe_for(name, models), tmp_path / "job", chunk_size="64KiB")


@pytest.mark.parametrize("sparsify", [*({"method": name} for name in SPARSIFIERS if name != "none"),
                                      *({"method": "tadrop", **how} for how in TADROP)], ids=str)  # fmt: skip
def test_no_sparsifier_does(sparsify: dict[str, Any], models: list[Path], tmp_path: Path) -> None:
    recipe = recipe_for("task_arithmetic", models)
    if sparsify["method"] == "della":
        recipe["rules"] = [NARROW_ONLY]
    if "density" in {parameter.name for parameter in SPARSIFIERS[sparsify["method"]].parameters}:
        sparsify = {**sparsify, "density": 0.3}
    compare(recipe | {"sparsify": sparsify}, tmp_path / "job")


def write(folder: Path, seed: int, shapes: dict[str, tuple[int, ...]], dtype: Any) -> None:
    """A model of noise; a quarter of it at any place of the range, so that histograms are full."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * 2.0 ** (rng.integers(-30, 4, shape) * (rng.random(shape) < 0.25))
        tensors[name] = np.asarray(values, dtype)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


SHAPE = st.lists(st.integers(1, 90), min_size=0, max_size=3).map(tuple) | st.tuples(
    st.just(2), st.integers(65_000, 70_000)
)
MANY = ("ties", "breadcrumbs", "sce", "model_stock", "scf_rkl", "linear", "karcher", "mda")


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(MANY),
    shapes=st.lists(SHAPE, min_size=1, max_size=12),
    count=st.sampled_from([2, 5, 24]),
    dtype=st.sampled_from(["float32", "float16", bfloat16]),
    chunk=st.sampled_from(["4KiB", "64KiB", "8MiB"]),
)
def test_no_shape_does(
    name: str,
    shapes: list[tuple[int, ...]],
    count: int,
    dtype: Any,
    chunk: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    for seed in range(count + 1):
        write(folder / f"m{seed}", seed, {f"layers.{n}.w": shape for n, shape in enumerate(shapes)}, dtype)
    paths = [folder / f"m{seed}" for seed in range(count + 1)]
    recipe = recipe_for(name, paths)
    most = METHODS[name].max_models or count
    recipe["models"] = [{"model": str(path)} for path in paths[1 : min(most, count) + 1]]
    compare(recipe, folder / "job", chunk_size=chunk)


@pytest.mark.parametrize("name", ["ties", "linear", "scf_rkl"])
def test_many_tensors_take_little_each(name: str, tmp_path: Path) -> None:
    """A mixture of experts has tens of thousands: what each is asked for decides."""
    shapes = {f"layers.{layer}.experts.{expert}.w": (24, 16) for layer in range(8) for expert in range(64)}
    for seed in range(3):
        write(tmp_path / f"m{seed}", seed, shapes, "float16")
    used, asked = compare(recipe_for(name, [tmp_path / f"m{seed}" for seed in range(3)]), tmp_path / "job")
    assert asked - used <= 2048 * len(shapes)


def test_adapters_do_not(tmp_path: Path) -> None:
    """Rows of an A scale its B: what rounds find grows with the widest pair."""
    rng = np.random.default_rng(0)
    model = {f"layers.{n}.w.weight": rng.standard_normal((40, 30 + n)) for n in range(40)}
    for seed in range(3):
        write_adapter(tmp_path / f"a{seed}", model, tuple(model), seed, rank=8)
    entries = [{"model": str(tmp_path / f"a{seed}")} for seed in range(3)]
    compare({"merge_method": "robustmerge", "models": entries}, tmp_path / "job")
