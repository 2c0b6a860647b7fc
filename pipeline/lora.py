"""What becomes of each tensor of a model in a LoRA adapter, and what the adapter's files call it: names, no bytes.

Names are those of the model's modules, which for most architectures are those of the checkpoint, with the prefix that
PEFT puts before them. A module with a matrix gets a pair A, B whose product is its update; a norm, a bias or an
embedding has no such pair and can be saved whole; a parameter that is no module's `weight` or `bias` has no place in an
adapter at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

Form = Literal["pair", "embedding", "whole", "bias", "none"]
"""'pair': a linear or convolutional layer; 'embedding': a table, whose pair PEFT names and turns otherwise; 'whole': a
vector that scales, as norms have; 'bias': of any other module; 'none': a parameter that adapters can't hold."""

PREFIX = "base_model.model."

ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_TABLE = re.compile(r"(^|\.)(\w*embed(?!_out)\w*|wte|wpe|shared|relative_attention_bias)$")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)$")
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})

_TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the base, and its place in an adapter.

    Attributes
    ----------
    name : str
        In the checkpoint.
    module : str
        What the library that runs the model calls the module.
    form : Form
    shape : tuple of int
    turned : bool
        Whether the matrix is stored the other way round, (inputs, outputs): embeddings, and GPT-2's layers.
    """

    name: str
    module: str
    form: Form
    shape: tuple[int, ...]
    turned: bool = False

    @property
    def has_pair(self) -> bool:
        """Whether its update is factored."""
        return self.form in ("pair", "embedding")

    @property
    def called(self) -> str:
        """What the library calls the tensor."""
        return f"{self.module}.{self.name.rpartition('.')[2]}" if self.module else self.name

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the update that a pair is made for: a convolution's kernel is one row per output."""
        return self.shape[0], prod(self.shape[1:])

    def pair_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of A and B.

        Examples
        --------
        >>> Part("q.weight", "q", "pair", (64, 32)).pair_shapes(8)
        ((8, 32), (64, 8))
        >>> Part("c.weight", "c", "pair", (64, 3, 5, 5)).pair_shapes(8)
        ((8, 3, 5, 5), (64, 8, 1, 1))
        """
        if self.turned:
            return (rank, self.shape[0]), (self.shape[1], rank)
        return (rank, *self.shape[1:]), (self.shape[0], rank, *(1 for _ in self.shape[2:]))

    def pair_names(self) -> tuple[str, str]:
        """Names of A and B in the adapter."""
        if self.form == "embedding":
            return f"{PREFIX}{self.module}.lora_embedding_A", f"{PREFIX}{self.module}.lora_embedding_B"
        return f"{PREFIX}{self.module}.lora_A.weight", f"{PREFIX}{self.module}.lora_B.weight"


def parts_of(
    shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], called: Mapping[str, str] | None = None
) -> list[Part]:
    """The place of each tensor of a checkpoint in an adapter.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Of the tensors, by the names that they are stored under.
    config : mapping
        The model's configuration.
    called : mapping of str to str, optional
        What the library that runs the model calls them, where that is another name.

    Examples
    --------
    >>> shapes = {"m.embed_tokens.weight": (9, 4), "m.q.weight": (4, 4), "m.q.bias": (4,), "m.norm.weight": (4,),
    ...           "m.norm.bias": (4,), "m.scale": (4,)}
    >>> [(part.name, part.form) for part in parts_of(shapes, {})]
    [('m.embed_tokens.weight', 'embedding'), ('m.q.weight', 'pair'), ('m.q.bias', 'bias'), ('m.norm.weight', 'whole'),
    ('m.norm.bias', 'whole'), ('m.scale', 'none')]
    """
    parts = [_part(name, shape, shapes, config) for name, shape in shapes.items()]
    called = called or {}
    return [replace(p, module=called[p.name].rpartition(".")[0]) if p.name in called else p for p in parts]


def _part(name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> Part:
    module, _, last = name.rpartition(".")
    if not module or last not in ("weight", "bias"):
        return Part(name, module, "none", shape)
    if last == "bias":
        scales = len(shapes.get(f"{module}.weight", (0, 0))) == 1
        return Part(name, module, "whole" if scales else "bias", shape)
    if len(shape) == 1:
        return Part(name, module, "whole", shape)
    if not 2 <= len(shape) <= 5 or prod(shape) == 0:
        return Part(name, module, "none", shape)
    if len(shape) == 2 and _TABLE.search(module):
        return Part(name, module, "embedding", shape, turned=True)
    turned = len(shape) == 2 and config.get("model_type") in _CONV1D_TYPES and _CONV1D.search(module) is not None
    return Part(name, module, "pair", shape, turned)


def targets(chosen: Collection[str], names: Iterable[str]) -> list[str]:
    """`target_modules` for the modules `chosen`: last parts of names where they say the same, else whole names.

    Parameters
    ----------
    chosen : collection of str
        Names of modules.
    names : iterable of str
        Names of all tensors of the model.

    Examples
    --------
    >>> names = ["l.0.q.weight", "l.1.q.weight", "l.0.k.weight", "l.1.k.weight"]
    >>> targets(["l.0.q", "l.1.q", "l.0.k"], names)
    ['l.0.k', 'q']
    """
    leaves: dict[str, set[str]] = {}
    inner: set[str] = set()
    for name in names:
        parts = name.split(".")
        inner.update(parts[:-2])
        leaves.setdefault(parts[-2] if len(parts) > 1 else "", set()).add(".".join(parts[:-1]))
    found = set()
    for module in chosen:
        last = module.rpartition(".")[2]
        found.add(last if last not in inner and leaves.get(last, set()) <= set(chosen) else module)
    return sorted(found)


def adapter_config(
    base: str,
    config: Mapping[str, Any],
    rank: int,
    ranks: Mapping[str, int],
    target_modules: Sequence[str],
    whole: Sequence[str],
    *,
    biases: bool,
    turned: bool,
) -> dict[str, Any]:
    """Contents of `adapter_config.json`: with ``lora_alpha = r``, so that an update is B A as it is stored.

    Parameters
    ----------
    base : str
        Where the base is.
    config : mapping
        The base's configuration.
    rank : int
        Of most modules.
    ranks : mapping of str to int
        Of each module that has a pair.
    target_modules, whole : sequence of str
        Modules with a pair, and modules that are saved whole.
    biases : bool
        Whether biases are in the adapter.
    turned : bool
        Whether linear layers store (inputs, outputs).
    """
    architectures = config.get("architectures") or [""]
    kind = str(architectures[0])
    pattern = {module: found for module, found in sorted(ranks.items()) if found != rank}
    return {
        "peft_type": "LORA",
        "task_type": next((task for word, task in _TASKS if kind.endswith(word)), None),
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(target_modules),
        "modules_to_save": list(whole) or None,
        "bias": "all" if biases else "none",
        "fan_in_fan_out": turned,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
