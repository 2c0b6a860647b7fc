"""mergepipe against mergekit 0.1.5 on recipes of several parts: slices, modules, several documents.

What is copied or scaled is equal to the bit. Averages and task arithmetic differ by 2 units in the last place of the
largest number that an element's sum goes through, arcs by 8: mergekit takes their angle in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import mergepipe
from oracle.rival import run_mergekit
from oracle.test_mergekit import as_numpy
from support.checkpoints import read_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

Recipe = dict[str, Any]
LAYERS = 4
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, tie_word_embeddings=False))


def tied_qwen() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TEXT, tie_word_embeddings=True)).to(torch.bfloat16)


def seeing_mistral() -> Any:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "head_dim": 16,
    }
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=transformers.PixtralVisionConfig(**vision),
        image_token_index=62,
    )
    return transformers.Mistral3ForConditionalGeneration(config)


KINDS: dict[str, tuple[Callable[[], Any], Any]] = {
    "llama": (llama, transformers.LlamaForCausalLM),
    "qwen": (tied_qwen, transformers.Qwen2ForCausalLM),
    "mistral3": (seeing_mistral, transformers.Mistral3ForConditionalGeneration),
}


def of(model: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": model, "layer_range": [first, end]} | ({"parameters": parameters} if parameters else {})


def one(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"sources": list(sources)} | more


@dataclass(frozen=True)
class Case:
    """One recipe; models are called a, b and c. `ulps` is how far the results may be apart."""

    name: str
    kind: str
    recipe: Recipe
    ulps: float = 0.0
    layers: int = LAYERS


DAMPED = [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.25}, {"value": 1.0}]
BY_PART = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "mlp", "value": [1, 0.2]},
    {"value": 0.5},
]
SHARES = [{"filter": "self_attn", "value": [0.3, 1.0]}, {"filter": "mlp", "value": [1, 0.2]}, {"value": 0.5}]
BY_LAYER = [*({"filter": f"layers.{n}.", "value": 0.1 * n} for n in range(LAYERS)), {"value": 0.7}]

CASES = (
    Case(
        "stack",
        "llama",
        {"merge_method": "passthrough", "slices": [one(of("a", 0, 3)), one(of("b", 1, 4))]},
        layers=6,
    ),
    Case(
        "stack-tied",
        "qwen",
        {"merge_method": "passthrough", "slices": [one(of("a", 0, 3)), one(of("a", 1, 3)), one(of("a", 1, 4))]},
        layers=8,
    ),
    Case(
        "stack-damped",
        "llama",
        {
            "merge_method": "passthrough",
            "dtype": "float32",
            "slices": [
                one(of("a", 0, 2)),
                one(of("a", 0, 2, scale=DAMPED)),
                one(of("b", 2, 4), parameters={"scale": 2}),
            ],
        },
        layers=6,
    ),
    Case(
        "slerp-gradient",
        "llama",
        {
            "merge_method": "slerp",
            "base_model": "a",
            "dtype": "float32",
            "parameters": {"t": BY_PART},
            "slices": [one(of("a", 0, 4), of("b", 0, 4))],
        },
        ulps=8,
    ),
    Case(
        "slerp-slices",
        "llama",
        {
            "merge_method": "slerp",
            "base_model": "a",
            "dtype": "float32",
            "parameters": {"t": [0.2, 0.9]},
            "slices": [
                one(of("a", 0, 2), of("b", 2, 4)),
                one(of("a", 2, 3), of("b", 2, 3)),
                one(of("b", 1, 4), of("a", 1, 4), base_model="b", parameters={"t": BY_LAYER}),
            ],
        },
        ulps=8,
        layers=6,
    ),
    Case(
        "linear-precedence",
        "llama",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "parameters": {"weight": 0.4, "normalize": False},
            "slices": [
                one(
                    of("a", 0, 2, weight=[{"filter": "down_proj", "value": [0.1, 0.9]}]),
                    of("b", 2, 4, weight=BY_LAYER),
                    parameters={"weight": [{"filter": "mlp", "value": 0.8}]},
                ),
                one(of("c", 0, 2), of("a", 2, 4, weight=0.3), parameters={"normalize": True}),
            ],
        },
        ulps=2,
    ),
    Case(
        "task-arithmetic-slices",
        "llama",
        {
            "merge_method": "task_arithmetic",
            "base_model": "c",
            "dtype": "float32",
            "parameters": {"weight": [0.2, 0.6], "lambda": [0.5, 1.0]},
            "slices": [
                one(of("c", 0, 2), of("a", 0, 2), of("b", 0, 2)),
                one(of("a", 2, 4), of("c", 2, 4), of("b", 1, 3)),
            ],
        },
        ulps=2,
    ),
    Case(
        "ties-slices",
        "llama",
        {
            "merge_method": "ties",
            "base_model": "c",
            "dtype": "float32",
            "parameters": {"density": [0.9, 0.4], "weight": 0.5, "normalize": True},
            "slices": [
                one(
                    of("c", 0, 2),
                    of("a", 0, 2, density=[{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.7}]),
                    of("b", 0, 2, weight=[1, 0.2]),
                ),
                one(of("c", 1, 4), of("b", 1, 4, weight=BY_PART), of("a", 1, 4), parameters={"density": 0.3}),
            ],
        },
        ulps=4,
        layers=5,
    ),
    Case(
        "filters-in-a-slice",
        "llama",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "slices": [
                one(of("a", 0, 3), of("b", 0, 3), parameters={"weight": SHARES}),
                one(of("a", 3, 4, weight=[0.3, 0.9]), of("c", 3, 4), parameters={"weight": [0.2, 0.4, 0.8]}),
            ],
        },
        ulps=2,
    ),
    Case(
        "default-module",
        "llama",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "parameters": {"weight": 0.5},
            "modules": {
                "default": {
                    "parameters": {"weight": [{"filter": "mlp", "value": [0.3, 0.6]}]},
                    "slices": [one(of("a", 0, 2), of("b", 0, 2)), one(of("c", 2, 4), of("b", 2, 4, weight=1.5))],
                }
            },
        },
        ulps=2,
    ),
    Case(
        "towers",
        "mistral3",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "parameters": {"weight": 1},
            "modules": {
                "text_decoder": {"slices": [one(of("a", 0, 3)), one(of("b", 1, 4))]},
                "vision_tower": {"models": [{"model": "a"}, {"model": "b", "parameters": {"weight": [0.2, 2]}}]},
                "multi_modal_projector": {"models": [{"model": "b"}]},
            },
        },
        ulps=2,
        layers=6,
    ),
    Case(
        "whole-vlm",
        "mistral3",
        {
            "merge_method": "linear",
            "dtype": "float32",
            "parameters": {"weight": 0.5},
            "models": [{"model": "a"}, {"model": "b"}],
        },
        ulps=2,
    ),
)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of each kind."""
    root = tmp_path_factory.mktemp("parts")
    for kind, (new, _) in KINDS.items():
        for seed, name in enumerate("abc"):
            torch.manual_seed(seed)
            new().save_pretrained(root / kind / name)
    return root


def with_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the folders of its models."""
    text = json.dumps(recipe)
    for name in "abc":
        for key in ("model", "base_model"):
            text = text.replace(f'"{key}": "{name}"', f'"{key}": "{folder / name}"')
    found: Recipe = json.loads(text)
    return found


@pytest.fixture(scope="session")
def rival(models: Path, mergekit_python: Path) -> dict[str, Path]:
    """What mergekit made of every case."""
    recipes = {case.name: with_paths(case.recipe, models / case.kind) for case in CASES}
    return run_mergekit(mergekit_python, recipes, models / "mergekit")


def merge(text: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return Path(mergepipe.run(folder / "work").output)


def differing(ours: Path, theirs: Path, largest: float, ulps: float) -> list[str]:
    """Names of tensors that differ by more than allowed; numbers summed up are no larger than `largest` times those."""
    made, expected = read_tensors(ours), read_tensors(theirs)
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}
    if not ulps:
        return [name for name, value in made.items() if not torch.equal(value, expected[name])]
    found = []
    for name in made:
        a, b = (as_numpy(each[name]).astype(np.float64) for each in (made, expected))
        scale = np.maximum(np.abs(a), largest)
        if (np.abs(a - b) > ulps * np.spacing(scale.astype(np.float32))).any():
            found.append(name)
    return found


def biggest(folder: Path) -> float:
    """The largest number in any of the models but for those that are all 1, the norms."""
    tensors = [read_tensors(path) for path in sorted(folder.iterdir())]
    return max(
        float(value.float().abs().max()) for each in tensors for name, value in each.items() if "norm" not in name
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_recipe_same_model(case: Case, models: Path, rival: dict[str, Path], tmp_path: Path) -> None:
    """The same tensors, and a model that loads with its layers."""
    theirs = rival[case.name]
    assert (theirs / "merged").is_dir(), (theirs / "error.txt").read_text(encoding="utf-8")
    ours = merge(yaml.safe_dump(with_paths(case.recipe, models / case.kind)), tmp_path)
    assert differing(ours, theirs / "merged", biggest(models / case.kind), case.ulps) == []
    model, info = KINDS[case.kind][1].from_pretrained(ours, output_loading_info=True, local_files_only=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    text = getattr(model.config, "text_config", model.config)
    assert text.num_hidden_layers == case.layers


DOCUMENTS = (
    {
        "name": "blend",
        "merge_method": "slerp",
        "base_model": "a",
        "dtype": "float32",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": {"t": [0.2, 0.8]},
    },
    {
        "name": "tower",
        "merge_method": "passthrough",
        "dtype": "float32",
        "slices": [one(of("blend", 0, 3)), one(of("c", 2, 4))],
    },
    {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": 1},
        "slices": [
            one(of("tower", 0, 2), of("blend", 0, 2)),
            one(of("tower", 3, 5), of("c", 2, 4)),
        ],
    },
)


def test_a_chain_of_merges(models: Path, mergekit_python: Path, tmp_path: Path) -> None:
    """Three documents, the last without a name."""
    text = yaml.safe_dump_all([with_paths(document, models / "llama") for document in DOCUMENTS])
    (tmp_path / "multi.yaml").write_text(text)
    command = [str(mergekit_python.parent / "mergekit-multi"), str(tmp_path / "multi.yaml"), "--no-copy-tokenizer"]
    command += ["-I", str(tmp_path / "between"), "--out-path", str(tmp_path / "theirs"), "--no-write-model-card"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ours = merge(text, tmp_path)
    assert differing(ours, tmp_path / "theirs", biggest(models / "llama"), 8) == []
    assert transformers.LlamaForCausalLM.from_pretrained(ours).config.num_hidden_layers == 4


def test_mergekit_merges_too_few_after_the_layers(models: Path, mergekit_python: Path, tmp_path: Path) -> None:
    """Where the last slice has more sources than the first, mergekit leaves some out of norm and head; we do not."""
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": 1, "normalize": False},
        "slices": [one(of("c", 0, 2)), one(of("a", 2, 4), of("b", 2, 4))],
    }
    paths = with_paths(recipe, models / "llama")
    theirs = read_tensors(run_mergekit(mergekit_python, {"few": paths}, tmp_path / "mergekit")["few"] / "merged")
    ours = read_tensors(merge(yaml.safe_dump(paths), tmp_path / "ours"))
    a, b = (read_tensors(models / "llama" / name)["lm_head.weight"] for name in "ab")
    assert torch.equal(theirs["lm_head.weight"], a)
    assert torch.equal(ours["lm_head.weight"], a + b)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "layers" in name)


def test_mergekit_drops_a_tower_that_no_module_names(models: Path, mergekit_python: Path, tmp_path: Path) -> None:
    """We copy it from the first model."""
    recipe = {
        "merge_method": "linear",
        "dtype": "float32",
        "parameters": {"weight": 1},
        "modules": {"text_decoder": {"models": [{"model": "a"}, {"model": "b"}]}},
    }
    paths = with_paths(recipe, models / "mistral3")
    theirs = read_tensors(run_mergekit(mergekit_python, {"part": paths}, tmp_path / "mergekit")["part"] / "merged")
    ours = read_tensors(merge(yaml.safe_dump(paths), tmp_path / "ours"))
    first = read_tensors(models / "mistral3" / "a")
    assert {name.partition(".")[0] for name in theirs} == {"language_model"}
    assert ours.keys() == first.keys()
    assert all(torch.equal(ours[name], first[name]) for name in first.keys() - theirs.keys())
