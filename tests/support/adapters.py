"""LoRA adapters that PEFT itself writes, of every kind that is applied, and the models that PEFT merges them into."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from support.checkpoints import new_model, read_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    import transformers

LINEAR = ["q_proj", "v_proj", "down_proj"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "use_rslora": True}),
    "patterns": ("llama", {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 3, r"layers\.1\..*q_proj": 6, "layers.0.self_attn.v_proj": 1},
        "alpha_pattern": {"down_proj": 5, "q_proj": 1},
    }),
    "modules to save": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "use_dora": True}),
    "dora, embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied": ("qwen2", {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}),
    "biases": ("qwen2", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, dora": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "convolution": ("vit", {"r": 3, "target_modules": ["projection"]}),
    "renamed": ("vit", {
        "r": 3, "target_modules": ["q_proj", "o_proj", "fc2"], "rank_pattern": {"fc2": 2},
        "modules_to_save": ["classifier"],
    }),
    "dora, renamed": ("vit", {"r": 3, "target_modules": ["v_proj", "fc1"], "use_dora": True}),
    "two towers": ("llava", {"r": 2, "target_modules": ["q_proj", "lm_head"]}),
    "dora, convolution": ("vit", {"r": 3, "target_modules": ["projection"], "use_dora": True}),
}  # fmt: skip


def make_model(kind: str) -> Any:
    if kind not in ("gpt2", "llava"):
        return new_model(kind)
    torch.manual_seed(0)
    if kind == "llava":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = transformers.LlamaConfig(**sizes, vocab_size=99, num_key_value_heads=4, max_position_embeddings=40)
        vision = transformers.CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
        config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=7)
        return transformers.LlavaForConditionalGeneration(config).eval()
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=211, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def train(model: Any) -> None:
    """Give every trainable parameter a value that matters: B starts from zero, and would hide every mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def write_adapter(
    folder: Path, kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A base and an adapter of it under `folder`; the tensors that PEFT merges them into."""
    base = make_model(kind).to(dtype)
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(base, peft.LoraConfig(**options))
        train(tuned)
        tuned.save_pretrained(folder / "lora")
        fresh = type(base).from_pretrained(folder / "base", dtype=dtype)
        merged = peft.PeftModel.from_pretrained(fresh, folder / "lora").merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder / "expected")
    return read_tensors(folder / "expected")
