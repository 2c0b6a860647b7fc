"""Folders that transformers wrote go in, and transformers loads what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergepipe
from support.checkpoints import KINDS, Family, load, logits, read_tensors, write_family

STORED = (("float32", "1GB"), ("bfloat16", "60KB"))
"""Dtype and shard size: one file of float32, several of bfloat16."""

FAMILIES = [pytest.param((kind, *stored), id=f"{kind}-{stored[0]}") for kind in KINDS for stored in STORED]

# transformers loads lazily through modules that warn about themselves; none of it is about the checkpoint.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A base and two experts of each kind, dtype and sharding."""
    kind, dtype, shard_size = request.param
    return write_family(tmp_path_factory.mktemp(kind), kind, dtype, experts=2, shard_size=shard_size)


def merge(recipe: dict[str, Any], folder: Path) -> Path:
    """Build and run a recipe; the output folder."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mergepipe.build(path, work=folder / "work", out=folder / "merged")
    return Path(mergepipe.run(folder / "work").output)


def ties(family: Family) -> dict[str, Any]:
    """TIES over both experts."""
    experts = [{"model": str(path), "parameters": {"weight": 0.5, "density": 0.5}} for path in family.experts]
    return {"merge_method": "ties", "base_model": str(family.base), "models": experts}


def test_a_merge_loads_with_every_key(family: Family, tmp_path: Path) -> None:
    """Nothing missing, nothing unexpected; the dtype is the inputs'."""
    merged = merge(ties(family), tmp_path)
    model, info = load(merged, family.kind)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    expected = {name: (value.shape, value.dtype) for name, value in read_tensors(family.base).items()}
    assert {name: (value.shape, value.dtype) for name, value in read_tensors(merged).items()} == expected
    assert torch.isfinite(logits(model, family.kind)).all()


def test_a_merge_is_none_of_its_parents(family: Family, tmp_path: Path) -> None:
    """Every tensor that an expert changed is changed in the merge; the frozen one is the base's to the bit."""
    merged = read_tensors(merge(ties(family), tmp_path))
    base, *experts = [read_tensors(folder) for folder in family.folders]
    for name, value in merged.items():
        moved = any(not torch.equal(expert[name], base[name]) for expert in experts)
        assert torch.equal(value, base[name]) is not moved, name


def test_linear_with_all_the_weight_on_one_model_is_that_model(family: Family, tmp_path: Path) -> None:
    """The same logits to the last bit, and the same bytes in every tensor."""
    models = [
        {"model": str(family.experts[0]), "parameters": {"weight": 1}},
        {"model": str(family.experts[1]), "parameters": {"weight": 0}},
    ]
    merged = merge({"merge_method": "linear", "models": models}, tmp_path)
    theirs, ours = (load(folder, family.kind)[0] for folder in (family.experts[0], merged))
    assert torch.equal(logits(ours, family.kind), logits(theirs, family.kind))
    expected = read_tensors(family.experts[0])
    assert all(torch.equal(value, expected[name]) for name, value in read_tensors(merged).items())


def test_linear_of_one_model_alone(family: Family, tmp_path: Path) -> None:
    """A single model with weight 1 comes out as it went in."""
    models = [{"model": str(family.experts[1]), "parameters": {"weight": 1}}]
    merged = merge({"merge_method": "linear", "models": models}, tmp_path)
    theirs, ours = (load(folder, family.kind)[0] for folder in (family.experts[1], merged))
    assert torch.equal(logits(ours, family.kind), logits(theirs, family.kind))


def test_the_shards_are_the_bases(family: Family, tmp_path: Path) -> None:
    """As many files, the same division of tensors among them, and an index that adds up."""
    merged = merge(ties(family), tmp_path)
    index = merged / "model.safetensors.index.json"
    theirs = family.base / "model.safetensors.index.json"
    assert index.exists() == theirs.exists()
    if index.exists():
        ours, base = json.loads(index.read_text(encoding="utf-8")), json.loads(theirs.read_text(encoding="utf-8"))
        assert ours["weight_map"] == base["weight_map"]
        assert ours["metadata"]["total_size"] == sum(t.nbytes for t in read_tensors(merged).values())
