"""The recipes that both tools run, and the parameter values each tensor should get from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from support.checkpoints import Family


@dataclass(frozen=True)
class Values:
    """What a recipe says about one tensor."""

    weight: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    normalize: bool = True
    lam: float = 1.0
    t: float = 0.0
    scale: float = 1.0


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes
    ----------
    name, method : str
    parameters : dict
        The recipe's global parameters.
    values : callable
        Tensor name to `Values`, written by hand and not resolved by either tool.
    per_model : tuple of dict
        Parameters of each expert; as many experts take part.
    """

    name: str
    method: str
    values: Callable[[str], Values]
    parameters: dict[str, Any] = field(default_factory=dict)
    per_model: tuple[dict[str, Any], ...] = ({}, {}, {})

    def recipe(self, family: Family, dtype: str) -> dict[str, Any]:
        """The recipe for a family; bf16 checkpoints are merged in float32 and rounded once by both tools."""
        models = [
            {"model": str(path), "parameters": dict(parameters)} if parameters else {"model": str(path)}
            for path, parameters in zip(family.experts, self.per_model, strict=False)
        ]
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "out_dtype": dtype}
        if self.method == "slerp":
            models.insert(0, {"model": str(family.base)})
        if self.method not in ("linear", "passthrough"):
            recipe["base_model"] = str(family.base)
        if self.parameters:
            recipe["parameters"] = dict(self.parameters)
        return {**recipe, "models": models}


def _layer(name: str) -> int:
    """The layer of a tensor; those outside the layers count as layer 0, where a gradient starts."""
    found = re.search(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else 0


def _always(values: Values) -> Callable[[str], Values]:
    return lambda name: values


W = (0.6, 0.3, 0.45)
WEIGHTS: tuple[dict[str, Any], ...] = tuple({"weight": w} for w in W)
D = (0.3, 0.55, 0.8)
DENSITIES: tuple[dict[str, Any], ...] = tuple({"weight": w, "density": d} for w, d in zip(W, D, strict=True))

CASES = (
    Case("linear", "linear", _always(Values(weight=W)), {}, WEIGHTS),
    Case("linear-sum", "linear", _always(Values(weight=W, normalize=False)), {"normalize": False}, WEIGHTS),
    Case(
        "linear-gradient",
        "linear",
        lambda name: Values(weight=((0.2, 0.8)[_layer(name)], 0.5)),
        {},
        ({"weight": [0.2, 0.8]}, {"weight": 0.5}),
    ),
    Case("task-arithmetic", "task_arithmetic", _always(Values(weight=W, normalize=False)), {}, WEIGHTS),
    Case(
        "task-arithmetic-lambda",
        "task_arithmetic",
        _always(Values(weight=W, lam=0.7, normalize=True)),
        {"lambda": 0.7, "normalize": True},
        WEIGHTS,
    ),
    Case("ties", "ties", _always(Values(weight=W, density=D)), {}, DENSITIES),
    Case(
        "ties-sum",
        "ties",
        _always(Values(weight=W, density=D, normalize=False, lam=0.4)),
        {"normalize": False, "lambda": 0.4},
        DENSITIES,
    ),
    Case(
        "ties-filter",
        "ties",
        lambda name: Values(weight=(0.5, 0.5), density=((0.2 if "mlp" in name else 0.9),) * 2),
        {"weight": 0.5, "density": [{"filter": "mlp", "value": 0.2}, {"value": 0.9}]},
        ({}, {}),
    ),
    Case("ties-whole", "ties", _always(Values(weight=W, density=(1, 1, 1))), {}, WEIGHTS),
    Case("slerp", "slerp", _always(Values(t=0.35)), {"t": 0.35}, ({},)),
    Case(
        "slerp-filter",
        "slerp",
        lambda name: Values(t=(0.1, 0.9)[_layer(name)] if "self_attn" in name else 0.5),
        {"t": [{"filter": "self_attn", "value": [0.1, 0.9]}, {"value": 0.5}]},
        ({},),
    ),
    Case("passthrough", "passthrough", _always(Values()), {}, ({},)),
    Case("passthrough-scale", "passthrough", _always(Values(scale=0.3)), {}, ({"scale": 0.3},)),
)
