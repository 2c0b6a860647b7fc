"""A merge as one writes it by hand: every checkpoint loaded at once, plain torch, tensor by tensor, in float32.

    python -m benchmarks.torch_merge RECIPE.yaml OUT

It takes the recipes of `bench_run`, whose parameters hold for all models, and computes what mergepipe computes with
them. There are no chunks, no checks and no syncs, and torch takes as many threads as it likes.

`load_file` maps a file, and pages come in as the arithmetic asks for them: they count as resident memory, not as
anonymous memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

PARALLEL = 0.9995
"""Cosine, in magnitude, above which SLERP is linear."""

Parameters = Mapping[str, float]


def linear(models: Sequence[Tensor], parameters: Parameters) -> Tensor:
    """The weighted mean."""
    weight = parameters["weight"]
    return _sum([weight * model for model in models]) / (weight * len(models))


def task_arithmetic(models: Sequence[Tensor], parameters: Parameters) -> Tensor:
    """The weighted sum of the differences from the base, which comes first, on the base."""
    base, *experts = models
    return base + _sum([parameters["weight"] * (expert - base) for expert in experts])


def slerp(models: Sequence[Tensor], parameters: Parameters) -> Tensor:
    """From the first model to the second along the arc, the whole tensor as one vector."""
    left, right = models
    t = parameters["t"]
    norms = float(torch.linalg.vector_norm(left) * torch.linalg.vector_norm(right))
    cosine = float(torch.dot(left.flatten(), right.flatten())) / norms
    if abs(cosine) > PARALLEL:
        return (1 - t) * left + t * right
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle) * left + math.sin(t * angle) / math.sin(angle) * right


def ties(models: Sequence[Tensor], parameters: Parameters) -> Tensor:
    """Trimmed differences from the base, which comes first: the mean of those that have the sign of their sum."""
    base, *experts = models
    weight = parameters["weight"]
    terms = [weight * trim(expert - base, parameters["density"]) for expert in experts]
    positive = _sum(terms) >= 0
    agreeing = [torch.where(positive, term > 0, term < 0) for term in terms]
    total = _sum([term * agrees for term, agrees in zip(terms, agreeing, strict=True)])
    weights = _sum([weight * agrees for agrees in agreeing])
    return base + total / torch.where(weights == 0, 1.0, weights)


def trim(delta: Tensor, density: float) -> Tensor:
    """With zeros but for the largest magnitudes; all that are equal to the smallest of these stay.

    Examples
    --------
    >>> trim(torch.tensor([1.0, -3.0, 2.0, -2.0, 0.5]), 0.4).tolist()
    [0.0, -3.0, 2.0, -2.0, 0.0]
    """
    magnitudes = delta.abs()
    kept = max(1, int(density * delta.numel()))
    least = torch.kthvalue(magnitudes.flatten(), delta.numel() - kept + 1).values
    return torch.where(magnitudes >= least, delta, 0.0)


def _sum(terms: Sequence[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


MERGES: dict[str, Callable[[Sequence[Tensor], Parameters], Tensor]] = {
    "linear": linear,
    "task_arithmetic": task_arithmetic,
    "slerp": slerp,
    "ties": ties,
}
METHODS = tuple(MERGES)
"""What is written out here, as `bench_run` names it."""

UNDERSTOOD = {"merge_method", "base_model", "models", "model", "parameters", "weight", "density", "t"}
"""Keys of a recipe; one with another would be merged in another way."""


def merge(recipe: Mapping[str, Any]) -> dict[str, Tensor]:
    """All tensors of the merge, in bfloat16.

    Raises
    ------
    ValueError
        If the recipe asks for more than is written out here.
    """
    method, parameters, models = recipe["merge_method"], recipe["parameters"], recipe["models"]
    strange = {key for part in (recipe, parameters, *models) for key in part} - UNDERSTOOD
    if method not in METHODS or strange:
        raise ValueError(f"'{method}' with {sorted(strange) or 'nothing else'} is not written out here")
    base = [recipe["base_model"]] if "base_model" in recipe else []
    loaded = [load(Path(name)) for name in (*base, *(model["model"] for model in models))]
    compute = MERGES[method]
    return {name: compute([tensors[name].float() for tensors in loaded], parameters).bfloat16() for name in loaded[0]}


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@click.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(recipe: Path, out: Path) -> None:
    """Merge by RECIPE into one file in OUT."""
    merged = merge(yaml.safe_load(recipe.read_text(encoding="utf-8")))
    out.mkdir(parents=True)
    save_file(merged, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    main()
