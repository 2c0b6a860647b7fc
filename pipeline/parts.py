"""The parts of a recipe: stretches of the output, each merged as if it were a whole recipe of its own.

A recipe that lists `models` is one part. One with `slices` has a part for each slice, one with `modules` those of
each module. A part's recipe is a plain one, with `models`, one method, one base, and the parameters of the scopes
around it in `outer`; so whatever understands plain recipes understands parts. What a part adds is where its tensors
are: which layers of each model, and which layers of the output they become.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mergepipe.pipeline.recipe import ModuleSpec, Parameters, Recipe, SliceSpec

WHOLE = "$"
"""Path of a recipe's own part."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stretch of the output.

    Attributes
    ----------
    path : str
        Where it stands in the recipe, such as ``$.slices[1]``.
    listing : str
        Where its models are listed.
    recipe : Recipe
        What is asked for it, as a plain recipe.
    base_model : str or None
        The base that is asked for; that of `recipe` is None where it is no source of a slice.
    module : str or None
        The tower it belongs to; None where the recipe names no modules.
    ranges : dict of str to (int, int)
        Layers taken of each model, by its path; empty where whole models are merged.
    first_layer : int
        Number in the output of the first of these layers.
    first, last : bool
        Whether it has the tensors before all layers, and those after.
    """

    path: str
    listing: str
    recipe: Recipe
    base_model: str | None = None
    module: str | None = None
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    first_layer: int = 0
    first: bool = True
    last: bool = True

    @property
    def sliced(self) -> bool:
        """Whether it is made from slices of models."""
        return bool(self.ranges)

    @property
    def layers(self) -> int:
        """Layers it makes; 0 where whole models are merged."""
        return max((stop - start for start, stop in self.ranges.values()), default=0)


def parts_of(recipe: Recipe) -> tuple[Part, ...]:
    """The parts of a recipe, in the order of the output.

    Examples
    --------
    >>> from mergepipe.pipeline.recipe import ModelSpec
    >>> a, b = ModelSpec("/a", layer_range=(0, 3)), ModelSpec("/b", layer_range=(1, 4))
    >>> parts = parts_of(Recipe("passthrough", (), slices=(SliceSpec((a,)), SliceSpec((b,)))))
    >>> [(part.path, part.first_layer, part.ranges, part.first, part.last) for part in parts]
    [('$.slices[0]', 0, {'/a': (0, 3)}, True, False), ('$.slices[1]', 3, {'/b': (1, 4)}, False, True)]
    """
    if recipe.slices:
        return _stacked(recipe, recipe.slices, WHOLE, None, (recipe.parameters,))
    if recipe.modules:
        return tuple(part for name, module in recipe.modules.items() for part in _of_module(recipe, name, module))
    return (Part(WHOLE, "$.models", recipe, recipe.base_model),)


def _of_module(recipe: Recipe, name: str, module: ModuleSpec) -> tuple[Part, ...]:
    path = f"$.modules.{name}"
    around = replace(
        recipe,
        merge_method=module.merge_method or recipe.merge_method,
        base_model=module.base_model or recipe.base_model,
    )
    if module.slices:
        return _stacked(around, module.slices, path, name, (module.parameters, recipe.parameters))
    plain = replace(
        around, models=module.models, parameters=module.parameters, outer=(recipe.parameters,), modules={}, slices=()
    )
    return (Part(path, f"{path}.models", plain, plain.base_model, name),)


def _stacked(
    recipe: Recipe, slices: tuple[SliceSpec, ...], path: str, module: str | None, outer: tuple[Parameters, ...]
) -> tuple[Part, ...]:
    parts = []
    at = 0
    for index, one in enumerate(slices):
        ranges = {spec.model: spec.layer_range for spec in one.sources if spec.layer_range is not None}
        base = one.base_model or recipe.base_model
        plain = replace(
            recipe,
            merge_method=one.merge_method or recipe.merge_method,
            # A base that is no source has no layers here: only methods that look at none get along with that.
            base_model=base if base in ranges else None,
            models=tuple(replace(spec, layer_range=None) for spec in one.sources),
            parameters=one.parameters,
            outer=outer,
            slices=(),
            modules={},
        )
        where = f"{path}.slices[{index}]"
        ends = index == 0, index == len(slices) - 1
        part = Part(where, f"{where}.sources", plain, base, module, ranges, at, *ends)
        parts.append(part)
        at += part.layers
    return tuple(parts)
