"""Stacks of layers and towers of models that transformers wrote, and that it loads again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

import mergepipe
from support.checkpoints import Family, load, logits, read_tensors, write_family

# transformers loads lazily through modules that warn about themselves; none of it is about the checkpoint.
pytestmark = pytest.mark.filterwarnings("default")

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def merge(recipe: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Build and run a recipe; the output folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **options)
    return Path(mergepipe.run(folder / "work").output)


def source(path: Path, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(path), "layer_range": [first, end]} | ({"parameters": parameters} if parameters else {})


def write(folder: Path, new: Callable[[], Any]) -> tuple[Path, Path]:
    """Two models of one configuration with weights of their own."""
    paths = folder / "a", folder / "b"
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        new().save_pretrained(path)
    return paths


def loads(cls: Any, folder: Path) -> Any:
    """The model, with nothing missing and nothing unexpected."""
    found, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    return found


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("qwen2"), "qwen2", "float32", experts=2, shard_size="60KB")


def test_a_frankenmerge_with_damped_layers(family: Family, tmp_path: Path) -> None:
    """A stack in which repeated layers add less: in `o_proj` and `down_proj` they are scaled."""
    a, b = family.experts
    scale = [{"filter": "o_proj", "value": 0.5}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
    slices = [[source(a, 0, 2)], [source(a, 0, 2, scale=scale)], [source(b, 1, 2)]]
    merged = merge({"merge_method": "passthrough", "slices": [{"sources": one} for one in slices]}, tmp_path)
    model, info = load(merged, "qwen2")
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert model.config.num_hidden_layers == 5
    assert len(model.config.layer_types) == 5
    assert torch.isfinite(logits(model, "qwen2")).all()
    made, first, last = read_tensors(merged), read_tensors(a), read_tensors(b)
    layer = "model.layers.{}.{}.weight".format
    assert torch.equal(made[layer(2, "self_attn.o_proj")], first[layer(0, "self_attn.o_proj")] * 0.5)
    assert not made[layer(3, "mlp.down_proj")].any()
    assert torch.equal(made[layer(4, "mlp.up_proj")], last[layer(1, "mlp.up_proj")])
    assert torch.equal(made["model.norm.weight"], last["model.norm.weight"])
    assert torch.equal(made["model.embed_tokens.weight"], first["model.embed_tokens.weight"])


@pytest.mark.parametrize("method", ["ties", "slerp"])
def test_a_model_cut_into_slices_is_merged_as_a_whole(family: Family, method: str, tmp_path: Path) -> None:
    """The same bytes in every tensor, however the layers are cut."""
    base, (a, b) = family.base, family.experts
    experts = [a] if method == "slerp" else [a, b]
    parameters = {"t": 0.3} if method == "slerp" else {"weight": 0.6, "density": 0.4}
    recipe = {"merge_method": method, "base_model": str(base), "parameters": parameters}
    whole = merge(recipe | {"models": [{"model": str(path)} for path in experts]}, tmp_path / "whole")
    sliced = [{"sources": [source(path, n, n + 1) for path in (base, *experts)]} for n in range(2)]
    cut = merge(recipe | {"slices": sliced}, tmp_path / "cut", chunk_size="16KiB")
    expected, made = read_tensors(whole), read_tensors(cut)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())


def test_an_encoder_and_a_decoder(tmp_path: Path) -> None:
    """T5 by modules: a longer decoder of two, an encoder averaged, the shared embedding of one."""
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=2
    )
    a, b = write(tmp_path, lambda: transformers.T5ForConditionalGeneration(config))
    modules = {
        "decoder": {"slices": [{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 0, 2)]}]},
        "encoder": {"models": [{"model": str(a)}, {"model": str(b)}]},
    }
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules}
    merged = merge(recipe, tmp_path / "merge")
    model = loads(transformers.T5ForConditionalGeneration, merged)
    assert (model.config.num_decoder_layers, model.config.num_layers) == (4, 3)
    made, first, second = read_tensors(merged), read_tensors(a), read_tensors(b)
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.allclose(made[name], (first[name] + second[name]) / 2, rtol=1e-6)
    assert torch.equal(made["shared.weight"], first["shared.weight"])


def test_a_vision_language_model_by_modules(tmp_path: Path) -> None:
    """Another decoder of two, the vision tower of one, the projector averaged; and by `models`, all of it averaged."""
    text = transformers.MistralConfig(**TEXT)
    vision = transformers.PixtralVisionConfig(**VISION, head_dim=8)
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=62)
    a, b = write(tmp_path, lambda: transformers.Mistral3ForConditionalGeneration(config))
    both = [{"model": str(a)}, {"model": str(b)}]
    modules = {
        "text_decoder": {"slices": [{"sources": [source(a, 0, 3)]}, {"sources": [source(b, 1, 4)]}]},
        "vision_tower": {"models": [{"model": str(b)}]},
        "multi_modal_projector": {"models": both},
    }
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}}
    merged = merge(recipe | {"modules": modules}, tmp_path / "modules")
    model = loads(transformers.Mistral3ForConditionalGeneration, merged)
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (6, 3)
    made, first, second = read_tensors(merged), read_tensors(a), read_tensors(b)
    assert all(torch.equal(made[name], value) for name, value in second.items() if name.startswith("vision_tower"))
    projector = "multi_modal_projector.linear_1.weight"
    assert torch.allclose(made[projector], (first[projector] + second[projector]) / 2, rtol=1e-6)
    loads(transformers.Mistral3ForConditionalGeneration, merge(recipe | {"models": both}, tmp_path / "models"))


SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 1, "head_dim": 8}
LATENT = SIZES | {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "n_routed_experts": 4,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 2,
}
IMAGE = {
    key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
} | {
    "image_size": 32,
    "patch_size": 8,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", SIZES),
    "BeitForImageClassification": ("BeitConfig", IMAGE | {"use_relative_position_bias": True}),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", LATENT),
    "FalconForCausalLM": ("FalconConfig", SIZES),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 16, "n_layer": 3, "n_head": 2, "vocab_size": 64, "n_positions": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SIZES),
    "Gemma2ForCausalLM": ("Gemma2Config", GROUPED),
    "Lfm2ForCausalLM": ("Lfm2Config", GROUPED | {"full_attn_idxs": [1]}),
    "MambaForCausalLM": ("MambaConfig", {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 64, "state_size": 4}),
    "MixtralForCausalLM": ("MixtralConfig", GROUPED | {"num_local_experts": 2}),
    "ModernBertForMaskedLM": ("ModernBertConfig", SIZES | {"cls_token_id": 1, "sep_token_id": 2}),
    "Phi3ForCausalLM": ("Phi3Config", GROUPED),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        GROUPED | {"num_experts": 2, "moe_intermediate_size": 8, "mlp_only_layers": [1]},
    ),
    "ViTForImageClassification": ("ViTConfig", IMAGE),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_stacks_of_any_architecture_load(name: str, tmp_path: Path) -> None:
    """Two layers of one and two of another, found by their numbering alone."""
    config_name, sizes = ARCHITECTURES[name]
    config, cls = getattr(transformers, config_name)(**sizes), getattr(transformers, name)
    a, b = write(tmp_path, lambda: cls(config))
    slices = [{"sources": [source(a, 0, 2)]}, {"sources": [source(b, 1, 3)]}]
    merged = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "merge")
    assert loads(cls, merged).config.num_hidden_layers == 4
