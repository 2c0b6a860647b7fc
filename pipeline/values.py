"""Values that vary: one number for the whole merge, a gradient over the layers, or a choice by tensor name.

The meaning is mergekit's. A list of scalars is a gradient: spread evenly over the layers of a stack, numbers are
interpolated linearly, flags and words are taken stepwise. A list of ``{filter, value}`` takes the first entry whose
filter is contained in the tensor's name; if none is, the value is missing and the next scope is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias


class Missing:
    """Stands for "no value here, ask the next scope"."""

    def __repr__(self) -> str:
        return "missing"


MISSING = Missing()

Scalar: TypeAlias = "bool | int | float | str | tuple[str, ...] | None"
"""One value; a tuple of strings is one value too (a list of regular expressions)."""


@dataclass(frozen=True, slots=True)
class Gradient:
    """Values spread evenly over the layers, from the first to the last; at least one."""

    values: tuple[Scalar, ...]


@dataclass(frozen=True, slots=True)
class FilterEntry:
    """One row of a choice by name: `value` for tensors whose name contains `filter`; None stands for all."""

    filter: str | None
    value: Scalar | Gradient

    def matches(self, tensor_name: str) -> bool:
        """Whether this entry applies to the tensor."""
        return self.filter is None or self.filter in tensor_name


@dataclass(frozen=True, slots=True)
class Filtered:
    """A choice by tensor name: the first entry that matches wins."""

    entries: tuple[FilterEntry, ...]


ValueSpec: TypeAlias = "Scalar | Gradient | Filtered"
"""What a recipe may write as the value of a parameter."""


def resolve(spec: ValueSpec | Missing, tensor_name: str, layer: int | None, n_layers: int) -> Scalar | Missing:
    """The value for one tensor.

    Parameters
    ----------
    spec : ValueSpec or MISSING
    tensor_name : str
        Looked at by filters only.
    layer : int or None
        Number of the tensor's layer, from 0; None for a tensor outside the layers, which takes a gradient's first
        value.
    n_layers : int
        Layers in its stack. The only layer of a stack takes a gradient's last value.

    Returns
    -------
    Scalar or MISSING
        MISSING if `spec` is, or if no filter matches.

    Examples
    --------
    >>> resolve(Gradient((0.0, 1.0, 0.0)), "model.layers.1.mlp.up_proj.weight", 1, 5)
    0.5
    >>> spec = Filtered((FilterEntry("mlp", 0.3), FilterEntry(None, 0.7)))
    >>> resolve(spec, "model.layers.1.mlp.up_proj.weight", 1, 5), resolve(spec, "lm_head.weight", None, 5)
    (0.3, 0.7)
    """
    if isinstance(spec, Filtered):
        entry = next((entry for entry in spec.entries if entry.matches(tensor_name)), None)
        return MISSING if entry is None else resolve(entry.value, tensor_name, layer, n_layers)
    if isinstance(spec, Gradient):
        return _along(spec.values, _position(layer, n_layers))
    return spec


def is_total(spec: ValueSpec | Missing) -> bool:
    """Whether `spec` has a value for every tensor, whatever its name.

    Examples
    --------
    >>> is_total(0.5), is_total(Filtered((FilterEntry("mlp", 0.5),))), is_total(MISSING)
    (True, False, False)
    """
    if isinstance(spec, Filtered):
        return any(entry.filter is None for entry in spec.entries)
    return not isinstance(spec, Missing)


def to_plain(spec: ValueSpec) -> object:
    """The value as a recipe writes it, of lists and dicts: for hashing and for the model card.

    Examples
    --------
    >>> to_plain(Filtered((FilterEntry("mlp", Gradient((0.2, 0.8))), FilterEntry(None, 0.5))))
    [{'filter': 'mlp', 'value': [0.2, 0.8]}, {'value': 0.5}]
    """
    if isinstance(spec, Filtered):
        return [
            ({} if entry.filter is None else {"filter": entry.filter}) | {"value": to_plain(entry.value)}
            for entry in spec.entries
        ]
    if isinstance(spec, Gradient):
        return [to_plain(value) for value in spec.values]
    return list(spec) if isinstance(spec, tuple) else spec


def layer_of(tensor_name: str) -> int | None:
    """Number of the layer a tensor belongs to: the first part of its dotted name that is a number.

    Examples
    --------
    >>> layer_of("model.layers.11.mlp.experts.3.up_proj.weight"), layer_of("h.0.ln_1.bias"), layer_of("lm_head.weight")
    (11, 0, None)
    """
    return _split(tensor_name)[1]


def stack_of(tensor_name: str) -> str | None:
    """The stack of layers a tensor belongs to: its name before the layer's number; None outside the layers.

    Examples
    --------
    >>> stack_of("model.layers.11.mlp.up_proj.weight"), stack_of("lm_head.weight")
    ('model.layers', None)
    """
    return _split(tensor_name)[0]


def layer_counts(tensor_names: Iterable[str]) -> dict[str, int]:
    """How many layers each stack has, so that the encoder and the decoder of one model are counted apart.

    Examples
    --------
    >>> layer_counts(["vision.blocks.1.w", "model.layers.0.w", "model.layers.3.w", "lm_head.weight"])
    {'vision.blocks': 2, 'model.layers': 4}
    """
    counts: dict[str, int] = {}
    for name in tensor_names:
        stack, layer = _split(name)
        if stack is not None and layer is not None:
            counts[stack] = max(counts.get(stack, 0), layer + 1)
    return counts


def n_layers_of(tensor_name: str, counts: Mapping[str, int]) -> int:
    """Layers in the stack of this tensor, from :func:`layer_counts`; 0 outside the layers.

    Examples
    --------
    >>> n_layers_of("model.layers.2.w", {"model.layers": 4}), n_layers_of("lm_head.weight", {"model.layers": 4})
    (4, 0)
    """
    stack = stack_of(tensor_name)
    return 0 if stack is None else counts.get(stack, 0)


def _split(tensor_name: str) -> tuple[str | None, int | None]:
    parts = tensor_name.split(".")
    for index, part in enumerate(parts):
        # No model has a billion layers; a longer run of digits is no number of a layer.
        if part.isascii() and part.isdigit() and len(part) < 10:
            return ".".join(parts[:index]), int(part)
    return None, None


def _position(layer: int | None, n_layers: int) -> float:
    """Where in a gradient a layer stands, 0 to 1."""
    if layer is None:
        return 0.0
    if n_layers < 2:
        return 1.0
    return min(layer / (n_layers - 1), 1.0)


def _along(values: tuple[Scalar, ...], position: float) -> Scalar:
    scaled = position * (len(values) - 1)
    lower = math.floor(scaled)
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < len(values):
        return values[lower]
    upper = min(lower + 1, len(values) - 1)
    fraction = scaled - lower
    if fraction == 0:
        return numbers[lower]
    return (1 - fraction) * numbers[lower] + fraction * numbers[upper]
