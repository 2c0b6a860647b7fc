"""Heads: the tensors at the end of a model that its task decides about, told from their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HEADS = frozenset(
    {"classifier", "score", "head", "heads", "lm_head", "qa_outputs", "classification_head", "pre_classifier", "cls"}
    | {"cls_classifier", "distillation_classifier", "embed_out"}
)
"""Parts of a dotted name that make a tensor a head, where no number of a layer stands before them."""


def head_of(tensor_name: str) -> str | None:
    """The head a tensor belongs to: its name up to the part that says so; None if it belongs to none.

    Examples
    --------
    >>> head_of("classifier.out_proj.weight"), head_of("model.layers.0.head.weight"), head_of("model.norm.weight")
    ('classifier', None, None)
    """
    parts = tensor_name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return None
        if part in HEADS:
            return ".".join(parts[: index + 1])
    return None


def is_lm_head(tensor_name: str) -> bool:
    """Whether a tensor is the matrix that a language model ends in, which may be its embedding once more."""
    return tensor_name == "lm_head.weight" or tensor_name.endswith(".lm_head.weight")


def ties(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says of tied embeddings; None if nothing."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        value = part.get("tie_word_embeddings")
        if isinstance(value, bool):
            return value
    return None
