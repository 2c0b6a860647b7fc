"""Small merge jobs for tests of what happens around the arithmetic: crashes, resumes, checks, ceilings."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

import mergepipe

Shapes = dict[str, tuple[int, ...]]

SMALL: Shapes = {
    "embed.weight": (300, 256),  # two blocks, the last one short
    "layers.0.up.weight": (130, 1024),
    "layers.0.norm.weight": (64,),
    "layers.1.scale": (),
    "layers.1.empty": (0, 16),
}
"""A few units in all: small enough to be killed at every single write."""

LARGER: Shapes = {f"layers.{layer}.{part}.weight": (1024, 512) for layer in range(6) for part in ("up", "down")} | {
    f"layers.{layer}.norm.weight": (512,) for layer in range(6)
}
"""12 MiB of float16 per model: killed at random moments."""

DRAWN = 1 << 20
"""Elements of a tensor that are drawn; what is longer repeats them, which takes a tenth of the time."""


def write_model(
    folder: Path, seed: int, shapes: Shapes, shards: int = 1, parent_seed: int | None = None, dtype: Any = np.float16
) -> None:
    """A checkpoint of noise in `dtype`, near that of `parent_seed` if given, with a config and an integer buffer."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    parent = np.random.default_rng(parent_seed) if parent_seed is not None else None
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for name, shape in shapes.items():
        drawn = shape if math.prod(shape) <= DRAWN else DRAWN
        value = rng.standard_normal(drawn) * (1.0 if parent is None else 0.1)
        value = np.asarray(value if parent is None else value + parent.standard_normal(drawn), dtype)
        tensors[name] = np.resize(value, shape)
    tensors["position_ids"] = np.arange(600, dtype=np.int64).reshape(1, 600)
    names = list(tensors)
    parts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    files = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "architectures": ["Tiny"]}))
    (folder / "tokenizer.json").write_text("{}")


def write_recipe(folder: Path, method: str = "ties", models: int = 2, **extra: Any) -> Path:
    """A recipe over ``base``, ``expert-1``, … of `folder`, as written by :func:`write_job`."""
    needs_base = method not in ("linear",)
    density = {"density": 0.5} if method in ("ties", "dare_ties", "dare_linear") else {}
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(folder / f"expert-{i}"), "parameters": {"weight": 0.5, **density}}
            for i in range(1, models + 1)
        ],
        **extra,
    }
    if needs_base:
        recipe["base_model"] = str(folder / "base")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def write_job(
    folder: Path, shapes: Shapes | None = None, shards: int = 1, method: str = "ties", models: int = 2,
    dtype: Any = np.float16, **extra: Any,
) -> Path:  # fmt: skip
    """A base, fine-tunes of it and a recipe that merges them; returns the recipe."""
    shapes = SMALL if shapes is None else shapes
    write_model(folder / "base", 0, shapes, shards, dtype=dtype)
    for number in range(1, models + 1):
        write_model(folder / f"expert-{number}", number, shapes, shards, parent_seed=0, dtype=dtype)
    return write_recipe(folder, method, models, **extra)


def build_job(folder: Path, **how: Any) -> Path:
    """Build the recipe of `folder` into ``work``, for the output ``merged``; returns the workspace."""
    how = {"chunk_size": "64KiB", "memory": "2GiB", **how}
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **how)
    return folder / "work"


def hashes(folder: Path) -> dict[str, str]:
    """File name to SHA-256 of all files of an output but its manifest, which tells of time and memory."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "mergepipe_manifest.json"
    }
