"""Which tensors have one row per token: found from the configurations' vocabulary sizes and from shapes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint

EMBEDDING = re.compile(
    r"(^|\.)(embed_tokens|word_embeddings|tok_embeddings|token_embedding|wte|embed_in|shared|embeddings)\.weight$"
)
"""Names of input embeddings; their rows count where a configuration says nothing."""

_BY_NAME = re.compile(
    EMBEDDING.pattern + r"|(^|\.)(lm_head|embed_out|proj_out|embed_tokens_per_layer|shared_head\.head|lm_head\.decoder)"
    r"\.(weight|bias)$|(^|\.)(predictions\.(decoder\.)?(weight|bias)|predictions\.bias|final_logits_bias|lm_head\.bias)$"
)
"""What a vocabulary-indexed tensor is called where its rows might be something else's by their number."""

_OTHER_SENSES = re.compile(r"vision|audio|image|speech|codec|vq|video")
"""Parts of a configuration whose vocabulary is not that of the text."""


def vocabulary_axis(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int], config: Mapping[str, Any]
) -> int | None:
    """The axis of a tensor that counts tokens, or None: its first one, or the first one longer than 1.

    Parameters
    ----------
    name : str
    shape : tuple of int
    sizes : mapping of str to int
        As :func:`vocabulary_sizes` finds them.
    config : mapping
        Contents of the model's ``config.json``.

    Notes
    -----
    Where another number of the configuration (a hidden size, say) is a vocabulary size too, the shape alone does not
    tell, and the tensor must have one of the usual names as well.

    Examples
    --------
    >>> vocabulary_axis("model.mtp.embed.weight", (500, 8), {"vocab_size": 500}, {"hidden_size": 8})
    0
    >>> vocabulary_axis("final_logits_bias", (1, 500), {"vocab_size": 500}, {})
    1
    >>> vocabulary_axis("model.layers.0.mlp.up.weight", (500, 8), {"vocab_size": 500}, {"intermediate_size": 500})
    """
    axis = next((axis for axis, size in enumerate(shape) if size != 1), None)
    if axis is None or shape[axis] not in sizes.values():
        return None
    ambiguous = shape[axis] in _other_numbers(config)
    return axis if not ambiguous or _BY_NAME.search(name) else None


def vocabulary_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Every vocabulary size of a model by its dotted key in `config.json`; by "" the rows of an embedding else.

    A key whose value no tensor has as its rows does not count.
    """
    rows = {size for entry in checkpoint.tensors.values() for size in entry.shape[:2]}
    found = {key: value for key, value in _sizes(checkpoint.config, "") if value in rows}
    if not found:
        named = (
            entry for name, entry in checkpoint.tensors.items() if EMBEDDING.search(name) and len(entry.shape) == 2
        )
        first = next(named, None)
        return {} if first is None else {"": first.shape[0]}
    return found


def _sizes(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and not _OTHER_SENSES.search(key) and prefix.count(".") < 3:
            yield from _sizes(value, f"{prefix}{key}.")
        elif key.startswith("vocab_size") and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield prefix + key, value


def _other_numbers(config: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _other_numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool) and "vocab" not in key and "token" not in key:
            found.add(value)
    return found


def vocabulary_tensors(checkpoints: Sequence[Checkpoint]) -> dict[str, int]:
    """Names of the tensors that have one row per token in every model that has them, and the axis of these rows.

    Parameters
    ----------
    checkpoints : sequence of Checkpoint
        Shapes and configurations are looked at.
    """
    sizes = [vocabulary_sizes(checkpoint) for checkpoint in checkpoints]
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors)
    found: dict[str, int] = {}
    for name in names:
        axes = {
            vocabulary_axis(name, checkpoint.tensors[name].shape, size, checkpoint.config)
            for checkpoint, size in zip(checkpoints, sizes, strict=True)
            if name in checkpoint.tensors
        }
        if len(axes) == 1 and (axis := axes.pop()) is not None:
            found[name] = axis
    return found
