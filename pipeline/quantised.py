"""8-bit floating-point weights with scales, seen as the bfloat16 weights that they stand for.

The codes alone mean nothing: ``W = code * scale``, with one scale per block of 128 x 128 (DeepSeek, Qwen), per row or
per tensor. They are multiplied block by block as a merge reads them; the scales themselves are never merged, and what
the configuration says of the quantisation is left out of the merge's. What is not understood stays as it is, and is
refused (:mod:`mergepipe.pipeline.align`) or an error here, with the reason.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.models import InputModel
from mergepipe.storage.checkpoint import TensorEntry
from mergepipe.storage.dtypes import DTYPES
from mergepipe.tasks.adjust import BlockScales, Factor

SEEN_AS = "BF16"
"""The type that dequantised weights have, unless a recipe asks for another."""

METHODS = ("fp8", "fbgemm_fp8", "compressed-tensors", "modelopt")
"""Values of `quant_method` that go with codes and scales of this kind."""

_SCALES = ("_scale_inv", "_scale")
_ACTIVATIONS = re.compile(r"\.(input|activation|output|[qkv])(_global)?_scale$")
_MAX_SHOWN = 5


def dequantise(model: InputModel) -> InputModel:
    """The model with its 8-bit weights as what they stand for; itself if it has none.

    Raises
    ------
    CheckpointError
        If a weight has no scales, or scales of a shape that fits no block; if the quantisation is of another kind.
    """
    codes = {name: entry for name, entry in model.tensors.items() if DTYPES[entry.dtype].role == "refused"}
    if not codes:
        return model
    config = model.config.get("quantization_config")
    config = config if isinstance(config, Mapping) else {}
    method = config.get("quant_method", METHODS[0])
    if method not in METHODS:
        return model
    adjust, used, faults = {}, set(), []
    for name, entry in codes.items():
        scales = next((name + end for end in _SCALES if name + end in model.tensors), None)
        if scales is None:
            faults.append(f"'{name}' is {entry.dtype} and has no scales beside it ('{name}{_SCALES[0]}')")
            continue
        found = _blocks(name, entry, model.tensors[scales], config)
        if isinstance(found, str):
            faults.append(found)
            continue
        used.add(scales)
        adjust[name] = (found,)
    if faults:
        more = [f"  and {len(faults) - _MAX_SHOWN} more"] if len(faults) > _MAX_SHOWN else []
        lines = [
            f"'{model.root}' has 8-bit weights that can't be dequantised:",
            *(f"  {f}" for f in faults[:_MAX_SHOWN]),
        ]
        remedy = "Remedy: dequantise it to bfloat16 with the tool that quantised it; codes are never averaged."
        raise CheckpointError("\n".join([*lines, *more, remedy]))
    idle = {name for name in model.tensors if _ACTIVATIONS.search(name)}
    notes = [f"'{model.root}': {len(codes)} 8-bit weights are dequantised as they are read"]
    if idle:
        notes.append(f"'{model.root}': {len(idle)} scales of activations are left out")
    return replace(
        model,
        tensors={
            name: replace(entry, dtype=SEEN_AS) if name in codes else entry
            for name, entry in model.tensors.items()
            if name not in used | idle
        },
        config={key: value for key, value in model.config.items() if key != "quantization_config"},
        adjust={**model.adjust, **adjust},
        drops=(*model.drops, "quantization_config"),
        notes=(*model.notes, *notes),
    )


def _blocks(name: str, weight: TensorEntry, scales: TensorEntry, config: Mapping[str, Any]) -> BlockScales | str:
    """How scales lie on a weight; or why that can't be told."""
    if DTYPES[scales.dtype].role != "merged" or len(weight.shape) < 2:
        return (
            f"'{name}' is {weight.shape}, its scales are {scales.dtype}: expected a matrix, and scales of real numbers"
        )
    factor = Factor(scales.name, scales.dtype)
    (*stack, rows, width), found = weight.shape, scales.shape
    matrices = math.prod(stack)
    if math.prod(found) == matrices and found in ((), (1,), tuple(stack), (*stack, 1, 1)):
        return BlockScales(factor, (1, 1), (rows, width))
    if found == (*stack, rows, 1) or (not stack and found == (rows,)):
        return BlockScales(factor, (rows, 1), (1, width))
    block = _block_size(config)
    if block is not None:
        grid = (-(-rows // block[0]), -(-width // block[1]))
        if found == (*stack, *grid):
            return BlockScales(factor, grid, block)
    size = "no weight_block_size" if block is None else f"weight_block_size {list(block)}"
    return f"'{name}' is {weight.shape}, its scales are {found}, and its config.json has {size}: they do not fit"


def _block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, as the configuration gives them."""
    size = config.get("weight_block_size")
    groups = config.get("config_groups")
    if size is None and isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        size = next((w.get("block_structure") for w in weights if isinstance(w, Mapping)), None)
    if isinstance(size, list | tuple) and len(size) == 2 and all(type(n) is int and n > 0 for n in size):
        return size[0], size[1]
    return None
