"""Fisher merging of checkpoints: importances are inputs like any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.pipeline.check import check
from mergepipe.pipeline.memory import MIB
from mergepipe.pipeline.summary import scheduled
from support import reference_more
from support.checkpoints import Family, load, read_tensors, write_family
from support.vocabularies import TABLES, byte_tokenizer, expected_rows, write_model


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
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
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


def write_importances(folder: Path, model: Path, seed: int) -> Path:
    """Importances of a model, float32, most of them small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.rand(value.shape, generator=generator) ** 8 for name, value in read_tensors(model).items()}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_importances_of_slices_are_those_of_the_layers_taken(family: Family, tmp_path: Path) -> None:
    """Other layers of each model meet in a slice; importances are found by the names that the model has."""
    a, b = family.experts
    f = [write_importances(tmp_path / f"f{number}", model, number) for number, model in enumerate((a, b))]
    ranges = [[(0, 1), (1, 2)], [(0, 2), (0, 2)]]
    slices = [
        {
            "sources": [
                {"model": str(model), "importance": str(own), "layer_range": list(taken)}
                for model, own, taken in zip((a, b), f, row, strict=True)
            ]
        }
        for row in ranges
    ]
    build({"merge_method": "fisher", "slices": slices, "out_dtype": "float32"}, tmp_path)
    out = Path(mergepipe.run(tmp_path / "work").output)
    made = read_tensors(out)
    sides = [{name: t.double().numpy() for name, t in read_tensors(one).items()} for one in (a, b, *f)]
    names = {0: (0, 1), 1: (0, 0), 2: (1, 1)}
    assert {int(name.split(".")[2]) for name in made if ".layers." in name} == {0, 1, 2}
    for name, value in made.items():
        called = [name, name]
        if ".layers." in name:
            prefix, _, rest = name.partition(".layers.")
            number, _, rest = rest.partition(".")
            called = [f"{prefix}.layers.{old}.{rest}" for old in names[int(number)]]
        x, y, fx, fy = (side[which] for side, which in zip(sides, called * 2, strict=True))
        expected = reference_more.fisher(None, [x, y], [fx, fy], [1, 1])
        np.testing.assert_allclose(value.numpy(), expected, rtol=3e-7, atol=1e-9, err_msg=name)
    _, info = load(out, "llama")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_slices_say_what_importances_lack(family: Family, tmp_path: Path) -> None:
    a, b = family.experts
    f = [write_importances(tmp_path / f"f{number}", model, number) for number, model in enumerate((a, b))]
    tensors = load_file(f[1] / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, f[1] / "model.safetensors")
    sources = [
        {"model": str(model), "importance": str(own), "layer_range": taken}
        for model, own, taken in ((a, f[0], [0, 1]), (b, f[1], [1, 2]))
    ]
    with pytest.raises(errors.TensorMismatchError, match=r"'model.layers.1.mlp.up_proj.weight' is not among"):
        build({"merge_method": "fisher", "slices": [{"sources": sources}]}, tmp_path)
    del sources[1]["importance"]
    with pytest.raises(errors.RecipeError, match=r"slices\[0\].sources\[1\].importance"):
        build({"merge_method": "fisher", "slices": [{"sources": sources}]}, tmp_path)
    with pytest.raises(errors.RecipeError, match=r"slices\[0\].sources\[0\].importance: has no effect"):
        build({"merge_method": "linear", "parameters": {"weight": 1}, "slices": [{"sources": sources}]}, tmp_path)


@pytest.mark.parametrize("based", [False, True])
def test_a_model_without_a_token_has_no_say_about_its_row(based: bool, tmp_path: Path) -> None:
    """Over a union: own rows count as the model's importances say, lent ones for nothing; padding by the weights."""
    plain = ["ab", "cd"]
    models = [
        write_model(tmp_path / "base", byte_tokenizer(plain), 0),
        write_model(tmp_path / "chat", byte_tokenizer(plain, {"<chat>": True, "<tool>": False}), 1),
        write_model(tmp_path / "more", byte_tokenizer(plain, {"<x>": True, "<tool>": False}), 2),
    ]
    f = [write_importances(tmp_path / f"f{n}", model.folder, n) for n, model in enumerate(models[1:])]
    document: dict[str, Any] = {
        "merge_method": "fisher",
        "models": [
            {"model": str(model.folder), "importance": str(own), "parameters": {"weight": weight}}
            for model, own, weight in zip(models[1:], f, (1, 2), strict=True)
        ],
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    if based:
        document["base_model"] = str(models[0].folder)
    read = models if based else models[1:]
    build(document, tmp_path)
    out = Path(mergepipe.run(tmp_path / "work").output)
    made = read_tensors(out)
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    for table in TABLES:
        rows = [expected_rows(ids, read, table, which, base=0 if based else None) for which in range(len(read))]
        counted = []
        for model, folder in zip(models[1:], f, strict=True):
            own = read_tensors(folder)[table].double().numpy()
            counted.append(np.zeros_like(rows[0]))
            for token in model.vocab:
                counted[-1][ids[token]] = own[model.vocab[token]]
        base = rows.pop(0) if based else None
        expected = reference_more.fisher(base, rows, counted, [1, 2])
        found = made[table].numpy()
        assert len(found) % 8 == 0
        np.testing.assert_allclose(found[: len(expected)], expected, rtol=3e-7, atol=1e-6, err_msg=table)
        padding = (rows[0].mean(0) + 2 * rows[1].mean(0)) / 3
        assert np.allclose(found[len(expected) :], padding, rtol=1e-6, atol=1e-6)
    only = ids["<x>"]
    assert np.array_equal(made[TABLES[0]][only], models[2].tables[TABLES[0]][models[2].vocab["<x>"]].astype("f4"))


def test_importances_of_another_size_than_their_model(tmp_path: Path) -> None:
    models = [
        write_model(tmp_path / "a", byte_tokenizer(["ab"]), 0),
        write_model(tmp_path / "b", byte_tokenizer(["ab"], {"<x>": True}), 1),
    ]
    f = [write_importances(tmp_path / f"f{n}", models[0].folder, n) for n in (0, 1)]
    document: dict[str, Any] = {
        "merge_method": "fisher",
        "models": [{"model": str(m.folder), "importance": str(i)} for m, i in zip(models, f, strict=True)],
        "tokenizer_source": "union",
    }
    with pytest.raises(errors.TensorMismatchError, match=r"of its importances .*f1"):
        build(document, tmp_path)
    document["models"][1]["importance"] = document["models"][0]["importance"]
    with pytest.raises(errors.RecipeError, match="models of different vocabularies"):
        build(document, tmp_path)
