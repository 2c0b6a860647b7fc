"""Tiny checkpoints that transformers itself writes: a base and experts that were fine-tuned from it.

The folders are what `save_pretrained` leaves behind, so a merge of them meets the names, dtypes, tied tensors, shards
and config files of the real thing; only the sizes are small (a few hundred kilobytes).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

KINDS = ("llama", "qwen2", "bert", "vit")
"""llama: untied head · qwen2: tied head, biases · bert: tied decoder, position buffers · vit: images, a classifier."""

LAYERS = 2
_IMAGE = 32


@dataclass(frozen=True)
class Family:
    """A base and its experts, as folders.

    Attributes
    ----------
    kind : str
        One of `KINDS`.
    base : Path
    experts : tuple of Path
    """

    kind: str
    base: Path
    experts: tuple[Path, ...]

    @property
    def folders(self) -> tuple[Path, ...]:
        """The base, then the experts."""
        return (self.base, *self.experts)


def new_model(kind: str, seed: int = 0) -> Any:
    """A small model of the given kind with random float32 weights, which depend on `seed` alone."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    text: dict[str, Any] = {**sizes, "vocab_size": 211, "max_position_embeddings": 64}
    causal = {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if kind == "llama":
        config = transformers.LlamaConfig(**text, **causal, tie_word_embeddings=False)
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "qwen2":
        config = transformers.Qwen2Config(**text, **causal, tie_word_embeddings=True)
        return transformers.Qwen2ForCausalLM(config).eval()
    if kind == "bert":
        config = transformers.BertConfig(**text)
        return transformers.BertForMaskedLM(config).eval()
    if kind == "vit":
        config = transformers.ViTConfig(**sizes, image_size=_IMAGE, patch_size=8, num_labels=10)
        return transformers.ViTForImageClassification(config).eval()
    raise ValueError(f"unknown kind {kind!r}, expected one of {KINDS}")


def inputs_for(kind: str, seed: int = 0, batch: int = 3) -> dict[str, torch.Tensor]:
    """Random inputs a model of this kind takes."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "vit":
        return {"pixel_values": torch.randn(batch, 3, _IMAGE, _IMAGE, generator=generator)}
    return {"input_ids": torch.randint(3, 211, (batch, 16), generator=generator)}


def fine_tune(model: Any, kind: str, seed: int, steps: int = 4) -> None:
    """Train `model` in place for a few steps on random data; then nudge every parameter, so that no two deltas tie.

    Optimiser steps alone leave deltas of almost the same size everywhere (Adam's first step is plus or minus the
    learning rate), which makes every magnitude threshold a tie. The last layer norm of each model stays as it was: a
    tensor with an all-zero delta belongs to every real set of experts.
    """
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(steps):
        inputs = inputs_for(kind, seed=1000 * seed + step)
        generator = torch.Generator().manual_seed(seed + step)
        labels = inputs.get("input_ids")
        if labels is None:
            labels = torch.randint(0, 10, (3,), generator=generator)
        optimiser.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        optimiser.step()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)


def write_family(
    folder: Path, kind: str, dtype: str = "float32", experts: int = 2, shard_size: str = "1GB", seed: int = 0
) -> Family:
    """Write a base and `experts` fine-tunes of it under `folder`, each a folder as `save_pretrained` makes it.

    Parameters
    ----------
    folder : Path
        Where ``base``, ``expert-0``, ``expert-1``, ... appear.
    kind : str
        One of `KINDS`.
    dtype : {'float32', 'bfloat16', 'float16'}
        Of the stored weights. Experts start from the base's rounded weights, as fine-tunes do.
    experts : int
    shard_size : str
        As `save_pretrained` takes it; "60KB" gives several shards and an index.
    seed : int
    """
    stored = getattr(torch, dtype)
    base = new_model(kind, seed).to(stored)
    paths = [folder / "base", *(folder / f"expert-{i}" for i in range(experts))]
    base.save_pretrained(paths[0], max_shard_size=shard_size)
    frozen = frozen_tensor(base)
    for i, path in enumerate(paths[1:]):
        model = new_model(kind, seed)
        model.load_state_dict({name: value.float() for name, value in base.state_dict().items()})
        fine_tune(model, kind, seed=seed + i + 1)
        with torch.no_grad():
            model.get_parameter(frozen).copy_(base.get_parameter(frozen).float())
        model.to(stored).save_pretrained(path, max_shard_size=shard_size)
    return Family(kind, paths[0], tuple(paths[1:]))


def frozen_tensor(model: Any) -> str:
    """Name of the tensor that `write_family` leaves as the base has it in every expert."""
    names: list[str] = [n for n, value in model.named_parameters() if value.ndim == 1 and n.endswith("weight")]
    return names[-1]


def load(folder: Path, kind: str) -> tuple[Any, dict[str, Any]]:
    """The model in `folder`, in the dtype it is stored in, and what transformers reports about its keys."""
    cls = {
        "llama": transformers.LlamaForCausalLM,
        "qwen2": transformers.Qwen2ForCausalLM,
        "bert": transformers.BertForMaskedLM,
        "vit": transformers.ViTForImageClassification,
    }[kind]
    model, info = cls.from_pretrained(folder, output_loading_info=True, dtype="auto", local_files_only=True)
    return model.eval(), info


def logits(model: Any, kind: str) -> torch.Tensor:
    """What the model says about `inputs_for(kind)`, on one thread so that two calls agree to the bit."""
    inputs = {
        name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs_for(kind).items()
    }
    with torch.no_grad():
        result: torch.Tensor = model(**inputs).logits
    return result


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by name, from all its safetensors files."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {name: value for file in files for name, value in load_file(folder / file).items()}
