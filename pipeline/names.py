"""What a tensor is by its name and shape: a buffer that models fill themselves, or part of a quantised weight."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.heads import is_lm_head, ties
from mergepipe.pipeline.recipe import Recipe
from mergepipe.storage.dtypes import DTYPES

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint, TensorEntry

_BUFFER = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias)$")
_CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")
_POSITIONS = re.compile(r"(^|\.)(position_ids|relative_position_index)$")
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|g_idx|weight_scale_inv|weight_scale|input_scale|SCB|absmax|quant_map|nested_absmax"
    r"|quant_state\.\w+)$"
)


def refuse_quantised(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    """Raise where weights are codes of a quantiser.

    Raises
    ------
    CheckpointError
        Names the models, what tells it, and the remedy.
    """
    found = []
    for path, checkpoint in zip(recipe.inputs, checkpoints, strict=False):
        config = checkpoint.config.get("quantization_config") or checkpoint.config.get("quantization")
        name = next((name for name in checkpoint.tensors if _is_code(name, checkpoint)), None)
        if config:
            how = config.get("quant_method") if isinstance(config, Mapping) else None
            found.append(f"  '{path}': its config.json has a quantization_config{f' ({how})' if how else ''}")
        elif name is not None:
            dtype = checkpoint.tensors[name].dtype
            found.append(f"  '{path}': '{name}', of type {dtype}, belongs to quantised weights")
    if found:
        remedy = "Remedy: dequantise to bfloat16 first; codes can't be averaged without their scales."
        raise CheckpointError("\n".join(["quantised checkpoints can't be merged:", *found, remedy]))


def _is_code(name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor is part of a quantised weight: by its name, as a matrix of bytes, or as the scales of codes."""
    if _QUANTISED.search(name):
        return True
    entry = checkpoint.tensors[name]
    if entry.dtype in ("I8", "U8") and name.endswith(".weight") and len(entry.shape) > 1:
        return True
    if not name.endswith(".scales"):
        return False
    weight = checkpoint.tensors.get(name.removesuffix("scales") + "weight")
    return weight is not None and DTYPES[weight.dtype].role == "copied"


def is_buffer(name: str, entry: TensorEntry) -> bool:
    """Whether a model fills this tensor itself when it is made: never stored by newer ones, ignored when loaded."""
    if _BUFFER.search(name):
        return True
    return _CAUSAL_MASK.search(name) is not None and len(entry.shape) == 4 and entry.shape[:2] == (1, 1)


def is_position(name: str) -> bool:
    """Whether a tensor numbers the positions of a sequence."""
    return _POSITIONS.search(name) is not None


def is_made_anew(name: str, entry: TensorEntry, checkpoint: Checkpoint) -> bool:
    """Whether a tensor need not be in the output: a buffer, or the twin of a tied embedding."""
    return is_buffer(name, entry) or is_position(name) or bool(is_lm_head(name) and ties(checkpoint.config))
