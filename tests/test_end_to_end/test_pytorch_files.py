"""A model in PyTorch files merges to the same bytes as the same model in safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import mergepipe
from support.checkpoints import Family, read_tensors, write_family

pytestmark = pytest.mark.filterwarnings("default")  # transformers warns about itself


def to_pickles(folder: Path, target: Path, shards: int) -> Path:
    """The same checkpoint as transformers 4 wrote it; tied tensors under both of their names."""
    tensors = read_tensors(folder)
    target.mkdir(parents=True)
    shutil.copy(folder / "config.json", target)
    if "lm_head.weight" not in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    names = list(tensors)
    cut = [names[i::shards] for i in range(shards)]
    if shards == 1:
        torch.save(tensors, target / "pytorch_model.bin")
        return target
    weight_map = {}
    for number, part in enumerate(cut):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in part}, target / file)
        weight_map |= dict.fromkeys(part, file)
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return target


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Untied and tied, in bfloat16."""
    return write_family(tmp_path_factory.mktemp("family"), request.param, "bfloat16")


@pytest.mark.parametrize("store", ["virtual", "copy"])
def test_the_same_bytes_as_from_safetensors(store: str, family: Family, tmp_path: Path) -> None:
    shards = 1 if family.kind == "qwen2" else 3
    pickled = [to_pickles(folder, tmp_path / f"pickled-{i}", shards) for i, folder in enumerate(family.folders)]
    merged = {}
    for name, folders in (("safetensors", family.folders), ("pickled", tuple(pickled))):
        models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders[1:]]
        recipe = {"merge_method": "ties", "base_model": str(folders[0]), "models": models}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        plan = mergepipe.build(path, tmp_path / f"work-{name}", out=tmp_path / name, store=store)  # type: ignore[arg-type]
        mergepipe.run(tmp_path / f"work-{name}")
        merged[name] = read_tensors(tmp_path / name)
    assert merged["pickled"].keys() == merged["safetensors"].keys()
    assert all(torch.equal(value, merged["pickled"][name]) for name, value in merged["safetensors"].items())
    assert any("the same bytes" in note for note in plan.notes) is (family.kind == "qwen2")
