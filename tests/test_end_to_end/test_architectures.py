"""Any architecture: what transformers writes, it loads again after a merge, nothing missing, nothing unexpected.

Nothing here is known to mergepipe: tensors are matched by name and shape, tables of tokens found from the
configuration. The checkpoints are those of each architecture as transformers lays them out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import mergepipe
from mergepipe.pipeline.vocabulary_tensors import vocabulary_tensors
from mergepipe.storage.checkpoint import open_checkpoint
from support.checkpoints import read_tensors

pytestmark = pytest.mark.filterwarnings("default")

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT: dict[str, Any] = {**SIZES, "vocab_size": 123, "max_position_embeddings": 40, "pad_token_id": 0}
CAUSAL: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
IMAGE: dict[str, Any] = {**SIZES, "image_size": 16, "patch_size": 8}


@dataclass(frozen=True)
class Kind:
    """An architecture: its class, its configuration, and the tensors that have one row per token."""

    model: str
    config: Callable[[], Any]
    tables: frozenset[str] = frozenset()


def kind(model: str, config: str, values: dict[str, Any], *tables: str) -> Kind:
    return Kind(model, lambda: getattr(transformers, config)(**values), frozenset(tables))


EMBED = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
EXPERTS = {"num_experts_per_tok": 2}

KINDS = {
    "llama": kind("LlamaForCausalLM", "LlamaConfig", CAUSAL, EMBED, HEAD),
    "qwen2": kind("Qwen2ForCausalLM", "Qwen2Config", {**CAUSAL, "tie_word_embeddings": True}, EMBED),
    "qwen3": kind("Qwen3ForCausalLM", "Qwen3Config", {**CAUSAL, "head_dim": 8}, EMBED, HEAD),
    "mistral": kind("MistralForCausalLM", "MistralConfig", {**CAUSAL, "head_dim": 8}, EMBED, HEAD),
    "gemma": kind("GemmaForCausalLM", "GemmaConfig", {**CAUSAL, "head_dim": 8}, EMBED),
    "gemma3": kind("Gemma3ForCausalLM", "Gemma3TextConfig", {**CAUSAL, "head_dim": 8}, EMBED),
    "phi": kind("PhiForCausalLM", "PhiConfig", CAUSAL, EMBED, HEAD, "lm_head.bias"),
    "phi3": kind("Phi3ForCausalLM", "Phi3Config", CAUSAL, EMBED, HEAD),
    "gpt2": kind(
        "GPT2LMHeadModel", "GPT2Config",
        {"vocab_size": 123, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}, "transformer.wte.weight",
    ),
    "mixtral": kind("MixtralForCausalLM", "MixtralConfig", {**CAUSAL, **EXPERTS, "num_local_experts": 3}, EMBED, HEAD),
    "qwen3-moe": kind(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**CAUSAL, **EXPERTS, "num_experts": 3, "moe_intermediate_size": 24, "head_dim": 8}, EMBED, HEAD,
    ),
    "bert": kind(
        "BertForMaskedLM", "BertConfig", TEXT, "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    ),
    "vit": kind("ViTForImageClassification", "ViTConfig", {**IMAGE, "num_labels": 5}),
    "beit": kind(
        "BeitForImageClassification", "BeitConfig",
        {**IMAGE, "num_labels": 5, "use_relative_position_bias": True, "use_shared_relative_position_bias": True},
    ),
    "clip": kind(
        "CLIPModel", "CLIPConfig",
        {"text_config": {**TEXT, "projection_dim": 16}, "vision_config": IMAGE, "projection_dim": 16},
        "text_model.embeddings.token_embedding.weight",
    ),
    "t5": kind(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 123, "d_model": 32, "d_kv": 8, "d_ff": 56, "num_layers": 2, "num_heads": 4,
         "decoder_start_token_id": 0}, "shared.weight",
    ),
    "llava": kind(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {**CAUSAL, "model_type": "llama"},
         "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
         "image_token_index": 7, "vision_feature_layer": -1},
        "language_model.model.embed_tokens.weight", "language_model.lm_head.weight",
    ),
}  # fmt: skip

QUICK = ("qwen3-moe", "beit", "clip", "t5")
"""Those that run every time: experts, integer tables, numbers without dimension, two stacks of layers."""

PARAMS = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in KINDS]


def write_models(folder: Path, name: str, experts: int = 2, config: dict[str, Any] | None = None) -> list[Path]:
    """A base with random weights and experts that differ from it everywhere, as transformers saves them."""
    chosen = KINDS[name]
    paths = []
    for number in range(experts + 1):
        torch.manual_seed(0)
        made = chosen.config()
        for key, value in (config or {}).items():
            setattr(made, key, value)
        model = getattr(transformers, chosen.model)(made)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.01)
        paths.append(folder / ("base" if not number else f"expert-{number}"))
        model.save_pretrained(paths[-1])
    return paths


def merge(folder: Path, paths: list[Path], method: str = "ties", **more: Any) -> tuple[Path, tuple[str, ...]]:
    """The output of a merge of experts over a base, and the plan's notes."""
    listed = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths[1:]]
    document = {"merge_method": method, "base_model": str(paths[0]), "models": listed, **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    plan = mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work").output, plan.notes


def check_loads(name: str, folder: Path) -> Any:
    """The model; transformers has nothing to say about its keys."""
    model, info = getattr(transformers, KINDS[name].model).from_pretrained(
        folder, output_loading_info=True, local_files_only=True, dtype="auto"
    )
    assert {key: value for key, value in info.items() if value} == {}
    return model


@pytest.mark.parametrize("name", PARAMS)
def test_a_merge_of_any_architecture_loads(name: str, tmp_path: Path) -> None:
    """The same names, shapes and types as the base has on disk, and every one is merged or copied for a reason."""
    models = write_models(tmp_path, name)
    output, _ = merge(tmp_path, models)
    model = check_loads(name, output)
    tensors, base = read_tensors(output), read_tensors(models[0])
    assert {key: (value.shape, value.dtype) for key, value in tensors.items()} == {
        key: (value.shape, value.dtype) for key, value in base.items()
    }
    for key, value in tensors.items():
        if value.is_floating_point():
            assert not torch.equal(value, base[key]), key
        else:
            assert torch.equal(value, base[key]), key
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert json.loads((output / "config.json").read_text(encoding="utf-8")) == json.loads(
        (models[0] / "config.json").read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", PARAMS)
def test_tables_of_tokens_are_found(name: str, tmp_path: Path) -> None:
    (path,) = write_models(tmp_path, name, experts=0)
    assert set(vocabulary_tensors([open_checkpoint(path)])) == KINDS[name].tables


def test_linear_with_all_the_weight_on_one_is_that_one(tmp_path: Path) -> None:
    """Experts, gates and all: the same bytes."""
    models = write_models(tmp_path, "qwen3-moe")
    listed = [{"model": str(path), "parameters": {"weight": float(n == 1)}} for n, path in enumerate(models)]
    output, _ = merge(tmp_path, models, "linear", models=listed)
    expected = read_tensors(models[1])
    assert all(torch.equal(value, expected[name]) for name, value in read_tensors(output).items())


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a written model."""
    from safetensors.torch import save_file

    tensors = read_tensors(folder)
    change(tensors)
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("where", ["base", "expert", "everywhere"])
def test_a_stored_twin_of_a_tied_head(tmp_path: Path, where: str) -> None:
    """Some tools store the head that the configuration ties to the embedding; a merge loads all the same."""
    models = write_models(tmp_path, "qwen2")
    for path in {"base": models[:1], "expert": models[1:2], "everywhere": models}[where]:
        rewrite(path, lambda tensors: tensors.update({HEAD: tensors[EMBED]}))
    output, notes = merge(tmp_path, models)
    model = check_loads("qwen2", output)
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    if where != "everywhere":
        assert HEAD not in read_tensors(output)
        assert any("ties it to the embedding" in note for note in notes)


def test_left_over_rotary_buffers(tmp_path: Path) -> None:
    """Older checkpoints store what newer models compute."""
    models = write_models(tmp_path, "llama")
    for path in models:
        buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
        rewrite(path, lambda tensors, buffers=buffers: tensors.update(buffers))  # type: ignore[misc]
    output, notes = merge(tmp_path, models)
    check_loads("llama", output)
    assert not any("inv_freq" in name for name in read_tensors(output))
    assert any("compute these buffers themselves" in note for note in notes)


def test_experts_keep_their_layout(tmp_path: Path) -> None:
    """A checkpoint with one matrix per expert stays one; so does a shared stack of them."""
    models = write_models(tmp_path, "qwen3-moe")
    output, _ = merge(tmp_path, models)
    names = set(read_tensors(output))
    assert names == set(read_tensors(models[0]))
    assert any(".experts." in name for name in names)


@pytest.mark.parametrize("where", [slice(0, 1), slice(1, 2), slice(0, 3)], ids=["base", "expert", "everywhere"])
def test_tables_of_integers_are_the_bases(where: slice, tmp_path: Path) -> None:
    """BEiT's index of relative positions, which older checkpoints store and newer models compute."""
    models = write_models(tmp_path, "beit")
    name = "beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_index"
    for path in models[where]:
        rewrite(path, lambda tensors: tensors.update({name: torch.arange(25).reshape(5, 5)}))
    output, notes = merge(tmp_path, models)
    check_loads("beit", output)
    found = read_tensors(output)
    assert (name in found) == (where.start == 0)
    if name in found:
        assert torch.equal(found[name], torch.arange(25).reshape(5, 5))
    else:
        assert any("compute these buffers themselves" in note for note in notes)


def test_numbers_without_dimension_are_merged(tmp_path: Path) -> None:
    models = write_models(tmp_path, "clip")
    output, _ = merge(tmp_path, models, "linear")
    scales = [read_tensors(path)["logit_scale"] for path in (output, *models[1:])]
    assert scales[0].shape == ()
    assert torch.allclose(scales[0], (scales[1] + scales[2]) / 2)
