"""RobustMerge: adapters in, one adapter out, by the formula, whatever the way."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.pipeline.check import check
from mergepipe.pipeline.events import Event, TensorFinished
from mergepipe.pipeline.run import run
from mergepipe.storage.checkpoint import open_checkpoint
from support import reference_more
from support.checkpoints import Family, write_family

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft and transformers

CONFIG = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "target_modules": ["q"], "base_model_name_or_path": "x"}
PREFIX = "base_model.model."
SHAPES = {
    "q.lora_A.weight": (5, 70_001),
    "q.lora_B.weight": (33, 5),
    "conv.lora_A.weight": (3, 7, 3, 3),
    "conv.lora_B.weight": (11, 3, 1, 1),
    "embed.lora_embedding_A": (4, 301),
    "embed.lora_embedding_B": (16, 4),
    "norm.weight": (61,),
}
PAIRS = [("q.lora_A.weight", "q.lora_B.weight"), ("conv.lora_A.weight", "conv.lora_B.weight")]
PAIRS += [("embed.lora_embedding_A", "embed.lora_embedding_B")]


def write_adapter(folder: Path, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {PREFIX + name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_recipe(folder: Path, adapters: list[Path], **keys: Any) -> Path:
    recipe = {"merge_method": "robustmerge", "models": [{"model": str(path)} for path in adapters]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | keys))
    return folder / "recipe.yaml"


def merge(folder: Path, adapters: list[Path], keys: dict[str, Any] | None = None, **how: Any) -> Path:
    at_run = {key: how.pop(key) for key in ("workers", "reader") if key in how}
    mergepipe.build(write_recipe(folder, adapters, **(keys or {})), folder / "work", out=folder / "merged", **how)
    return mergepipe.run(folder / "work", **at_run).output


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [write_adapter(tmp_path / f"adapter-{seed}", seed) for seed in range(3)]


@pytest.mark.parametrize("options", [{}, {"mask_ratio": 0.5, "att_ratio": 0.6, "lambda": 1.0}])
def test_the_merge_is_the_formula(options: dict[str, float], adapters: list[Path], tmp_path: Path) -> None:
    out = load_file(merge(tmp_path, adapters, {"parameters": options}) / "adapter_model.safetensors")
    found = {name.removeprefix(PREFIX): value.numpy() for name, value in out.items()}
    sides = [load_file(path / "adapter_model.safetensors") for path in adapters]
    given = {name: [side[PREFIX + name].double().numpy() for side in sides] for name in SHAPES}
    known = {"scale" if key == "lambda" else key: value for key, value in options.items()}
    for a, b in PAIRS:
        downs = [x.reshape(x.shape[0], -1) for x in given[a]]
        ups = [x.reshape(x.shape[:2]) for x in given[b]]
        for name, expected in zip((a, b), reference_more.robustmerge(downs, ups, **known), strict=True):
            np.testing.assert_allclose(found[name], expected.reshape(SHAPES[name]), rtol=2e-7, atol=1e-12)
    np.testing.assert_allclose(found["norm.weight"], np.mean(given["norm.weight"], axis=0), rtol=1e-6, atol=1e-7)


def test_the_manifest_says_what_the_masks_keep(adapters: list[Path], tmp_path: Path) -> None:
    merged = merge(tmp_path, adapters, {"parameters": {"mask_ratio": 0.25}})
    records = json.loads((merged / "mergepipe_manifest.json").read_text())["tensors"]
    for name, shape in SHAPES.items():
        if name == "norm.weight":
            assert PREFIX + name not in records
            continue
        for side, found in zip(adapters, records[PREFIX + name]["kept_norms"], strict=True):
            sizes = np.sort(load_file(side / "adapter_model.safetensors")[PREFIX + name].double().numpy().ravel() ** 2)
            kept = sizes[len(sizes) - int(0.25 * np.prod(shape)) :]
            assert found == pytest.approx(float(np.sqrt(kept.sum() / sizes.sum())), rel=1e-12)


def test_by_hand(tmp_path: Path) -> None:
    """Two models, rank 2, half of each factor kept, no scale raised."""
    downs = [[[4.0, 0, 1, 0], [0, 3, 1, 1]], [[2.0, 2, 0, 0], [1, 0, 0, 5]]]
    ups = [[[8.0, 0.0], [1.0, 6.0]], [[0.0, 4.0], [2.0, 1.0]]]
    folders = []
    for number, (a, b) in enumerate(zip(downs, ups, strict=True)):
        folder = tmp_path / f"adapter-{number}"
        folder.mkdir()
        tensors = {f"{PREFIX}q.lora_A.weight": torch.tensor(a), f"{PREFIX}q.lora_B.weight": torch.tensor(b)}
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 2}))
        folders.append(folder)
    keys = {"parameters": {"mask_ratio": 0.5, "att_ratio": 1.0}}
    out = load_file(merge(tmp_path, folders, keys) / "adapter_model.safetensors")
    # The four largest of A: 4, 1, 3, 1, 1 (equal ones stay) and 2, 2, 5, 1: nothing but zeros is dropped, all S are 1.
    assert out[f"{PREFIX}q.lora_A.weight"].tolist() == [[12, 4, 2, 0], [2, 6, 2, 12]]
    assert out[f"{PREFIX}q.lora_B.weight"].tolist() == [[8, 4], [2, 6]]
    keys = {"parameters": {"mask_ratio": 0.25, "att_ratio": 1.0}}
    out = load_file(merge(tmp_path / "second", folders, keys) / "adapter_model.safetensors")
    # Two largest of A: 4 and 3, or 5, 2, 2; S = (5/4, 5/3) and (1, 6/5). Largest of B: 8, and 4.
    assert out[f"{PREFIX}q.lora_A.weight"].tolist() == [[12, 4, 0, 0], [0, 6, 0, 10]]
    expected = [[2 * 8 * (5 / 4) / (5 / 4 + 1), 2 * 4 * (6 / 5) / (5 / 3 + 6 / 5)], [0, 0]]
    np.testing.assert_allclose(out[f"{PREFIX}q.lora_B.weight"].numpy(), expected, rtol=1e-6)


def test_the_way_does_not_show(adapters: list[Path], tmp_path: Path) -> None:
    """Chunks, workers, readers, stores and an interruption."""
    expected = digest(merge(tmp_path / "plain", adapters))
    assert digest(merge(tmp_path / "small", adapters, workers=3, chunk_size="4KiB", reader="mmap")) == expected
    assert digest(merge(tmp_path / "odd", adapters, workers=2, chunk_size=70_001, reader="direct")) == expected
    assert digest(merge(tmp_path / "copy", adapters, store="copy", chunk_size="64KiB")) == expected
    assert digest(merge(tmp_path / "one-file", adapters, shard_size="1KB")) == expected, "PEFT knows one file only"
    folder, stop = tmp_path / "cut", threading.Event()
    mergepipe.build(write_recipe(folder, adapters), folder / "work", out=folder / "merged", chunk_size="4KiB")

    def listen(event: Event) -> None:
        if isinstance(event, TensorFinished):
            stop.set()

    with pytest.raises(errors.Interrupted):
        run(folder / "work", workers=1, stop=stop, on_event=listen)
    assert not (folder / "merged" / "adapter_model.safetensors").exists()
    assert digest(mergepipe.run(folder / "work").output) == expected


def write_trained(family: Family, folder: Path, seed: int) -> Path:
    """An adapter as PEFT writes it, its factors as after a training."""
    model = transformers.LlamaForCausalLM.from_pretrained(family.base, local_files_only=True)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    tuned = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return folder


def test_peft_loads_what_comes_out(tmp_path: Path) -> None:
    family = write_family(tmp_path, "llama", experts=0)
    trained = [write_trained(family, tmp_path / f"trained-{seed}", seed) for seed in (1, 2)]
    merged = merge(tmp_path / "job", trained)
    assert {path.name for path in merged.iterdir()} >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert open_checkpoint(merged).is_adapter
    assert "library_name: peft" in (merged / "README.md").read_text(encoding="utf-8")
    base = transformers.LlamaForCausalLM.from_pretrained(family.base, local_files_only=True)
    before = base.state_dict()["model.layers.1.mlp.up_proj.weight"].clone()
    state = peft.PeftModel.from_pretrained(base, str(merged)).merge_and_unload().state_dict()
    stored = load_file(merged / "adapter_model.safetensors")
    a, b = (stored[f"{PREFIX}model.layers.1.mlp.up_proj.lora_{side}.weight"] for side in "AB")
    change = json.loads((merged / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"] / 4 * b @ a
    torch.testing.assert_close(state["model.layers.1.mlp.up_proj.weight"], before + change)


def refusal(folder: Path, adapters: list[Path], **keys: Any) -> str:
    """What check says of a recipe that build refuses with exit code 4."""
    path = write_recipe(folder, adapters, **keys)
    with pytest.raises(errors.CheckpointError):
        mergepipe.build(path, folder / "work", out=folder / "merged")
    checked = check(path, folder / "work", out=folder / "merged")
    assert checked.exit_code == 4
    return "\n".join(fault.message for fault in checked.faults)


def test_what_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", 7, lora_alpha=16, use_rslora=True)
    told = refusal(tmp_path / "job", [*adapters, other])
    assert "lora_alpha is 16, in" in told
    assert "use_rslora is True" in told
    told = refusal(tmp_path / "job", [write_adapter(tmp_path / "dora", 8, use_dora=True)])
    assert "DoRA" in told
    lonely = load_file(adapters[0] / "adapter_model.safetensors")
    del lonely[f"{PREFIX}q.lora_B.weight"]
    lonely[f"{PREFIX}conv.lora_B.weight"] = torch.zeros(11)
    (tmp_path / "lonely").mkdir()
    save_file(lonely, tmp_path / "lonely" / "adapter_model.safetensors")
    (tmp_path / "lonely" / "adapter_config.json").write_text(json.dumps(CONFIG))
    told = refusal(tmp_path / "job", [tmp_path / "lonely"])
    assert "q.lora_A.weight' has no counterpart" in told
    assert "no pair of one rank" in told
    wide = {name: torch.zeros(6, 70_001) if "q.lora_A" in name else value for name, value in lonely.items()}
    wide[f"{PREFIX}q.lora_B.weight"] = torch.zeros(33, 6)
    wide[f"{PREFIX}conv.lora_B.weight"] = torch.zeros(11, 3, 1, 1)
    (tmp_path / "wide").mkdir()
    save_file(wide, tmp_path / "wide" / "adapter_model.safetensors")
    (tmp_path / "wide" / "adapter_config.json").write_text(json.dumps(CONFIG))
    told = refusal(tmp_path / "job", [adapters[0], tmp_path / "wide"])
    assert "(5, 70001)" in told
    assert "for one rank" in told


def test_adapters_and_models_do_not_mix(adapters: list[Path], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"q.weight": torch.zeros(3)}, tmp_path / "model" / "model.safetensors")
    assert "is a whole model" in refusal(tmp_path / "job", [*adapters, tmp_path / "model"])
    keys = {"merge_method": "linear", "parameters": {"weight": 1.0}}
    assert "is not the average of their products" in refusal(tmp_path / "job", adapters, **keys)
    assert "can't be mixed" in refusal(tmp_path / "job", adapters, rules=[{"match": "q", "merge_method": "karcher"}])
