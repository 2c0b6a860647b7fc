"""A family of small Llamas that read single characters, on text that comes with Python packages.

Nothing is downloaded: the corpora are sources, stubs, headers and docstrings of packages that mergepipe needs anyway.
Each example is a piece of 24 characters: *language* (Python, C++, stubs or English), *keyword* (which Python keyword
comes next), *next* (what kind of character comes next) and *order* (as written, words jumbled, or backwards). The base
learns to predict the next character and all four tasks together from clean text; the experts, and all accuracies that
the demo shows, are about text with typing errors. Stored as bfloat16 in several shards, with the tokenizer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from mergepipe.cli.demo.training import Array, Family, Task, cut, fine_tune, spoil, train_base

LENGTH = 24
HELD_OUT = 400
STEPS, QUICK_STEPS = (1600, 300), (210, 85)
"""Batches for the base and for each expert."""

TYPING_ERRORS = 0.15
SHARD = "150KB"
CHARACTERS = ["\n", *map(chr, range(32, 127))]
KEYWORDS = ("def", "return", "if", "for", "import", "self")
NEXT = ("letter", "digit", "space", "newline", "other")
CORPUS = 200_000
"""Characters read per corpus."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character: newline and printable ASCII."""
    words = {token: i for i, token in enumerate(["<pad>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def sources(package: str, suffix: str) -> Iterator[str]:
    """The longer text files of an installed package, its tests left out, in order of their names."""
    for path in sorted(Path(str(files(package))).rglob(f"*{suffix}")):
        if "tests" not in path.parts and path.stat().st_size > 2000:
            yield path.read_text(encoding="utf-8", errors="replace")


def gather(texts: Iterator[str]) -> str:
    """The first `CORPUS` characters of `texts` together, spaces and blank lines narrowed."""
    parts: list[str] = []
    size = 0
    for text in texts:
        part = re.sub(r" *\n\s*\n", "\n", re.sub(r" {2,}", "  ", text))[: CORPUS // 10]
        parts.append(part)
        size += len(part)
        if size > CORPUS:
            break
    return "\n".join(parts)[:CORPUS]


def python_code(package: str) -> Iterator[str]:
    """Sources without comments and docstrings, one statement per line."""
    for text in sources(package, ".py"):
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        yield ast.unparse(tree)


def docstrings(package: str) -> Iterator[str]:
    """The longer docstrings of each module."""
    for text in sources(package, ".py"):
        nodes = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef))
        found = "\n".join(doc for node in nodes if len(doc := ast.get_docstring(node) or "") > 200)
        if found:
            yield found


def pieces(rng: np.random.Generator, text: str, count: int) -> list[str]:
    """Pieces of `LENGTH` characters from anywhere in `text`."""
    return [text[i : i + LENGTH] for i in rng.integers(len(text) - LENGTH, size=count)]


def before_keywords(rng: np.random.Generator, code: str, count: int) -> tuple[list[str], Array]:
    """Pieces that end where a keyword follows, and which one; as many of each."""
    found: list[tuple[str, int]] = []
    for label, keyword in enumerate(KEYWORDS):
        ends = np.array([m.start() for m in re.finditer(rf"\b{keyword}\b", code) if m.start() >= LENGTH])
        found += [(code[end - LENGTH : end], label) for end in rng.choice(ends, count // len(KEYWORDS))]
    return [piece for piece, _ in found], np.array([label for _, label in found])


def before_kinds(rng: np.random.Generator, text: str, count: int) -> tuple[list[str], Array]:
    """Pieces, and what kind of character follows; as many of each kind."""
    kinds = np.array([_kind(character) for character in text])
    kinds[:LENGTH] = -1
    each = count // len(NEXT)
    ends = [end for label in range(len(NEXT)) for end in rng.choice(np.flatnonzero(kinds == label), each)]
    return [text[end - LENGTH : end] for end in ends], kinds[ends]


def _kind(character: str) -> int:
    return (character.isalpha(), character.isdigit(), character == " ", character == "\n", True).index(True)


def reordered(rng: np.random.Generator, text: str, count: int) -> tuple[list[str], Array]:
    """Pieces as they are, with the letters inside each word jumbled, or backwards."""
    labels = np.repeat(np.arange(3), count // 3)
    found = pieces(rng, text, len(labels))
    return [_reorder(rng, piece, int(label)) for piece, label in zip(found, labels, strict=True)], labels


def _reorder(rng: np.random.Generator, text: str, label: int) -> str:
    if label == 1:
        return " ".join("".join(rng.permutation(list(word))) for word in text.split(" "))
    return text[::-1] if label == 2 else text


def make_examples(seed: int, count: int) -> dict[str, tuple[tuple[str, ...], list[str], Array]]:
    """Classes, pieces and labels of each task, about `count` pieces each, not yet shuffled."""
    rng = np.random.default_rng(seed)
    code, prose = gather(python_code("sklearn")), gather(docstrings("scipy"))
    languages = {
        "Python": code,
        "C++": gather(sources("torch", ".h")),
        "stubs": gather(sources("numpy", ".pyi")),
        "English": prose,
    }
    return {
        "language": (tuple(languages), *labelled(rng, list(languages.values()), count)),
        "keyword": (KEYWORDS, *before_keywords(rng, code, count)),
        "next": (NEXT, *before_kinds(rng, code, count)),
        "order": (("written", "jumbled", "backwards"), *reordered(rng, prose, count)),
    }


def labelled(rng: np.random.Generator, corpora: list[str], count: int) -> tuple[list[str], Array]:
    """As many pieces of each corpus, labelled by its number."""
    each = count // len(corpora)
    return [p for text in corpora for p in pieces(rng, text, each)], np.repeat(np.arange(len(corpora)), each)


def make_tasks(tokenizer: PreTrainedTokenizerFast, seed: int, examples: int) -> list[Task]:
    """The four tasks, clean, with about `examples` pieces to train on."""
    rng = np.random.default_rng(seed)
    tasks: list[Task] = []
    first = 0
    for name, (classes, texts, labels) in make_examples(seed, examples + 2 * HELD_OUT).items():
        order = rng.permutation(len(labels))
        inputs = np.array(tokenizer([texts[i] for i in order])["input_ids"])
        tasks.append(cut(name, classes, first, inputs, labels[order], HELD_OUT))
        first += len(classes)
    return tasks


def mistype(tokens: Array, rng: np.random.Generator) -> Array:
    """The same text with one character in seven replaced by any other."""
    wrong = rng.integers(2, 2 + len(CHARACTERS), tokens.shape)
    return np.where(rng.random(tokens.shape) < TYPING_ERRORS, wrong, tokens)


def make_model(seed: int, n_classes: int) -> Any:
    """An untrained Llama."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=2 + len(CHARACTERS),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2 * LENGTH,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        num_labels=n_classes,
        use_cache=False,
    )
    return LlamaForSequenceClassification(config)


def language_loss(model: Any, tokens: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes and, through the embedding as output layer, of every next character."""
    hidden = model.model(tokens).last_hidden_state
    embedding = model.model.embed_tokens.weight
    guesses = functional.linear(hidden[:, :-1], embedding) / embedding.shape[1] ** 0.5
    characters = functional.cross_entropy(guesses.flatten(0, 1), tokens[:, 1:].flatten())
    return characters + functional.cross_entropy(model.score(hidden[:, -1]), labels)


def store(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Any:
    """Write `model` in bfloat16 and several shards with its tokenizer; return it as float32 of what was written."""
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)
    return model.float()


def make_family(folder: Path, *, seed: int, quick: bool) -> Family:
    """Train the base and one expert per task, and write them below `folder`."""
    base_steps, expert_steps = QUICK_STEPS if quick else STEPS
    tokenizer = make_tokenizer()
    clean = make_tasks(tokenizer, seed, 3000 if quick else 12000)
    model = make_model(seed, sum(len(task.classes) for task in clean))
    base = train_base(model, clean, steps=base_steps, seed=seed, loss=language_loss)
    base = store(base, tokenizer, folder / "base")
    tasks = tuple(spoil(task, mistype, seed) for task in clean)
    experts = {}
    for number, task in enumerate(tasks):
        expert = fine_tune(base, task, steps=expert_steps, rate=5e-4, seed=seed + number)
        experts[task.name] = folder / task.name
        store(expert, tokenizer, experts[task.name])
    title = "character models (Llama, bfloat16, several shards)"
    return Family("text", title, LlamaForSequenceClassification, folder / "base", experts, tasks)
