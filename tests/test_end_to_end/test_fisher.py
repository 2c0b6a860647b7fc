"""Fisher merging of checkpoints: importances are inputs like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.pipeline.check import check
from mergepipe.pipeline.memory import MIB
from mergepipe.pipeline.summary import scheduled
from support import reference_more
from support.checkpoints import Family, load, read_tensors, write_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("fisher"), "llama", "bfloat16")


@pytest.fixture
def recipe(family: Family, tmp_path: Path) -> dict[str, Any]:
    """Two experts, each with its importances in float32, in `f0` and `f1`."""
    models = []
    for number, expert in enumerate(family.experts):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            name: torch.rand(value.shape, generator=generator) ** 8 * 1e-6
            for name, value in read_tensors(expert).items()
        }
        (tmp_path / f"f{number}").mkdir()
        save_file(tensors, tmp_path / f"f{number}" / "model.safetensors")
        models.append(
            {"model": str(expert), "importance": str(tmp_path / f"f{number}"), "parameters": {"weight": 1 + number}}
        )
    return {"merge_method": "fisher", "base_model": str(family.base), "models": models, "out_dtype": "float32"}


def build(recipe: dict[str, Any], folder: Path) -> Any:
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return mergepipe.build(folder / "r.yaml", folder / "work", out=folder / "merged", workers=1)


def test_the_merge_is_the_formula(recipe: dict[str, Any], family: Family, tmp_path: Path) -> None:
    plan = build(recipe, tmp_path)
    assert [model.role for model in plan.models] == ["base", "model", "model", "importance", "importance"]
    result = mergepipe.run(tmp_path / "work", workers=2)
    merged = read_tensors(tmp_path / "merged")
    sides = [read_tensors(folder) for folder in (*family.folders, tmp_path / "f0", tmp_path / "f1")]
    for name, value in merged.items():
        base, a, b, f0, f1 = (side[name].float().numpy().astype("f8") for side in sides)
        expected = reference_more.fisher(base, [a, b], [f0, f1], [1, 2])
        np.testing.assert_allclose(value.numpy(), expected, rtol=3e-7, atol=1e-9)
    _, info = load(tmp_path / "merged", "llama")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert [entry["role"] for entry in result.manifest["inputs"]].count("importance") == 2
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "`f0` (importances)" in card
    assert "- f0" not in card, "importances are no base models of the merge"


def test_importances_count_in_memory_and_bytes(recipe: dict[str, Any], family: Family, tmp_path: Path) -> None:
    """Three inputs become five: two more windows of float32, two more rows of each tile."""
    plan = build(recipe, tmp_path)
    without = {key: value for key, value in recipe.items() if key != "merge_method"} | {
        "merge_method": "task_arithmetic"
    }
    without["models"] = [{key: value for key, value in one.items() if key != "importance"} for one in recipe["models"]]
    (tmp_path / "other").mkdir()
    plain = build(without, tmp_path / "other")
    for mine, other in zip(scheduled(plan, 1), scheduled(plain, 1), strict=True):
        size = int(np.prod(mine.tensor.shape))
        assert mine.tensor.input_bytes() - other.tensor.input_bytes() == 2 * 4 * size
        # two rows for the importances; the scratch of the two methods is one and two rows
        assert mine.projected - other.projected == min(size, 65536) * 4 * (2 - 1)
        assert mine.projected < 512 * MIB


def test_a_changed_importance_is_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    first = build(recipe, tmp_path).id
    path = tmp_path / "f1" / "model.safetensors"
    tensors = {name: value * 2 for name, value in load_file(path).items()}
    save_file(tensors, path)
    with pytest.raises(errors.InputChangedError, match="f1"):
        mergepipe.run(tmp_path / "work")
    assert build(recipe, tmp_path).id != first


def drop(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def widen(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.zeros(7)


def count(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (drop, "'model.norm.weight' is not among the tensors of the importances"),
        (widen, r"'model.norm.weight' is \(48,\) in .* but \(7,\) of the importances"),
        (count, "'model.norm.weight' is I32 of the importances"),
    ],
)
def test_importances_that_do_not_fit(
    break_it: Callable[[dict[str, torch.Tensor]], None], told: str, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Found from headers; a rule for the tensor is the remedy that the message names."""
    path = tmp_path / "f1" / "model.safetensors"
    tensors = load_file(path)
    break_it(tensors)
    save_file(tensors, path)
    with pytest.raises(errors.TensorMismatchError, match=told) as caught:
        build(recipe, tmp_path)
    assert "Remedy: " in str(caught.value)
    rules = [{"match": "model.norm", "merge_method": "linear", "parameters": {"weight": 1.0}}]
    assert build(recipe | {"rules": rules}, tmp_path)


@pytest.mark.parametrize(
    ("value", "told"), [(-1e-9, "negative at element 3"), (float("nan"), "holds a NaN or an infinity at element 3")]
)
def test_values_that_are_no_importances(value: float, told: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "f0" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = value
    save_file(tensors, path)
    build(recipe, tmp_path)
    with pytest.raises(errors.CheckpointError, match=told) as caught:
        mergepipe.run(tmp_path / "work")
    assert "model.norm.weight" in str(caught.value)
    assert "f0" in str(caught.value)


def test_what_the_recipe_must_say(recipe: dict[str, Any], tmp_path: Path) -> None:
    del recipe["models"][1]["importance"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    found = check(tmp_path / "r.yaml", tmp_path / "work", out=tmp_path / "merged").faults
    assert [one.where for one in found] == ["$.models[1].importance"]
    recipe |= {"merge_method": "ties", "parameters": {"density": 0.5}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    found = check(tmp_path / "r.yaml", tmp_path / "work", out=tmp_path / "merged").faults
    assert [(one.where, "has no effect" in one.message) for one in found] == [("$.models[0].importance", True)]
