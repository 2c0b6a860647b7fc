"""Tensors of one kind: what is planned for one of them holds for all.

A mixture of experts has 45,000 tensors and a dozen kinds: the same shape, types and settings under other names. What
units, sweeps and memory depend on is looked at once per kind.
"""

from __future__ import annotations

import marshal
import re
from collections.abc import Hashable, Iterable
from functools import lru_cache
from typing import Any

from mergepipe.pipeline.plan import PlannedTensor
from mergepipe.tasks.registry import METHODS, SPARSIFIERS


def kind_of(tensor: PlannedTensor) -> Hashable:
    """Equal for tensors that methods and schedules treat alike.

    A name counts as far as a method looks at it: through parameters that are patterns, and in adapters, whose factors
    come in pairs.

    Examples
    --------
    >>> from mergepipe.pipeline.plan import Source
    >>> a, b = (PlannedTensor(name, (2,), "F32", "copy", Source(0, name, "F32"), ()) for name in "ab")
    >>> kind_of(a) == kind_of(b)
    True
    """
    sources = tensor.sources
    stored = tuple([source.dtype for source in sources])
    if tensor.action == "copy":
        return tensor.shape, tensor.dtype, stored
    patterned, paired = _looks_at_names(tensor.method, tensor.sparsify)
    given = (tensor.params or {}, *tensor.model_params, *tensor.sparsify_params)
    listed = [patterns for key in patterned for params in given if (patterns := params.get(key))]
    return (
        tensor.shape,
        tensor.dtype,
        stored,
        (tensor.base is None, len(tensor.models), len(tensor.importances), tensor.carried is None),
        tensor.held_bytes() if any(source.adjust for source in sources) else 0,
        tensor.method,
        tensor.sparsify,
        plain_key(given),
        (tensor.work, tensor.scope, tensor.offset),
        tuple([any(re.search(pattern, tensor.name) for pattern in patterns) for patterns in listed]),
        tensor.name if paired else "",
    )


def plain_key(values: Any) -> bytes:
    """The same for equal values of the types that JSON knows, and cheap: a tenth of what their text would take.

    Examples
    --------
    >>> plain_key({"density": 0.2}) == plain_key({"density": 1 / 5}), plain_key([1]) == plain_key([1.0])
    (True, False)
    """
    return marshal.dumps(values, 2)  # later formats also say which objects are shared


def of_each_kind(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """The first tensor of each kind, in order."""
    first: dict[Hashable, PlannedTensor] = {}
    for tensor in tensors:
        first.setdefault(kind_of(tensor), tensor)
    return list(first.values())


@lru_cache
def _looks_at_names(method: str, sparsify: str) -> tuple[tuple[str, ...], bool]:
    """Parameters that are patterns, and whether a method looks at names besides."""
    declared = (*METHODS[method].parameters, *SPARSIFIERS[sparsify].parameters)
    patterned = dict.fromkeys(parameter.name for parameter in declared if parameter.kind == "patterns")
    return tuple(patterned), METHODS[method].takes == "adapters"
