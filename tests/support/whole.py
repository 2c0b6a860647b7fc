"""Whole-model methods in NumPy and float64, and merges of small models through files to hold against them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # names bfloat16 for NumPy
import numpy as np
import numpy.typing as npt
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.tasks.registry import METHODS
from support import reference

F64 = npt.NDArray[np.float64]
Model = dict[str, F64]
"""Values by name, exact in the dtype that they are stored in."""

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (37, 11),
    "layers.0.wide.weight": (3, 70_001),  # a row of two blocks
    "layers.0.experts.weight": (4, 6, 5),
    "layers.1.norm.weight": (23,),
    "layers.1.scale": (),
    "layers.1.empty": (0, 4),
}


def grid(rng: np.random.Generator, shape: tuple[int, ...], step: float = 1 / 64, spread: float = 6) -> F64:
    """Multiples of `step`, so that ties are many and float32 sums of a few are exact."""
    return np.asarray(np.round(rng.normal(0, spread, shape)) * step, np.float64)


def family(seed: int = 0, models: int = 3, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> tuple[Model, list[Model]]:
    """A base and fine-tunes of it, each tensor with a spread of its own."""
    rng = np.random.default_rng(seed)
    base = {name: grid(rng, shape) for name, shape in shapes.items()}
    experts = [
        {
            name: base[name] + grid(rng, shape, spread=2.0 + number)
            for number, (name, shape) in enumerate(shapes.items())
        }
        for _ in range(models)
    ]
    return base, experts


def write(folder: Path, model: Model, dtypes: Mapping[str, str] | str = "float32") -> Path:
    """A checkpoint of these values."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {name: dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32") for name in model}
    tensors = {name: np.asarray(value).astype(np.dtype(kinds[name])) for name, value in model.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "architectures": ["Tiny"]}))
    return folder


def merged(
    folder: Path,
    base: Model,
    experts: Sequence[Model],
    recipe: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]] | None = None,
    dtypes: Mapping[str, str] | str = "float32",
    **how: Any,
) -> Model:
    """Write the models, merge them through `build` and `run`, and read the result, as float64."""
    prepare(folder, base, experts, recipe, each, dtypes, **how)
    mergepipe.run(folder / "work", workers=2)
    return read(folder / "merged")


def prepare(
    folder: Path,
    base: Model,
    experts: Sequence[Model],
    recipe: Mapping[str, Any],
    each: Sequence[Mapping[str, Any]] | None = None,
    dtypes: Mapping[str, str] | str = "float32",
    **how: Any,
) -> Any:
    """Everything before `run`; returns the plan."""
    paths = [write(folder / f"expert-{k}", model, dtypes) for k, model in enumerate(experts)]
    listed = [{"model": str(path)} for path in paths]
    for entry, parameters in zip(listed, each or [{}] * len(paths), strict=True):
        if parameters:
            entry["parameters"] = dict(parameters)  # type: ignore[assignment]
    if METHODS[str(recipe["merge_method"])].importance:
        for k, entry in enumerate(listed):
            importances = {name: np.abs(value) + k + 1 for name, value in base.items()}
            entry["importance"] = str(write(folder / f"importance-{k}", importances, dtypes))
    document = {"base_model": str(write(folder / "base", base, dtypes)), "models": listed, **recipe}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    how = {"memory": "3GiB", "chunk_size": "64KiB", **how}
    return mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **how)


def read(folder: Path) -> Model:
    """A checkpoint's values, as float64."""
    return {name: value.astype(np.float64) for name, value in load_file(folder / "model.safetensors").items()}


def flat(model: Mapping[str, F64]) -> F64:
    """The flattened model, in file order of the base, which safetensors sorts by width and then name."""
    return np.concatenate([np.reshape(model[name], -1) for name in sorted(model)])


def unflat(values: F64, like: Mapping[str, F64]) -> Model:
    """The reverse of :func:`flat`."""
    parts, at = {}, 0
    for name in sorted(like):
        size = like[name].size
        parts[name] = values[at : at + size].reshape(like[name].shape)
        at += size
    return parts


def deltas(base: Model, experts: Sequence[Model]) -> list[F64]:
    """Flattened task vectors."""
    return [flat(expert) - flat(base) for expert in experts]


def whole_ties(base: F64, taus: Sequence[F64], weights: Sequence[float], density: float, tie_rule: str = "keep") -> F64:
    """The original: one threshold per task, and a vote of zero takes the sign of the sum of all votes' signs."""
    thinned = [reference.magnitude(tau, density, tie_rule) for tau in taus]
    votes = np.sign(np.sum([w * t for w, t in zip(weights, thinned, strict=True)], axis=0))
    signs = np.where(votes == 0, 1.0 if votes.sum() > 0 else -1.0, votes)
    return reference.task_vectors(base, thinned, weights, "sum", True, signs=signs)


def nan_weights(vectors: Sequence[F64], total: float = 1.0) -> list[float]:
    """Inverse norms, scaled to add up to `total`."""
    inverse = [1 / math.sqrt(math.fsum((x * x).reshape(-1))) for x in vectors]
    return [total * x / sum(inverse) for x in inverse]


def consensus(
    base: F64, taus: Sequence[F64], lam: Sequence[float], least: int = 2, scale: float = 1.0, dis_sum: bool = False
) -> F64:
    """Consensus TA: the merged vector where it matters to enough tasks."""
    total = np.sum(taus, axis=0)
    if dis_sum:
        total = np.sum([np.where((tau >= 0) == (total >= 0), tau, 0) for tau in taus], axis=0)
    active = sum((np.abs(tau) > x * np.abs(total - tau)).astype(int) for tau, x in zip(taus, lam, strict=True))
    return base + scale * np.where(active >= least, total, 0)


def pcb(base: F64, taus: Sequence[F64], ratio: float = 0.1, scale: float = 1.0, rounded: str = "f4") -> F64:
    """PCB-Merging of flattened vectors; beta is ranked in the type that it is `rounded` to."""
    t = np.stack(taus)
    n = t.shape[1]
    total, weights, clipped = t.sum(0), [], []
    for tau in t:
        a = np.sort(np.abs(tau))
        low, high = a[int(n * 1e-4)], a[max(0, int(n * (1 - 1e-4) - 1))]
        clip = np.clip(np.abs(tau), low, high)
        norm = (clip - low) / (high - low) if high > low else np.zeros(n)
        beta = (np.exp(len(t) * norm**2) * np.tanh(tau * total)).astype(rounded).astype("f8")
        floor, top = np.sort(beta)[min(int(n * (1 - ratio)), n - 1)], beta.max()
        weights.append((np.maximum(beta, floor) - floor) / (top - floor) if top > floor else (beta >= floor) * 1.0)
        clipped.append(np.sign(tau) * clip)
    w = np.stack(weights)
    return base + scale * (w * np.stack(clipped)).sum(0) / np.maximum(w.sum(0), 1e-12)


def emr(base: Model, experts: Sequence[Model], means: bool = False) -> tuple[Model, list[Model], list[float]]:
    """EMR-Merging: the unified model, every task's own model, and the rescalers."""
    unified, masks, own, masked = {}, [dict[str, Any]() for _ in experts], [], []
    for name, below in base.items():
        t = np.stack([expert[name] - below for expert in experts])
        g = np.where(t.sum(0) > 0, 1.0, -1.0)
        unified[name] = g * np.where(t * g > 0, np.abs(t), 0).max(0)
        for mask, tau in zip(masks, t, strict=True):
            mask[name] = tau * g > 0
        per = max(1, below.size) if means else 1
        own.append([np.abs(tau).sum() / per for tau in t])
        masked.append([np.abs(mask[name] * unified[name]).sum() / per for mask in masks])
    factors = (np.sum(own, axis=0) / np.sum(masked, axis=0)).tolist()
    tasks = [
        {name: base[name] + factor * mask[name] * unified[name] for name in base}
        for factor, mask in zip(factors, masks, strict=True)
    ]
    return {name: base[name] + unified[name] for name in base}, tasks, factors
