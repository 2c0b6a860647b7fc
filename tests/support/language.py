"""Tiny causal language models with a tokenizer, in folders that transformers wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefgh "


def make_tokenizer(
    added: Sequence[str] = (), *, letters: str = LETTERS, pieces: Sequence[str] = (), template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per letter after ``<pad>`` and ``<end>``, then `added`; whole `pieces` of text are tokens, too."""
    words = {token: i for i, token in enumerate(["<pad>", "<end>", *letters, *pieces])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    pattern = "|".join([*pieces, r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    fast.add_tokens(list(added), special_tokens=True)
    fast.chat_template = template
    return fast


def write_model(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    seed: int = 0,
    width: int | None = None,
    start: Path | None = None,
    changed: float = 0.3,
    **config: Any,
) -> Path:
    """A Llama of random float32 weights, sharp enough to prefer some tokens; from `start` on if that is given."""
    torch.manual_seed(seed)
    n_tokens = width or len(tokenizer or ()) or len(LETTERS) + 2
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False}
    given = {"vocab_size": n_tokens, "max_position_embeddings": 64, **sizes, **special, **config}
    model = LlamaForCausalLM(LlamaConfig(**given))
    with torch.no_grad():
        if start is not None:
            model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.add_(changed * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder
