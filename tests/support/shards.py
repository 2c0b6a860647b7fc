"""Safetensors files made by hand: honest ones with any bits in them, and ones that lie."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import encode_header

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed.weight": ("BF16", (257, 48)),  # prime rows: padded chunks
    "model.layers.0.up.weight": ("BF16", (96, 64)),
    "model.layers.0.wide": ("BF16", (3, 5003)),  # a row wider than a chunk, and of prime width
    "model.layers.0.experts": ("F32", (5, 12, 30)),  # a stack
    "model.layers.1.prime": ("F16", (1009,)),
    "model.scale": ("F32", ()),
    "model.empty": ("BF16", (0, 7)),
    "model.double": ("F64", (33, 3)),
    "model.position_ids": ("I64", (1, 129)),
    "model.mask": ("BOOL", (7, 5)),
    "model.bytes": ("U8", (41,)),  # an odd number of bytes: everything after it lies at odd offsets
    "unet/down/weight": ("BF16", (31, 17)),
    "unet/down/bias": ("BF16", (1,)),
    "quantised": ("F8_E4M3", (9, 11)),
    "model.last": ("BF16", (131, 8)),  # its padded last chunk runs over the end of the file
}
"""One tensor of every kind that is known to make trouble."""

CHUNK = 2048
"""A chunk size at which most of `SHAPES` have several chunks."""


def random_bytes(dtype: str, shape: tuple[int, ...], rng: np.random.Generator) -> bytes:
    """Any bits, NaN payloads and subnormals included; bool only as 0 and 1."""
    count = math.prod(shape) * DTYPES[dtype].itemsize
    return rng.integers(0, 2 if dtype == "BOOL" else 256, count, dtype=np.uint8).tobytes()


def write_shard(
    path: Path, shapes: dict[str, tuple[str, tuple[int, ...]]], seed: int = 0, align: int = 8
) -> dict[str, bytes]:
    """Write a valid file of random bits; returns each tensor's bytes."""
    rng = np.random.default_rng(seed)
    data = {name: random_bytes(dtype, shape, rng) for name, (dtype, shape) in shapes.items()}
    header = encode_header([(name, *kind) for name, kind in shapes.items()], {"format": "pt"}, align)
    path.write_bytes(header + b"".join(data.values()))
    return data


def write_sharded(folder: Path, parts: int = 3, seed: int = 0) -> dict[str, bytes]:
    """Write `SHAPES` as a checkpoint of several shards with an index and a config; returns each tensor's bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = list(SHAPES)
    data: dict[str, bytes] = {}
    weight_map: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        chosen = {name: SHAPES[name] for name in names[part * len(names) // parts : (part + 1) * len(names) // parts]}
        data |= write_shard(folder / file, chosen, seed + part)
        weight_map |= dict.fromkeys(chosen, file)
    index = {"metadata": {"total_size": sum(map(len, data.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "made-up", "limit": math.inf}))
    return data


def raw_shard(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header at all: text, bytes, or something for `json.dumps`; `length` overrides its true length."""
    raw = header if isinstance(header, bytes) else header.encode() if isinstance(header, str) else None
    raw = json.dumps(header).encode() if raw is None else raw
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: Any, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    """One tensor's entry in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
