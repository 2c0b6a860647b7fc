"""What a recipe asks for many tensors: looked up once for all those that none of its values tells apart."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from mergepipe.pipeline.recipe import Parameters, Recipe, TensorSettings, settings
from mergepipe.pipeline.values import Filtered, Gradient, ValueSpec


class SharedSettings:
    """The settings of the tensors of one recipe, as they come back from a saved plan.

    A name counts as far as a rule or a filter looks at it, a layer where there is a gradient. Tensors that share their
    settings share the very dicts, which nobody may change.

    Parameters
    ----------
    recipe : Recipe
    """

    def __init__(self, recipe: Recipe) -> None:
        specs = [spec for scope in _scopes(recipe) for spec in scope.values()]
        self._recipe = recipe
        self._filters = tuple(dict.fromkeys(word for spec in specs for word in _filters(spec)))
        self._by_layer = any(_has_gradient(spec) for spec in specs)
        self._found: dict[Hashable, TensorSettings] = {}

    def of(self, tensor_name: str, n_layers: int, layer: int | None, names: Sequence[str]) -> TensorSettings:
        """As :func:`mergepipe.pipeline.recipe.settings`, with lists in place of tuples.

        Raises
        ------
        RecipeError
            For every tensor anew.
        """
        rule = self._recipe.rule_for(tensor_name)
        key = (
            id(rule),
            tuple(self._hits(name) for name in (tensor_name, *names)) if self._filters else len(names),
            (layer, n_layers) if self._by_layer else None,
        )
        found = self._found.get(key)
        if found is None:
            found = _as_saved(settings(self._recipe, tensor_name, n_layers, layer=layer, names=names))
            self._found[key] = found
        return found

    def _hits(self, name: str) -> tuple[bool, ...]:
        return tuple(word in name for word in self._filters)


def _scopes(recipe: Recipe) -> Iterator[Parameters]:
    """Wherever a value may stand that a tensor of this recipe takes."""
    yield from recipe.shared
    for model in recipe.models:
        yield model.parameters
    for rule in recipe.rules:
        yield rule.parameters
    for thinning in (recipe.sparsify, *(rule.sparsify for rule in recipe.rules)):
        if thinning is not None:
            yield thinning.parameters


def _filters(spec: ValueSpec) -> Iterable[str]:
    entries = spec.entries if isinstance(spec, Filtered) else ()
    return [entry.filter for entry in entries if entry.filter is not None]


def _has_gradient(spec: ValueSpec) -> bool:
    values = [entry.value for entry in spec.entries] if isinstance(spec, Filtered) else [spec]
    return any(isinstance(value, Gradient) for value in values)


def _as_saved(found: TensorSettings) -> TensorSettings:
    return replace(
        found,
        params=_lists(found.params),
        model_params=tuple(_lists(params) for params in found.model_params),
        sparsify_params=tuple(_lists(params) for params in found.sparsify_params),
    )


def _lists(params: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}
