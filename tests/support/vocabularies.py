"""Tiny models with tokenizers, and a reference for the rows that a merged vocabulary gives their tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

WIDTH = 24
TABLES = ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias")
SPECIALS = ("<s>", "</s>", "<pad>")
LETTERS = (*"abcdefghijklmnop", "Ġ")


@dataclass
class Model:
    """A written model: its folder, its ids and its tables."""

    folder: Path
    vocab: dict[str, int]
    tables: dict[str, np.ndarray] = field(default_factory=dict)


def byte_tokenizer(plain: Sequence[str], added: Mapping[str, bool] | None = None) -> Any:
    """A byte-level BPE: specials, letters and `plain` in its vocabulary, `added` (special or not) beside it.

    `plain` entries of two letters have a merge rule.
    """
    vocab = {token: number for number, token in enumerate(dict.fromkeys([*SPECIALS, *LETTERS, *plain]))}
    merges = [(token[0], token[1]) for token in plain if len(token) == 2]
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(list(SPECIALS))
    for token, special in (added or {}).items():
        model.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def write_model(
    folder: Path,
    tokenizer: Any,
    seed: int,
    dtype: str = "float32",
    rows: int | None = None,
    tables: Sequence[str] = TABLES,
    template: str | None = None,
    **config: Any,
) -> Model:
    """A model whose `tables` have `rows` rows (one per token by default), with or without a tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    vocab = {} if tokenizer is None else tokenizer.get_vocab()
    rows = rows or len(vocab)
    shapes: dict[str, tuple[int, ...]] = {
        name: (rows, WIDTH) if name.endswith("weight") else (rows,) for name in tables
    }
    shapes |= {"model.layers.0.mlp.up.weight": (40, WIDTH), "model.norm.weight": (WIDTH,)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype)) for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    document = {"model_type": "llama", "hidden_size": WIDTH, "vocab_size": rows, "bos_token_id": 0, "eos_token_id": 1}
    document |= {"num_attention_heads": 4, "num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(document | config))
    if tokenizer is not None:
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return Model(folder, vocab, {name: tensors[name].float().double().numpy() for name in tables})


def expected_rows(
    ids: Mapping[str, int], models: Sequence[Model], table: str, which: int, *, base: int | None = 0
) -> np.ndarray:
    """What one model's table is in a vocabulary with these ids: its own row, the base's, the one owner's, the mean."""
    shape = models[0].tables[table].shape[1:]
    out = np.full((max(ids.values()) + 1, *shape), np.nan)
    for token, number in ids.items():
        owners = [model for model in models if model.vocab.get(token, 1 << 30) < len(model.tables[table])]
        if models[which] in owners:
            owners = [models[which]]
        elif base is not None and models[base] in owners:
            owners = [models[base]]
        rows = [model.tables[table][model.vocab[token]] for model in owners]
        out[number] = np.mean(rows, axis=0) if rows else 0
    return out


def write_llama(folder: Path, tokenizer: Any, seed: int, rows: int | None = None, template: str | None = None) -> Model:
    """A Llama of transformers with a tokenizer; random float32 weights."""
    torch.manual_seed(seed)
    vocab = tokenizer.get_vocab()
    config = transformers.LlamaConfig(
        vocab_size=rows or len(vocab), hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1,
        pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return Model(folder, vocab, {name: model.get_parameter(name).detach().double().numpy() for name in names})
