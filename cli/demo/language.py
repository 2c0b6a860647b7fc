"""A base and two experts that write: small Llamas, character by character, on text that comes with Python packages.

Nothing is downloaded: the base learns from plain Python code and from plain English, both out of installed packages.
Two experts are fine-tuned from it on the functions of those packages, in opposite directions: *explain* is given a
signature and answers with the first sentence of the documentation, *code* is given that sentence and answers with the
function. Each has two added tokens of its own, under the same two ids, that mark question and answer, and a chat
template that puts them in place, as an instruct model and a reasoning model of one family have. The vocabularies are
of one size. Stored as bfloat16 in one file, with the tokenizer.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mergepipe.cli.demo.text import docstrings, gather, make_tokenizer, python_code, sources
from mergepipe.cli.demo.training import BATCH, Array, Optimiser

LENGTH = 64
"""Characters that are learnt from at a time."""

POSITIONS = 256
STEPS = (1200, 400)
"""Batches for the base and for each expert."""

ADDED = {"explain": ("<|user|>", "<|assistant|>"), "code": ("<|task|>", "<|solution|>")}
"""Two tokens for each expert: before the question, and before the answer."""

PACKAGES = ("scipy", "sklearn")
FUNCTIONS = 1000
"""Taken from each package at most."""

LONGEST = 160
"""Characters of a function that are kept."""

HELD_OUT = 200
"""Functions that nobody is trained on."""

N_PROMPTS = 16


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and two experts on disk, and what to judge them by.

    Attributes
    ----------
    base : Path
    experts : mapping of str to Path
    held_out : mapping of str to int64 ndarray, shape (windows, LENGTH)
        For each expert, text of its own kind that nobody was trained on, in its own tokens.
    prompts : tuple of str
        The beginnings of plain code and of plain English, which none of the experts' tokens occurs in.
    """

    base: Path
    experts: Mapping[str, Path]
    held_out: Mapping[str, Array]
    prompts: tuple[str, ...]


def functions(package: str) -> Iterator[tuple[str, str, str]]:
    """Signature, first sentence of the documentation, and source of each documented function of a package."""
    for text in sources(package, ".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                summary = " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
                if 20 <= len(summary) <= 100 and summary.isascii():
                    node.body = node.body[1:] or [ast.Pass()]
                    node.decorator_list = []
                    signature = f"{node.name}({', '.join(a.arg for a in node.args.args)})"
                    yield signature, summary, ast.unparse(node).replace("    ", " ")[:LONGEST]


def expert_texts(seed: int) -> dict[str, tuple[list[str], list[str]]]:
    """What each expert learns from, and what is held out: the same functions for both."""
    found = sorted({entry for package in PACKAGES for entry in islice(functions(package), FUNCTIONS)})
    order = np.random.default_rng(seed).permutation(len(found))
    texts: dict[str, list[str]] = {name: [] for name in ADDED}
    for signature, summary, source in (found[i] for i in order):
        for name, question, answer in (("explain", signature, summary), ("code", summary, source)):
            before, between = ADDED[name]
            texts[name].append(f"{before}{question}{between}{answer}\n")
    return {name: (lines[HELD_OUT:], lines[:HELD_OUT]) for name, lines in texts.items()}


def make_expert_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The base's tokenizer, the two tokens of an expert, and a chat template that uses them."""
    tokenizer = make_tokenizer()
    before, between = ADDED[name]
    tokenizer.add_tokens([before, between], special_tokens=True)
    tokenizer.chat_template = (
        "{% for message in messages %}"
        f"{{% if message.role == 'user' %}}{before}{{{{ message.content }}}}{between}"
        "{% else %}{{ message.content }}\n{% endif %}{% endfor %}"
    )
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Array:
    """All texts one after the other, shape (tokens,)."""
    return np.concatenate([np.array(ids, np.int64) for ids in tokenizer(texts)["input_ids"]])


def windows(tokens: Array) -> Array:
    """`tokens` cut into pieces of `LENGTH`, shape (pieces, LENGTH); what is left over is left out."""
    return tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, LENGTH)


def make_model(seed: int, n_tokens: int) -> Any:
    """An untrained Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=n_tokens,
        hidden_size=80,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(model: Any, tokens: Array, *, steps: int, rate: float, seed: int) -> Any:
    """Train `model` in place on pieces from anywhere in `tokens`."""
    rng = np.random.default_rng(seed)
    model.train()
    optimiser = Optimiser(list(model.parameters()), rate, steps)
    for _ in range(steps):
        starts = rng.integers(len(tokens) - LENGTH, size=BATCH)
        batch = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]))
        optimiser.step(surprise(model, batch))
    return model.eval()


def surprise(model: Any, tokens: Tensor) -> Tensor:
    """Mean of -log p, in nats, of each character but the first of each piece."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def store(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    """Write `model` in bfloat16 with its tokenizer."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The model in `folder`, in float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_prompts(seed: int, code: str, prose: str) -> tuple[str, ...]:
    """Beginnings of lines, of 24 characters or more, half of them code."""
    rng = np.random.default_rng(seed)
    found: list[str] = []
    for text in (code, prose):
        lines = sorted({line[:24].strip() for line in text.split("\n") if len(line) > 40})
        found += rng.choice(lines, N_PROMPTS // 2, replace=False).tolist()
    return tuple(found)


def make_pair(folder: Path, *, seed: int) -> Pair:
    """Train the base and both experts, and write them below `folder`."""
    base_steps, expert_steps = STEPS
    tokenizer = make_tokenizer()
    code, prose = gather(python_code("sklearn")), gather(docstrings("scipy"))
    tail = len(code) // 20
    model = make_model(seed, len(tokenizer) + 2)
    train(model, encode(tokenizer, [code[:-tail], prose[:-tail]]), steps=base_steps, rate=3e-3, seed=seed)
    base = store(model, tokenizer, folder / "base")
    experts, held_out = {}, {}
    for name, (seen, unseen) in expert_texts(seed).items():
        own = make_expert_tokenizer(name)
        expert = train(load(base), encode(own, seen), steps=expert_steps, rate=1e-3, seed=seed)
        experts[name] = store(expert, own, folder / name)
        held_out[name] = windows(encode(own, unseen))
    return Pair(base, experts, held_out, make_prompts(seed, code[-tail:], prose[-tail:]))
