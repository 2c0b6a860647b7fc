"""A recipe: what the user wants, typed and checked, and what it asks for each tensor.

The dialect is mergekit's, plus a few keys of ours; unlike there, a key or a parameter that nobody knows is an error,
and all faults are reported together, each with its path. :func:`load_recipe` reads a file, :func:`parse_recipe` takes
the text or its values; both hand the checking to :mod:`mergepipe.pipeline.parsing`. :func:`settings` resolves the
recipe for one tensor.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergepipe.errors import Fault, RecipeError
from mergepipe.pipeline.document import apply_overrides, load_document, read_document
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.tokenizer_keys import TokenizerSpec
from mergepipe.pipeline.values import MISSING, Missing, Scalar, ValueSpec, layer_of, resolve, to_plain
from mergepipe.tasks.method import MergeMethod, Sparsifier
from mergepipe.tasks.parameter import REQUIRED, Parameter

__all__ = [
    "ModelSpec",
    "ModuleSpec",
    "Recipe",
    "Rule",
    "SliceSpec",
    "SparsifySpec",
    "TensorSettings",
    "apply_overrides",
    "load_recipe",
    "parse_recipe",
    "settings",
]

Parameters = dict[str, ValueSpec]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One entry of `models`: the absolute path of a checkpoint, and the parameters given for it alone.

    In a slice, `layer_range` says which of its layers are taken: the first, and one past the last. `importance` is the
    absolute path of a checkpoint of the same tensors, for methods that take one (`fisher`).
    """

    model: str
    parameters: Parameters = field(default_factory=dict)
    layer_range: tuple[int, int] | None = None
    importance: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        layers = None if self.layer_range is None else list(self.layer_range)
        return {"model": self.model} | _given(
            layer_range=layers, importance=self.importance, parameters=_plain(self.parameters)
        )


@dataclass(frozen=True, slots=True)
class SliceSpec:
    """One entry of `slices`: layers of one or several models that become the next layers of the output.

    What is None, or not among `parameters`, is as the module or the whole recipe says.
    """

    sources: tuple[ModelSpec, ...]
    base_model: str | None = None
    merge_method: str | None = None
    parameters: Parameters = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        given = _given(base_model=self.base_model, merge_method=self.merge_method, parameters=_plain(self.parameters))
        return {"sources": [spec.to_dict() for spec in self.sources]} | given


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One entry of `modules`: a tower of a model of several, merged from whole towers or from slices of them."""

    models: tuple[ModelSpec, ...] = ()
    slices: tuple[SliceSpec, ...] = ()
    base_model: str | None = None
    merge_method: str | None = None
    parameters: Parameters = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        listed = _given(
            models=[spec.to_dict() for spec in self.models], slices=[spec.to_dict() for spec in self.slices]
        )
        given = _given(base_model=self.base_model, merge_method=self.merge_method, parameters=_plain(self.parameters))
        return listed | given


@dataclass(frozen=True, slots=True)
class SparsifySpec:
    """How task vectors are thinned before the method sees them; "none" if not at all."""

    method: str
    parameters: Parameters = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        return {"method": self.method} | _plain(self.parameters)


@dataclass(frozen=True, slots=True)
class Rule:
    """Another treatment for the tensors whose name `match` (a regular expression) is found in."""

    match: str
    merge_method: str | None = None
    sparsify: SparsifySpec | None = None
    parameters: Parameters = field(default_factory=dict)

    def applies(self, tensor_name: str) -> bool:
        """Whether the tensor is meant."""
        return re.search(self.match, tensor_name) is not None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        sparsify = None if self.sparsify is None else self.sparsify.to_dict()
        given = _given(merge_method=self.merge_method, sparsify=sparsify, parameters=_plain(self.parameters))
        return {"match": self.match} | given


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole recipe, free of faults.

    Attributes
    ----------
    merge_method : str
    base_model : str or None
        Absolute path.
    models : tuple of ModelSpec
        As listed; the base may be among them. Empty where there are `slices` or `modules`.
    parameters : dict
        Global parameters, and defaults of the per-model ones.
    slices : tuple of SliceSpec
        What the layers of the output are stacked from.
    modules : dict of str to ModuleSpec
        How each tower is made, by name.
    outer : tuple of dict
        Parameters of the scopes around this recipe, the nearest first, where it is a part of another one
        (:mod:`mergepipe.pipeline.parts`).
    sparsify : SparsifySpec or None
        None leaves the method its own trim.
    rules : tuple of Rule
        The first one that applies to a tensor wins.
    dtype, out_dtype : str or None
        "bfloat16" and the like; `output_dtype` says which counts.
    heads : str or None
        "base", "separate", "model:<absolute path>", or None: heads of different shape are an error.
    tokenizer : TokenizerSpec or None
        Which vocabulary the merge has; None keeps the base's, and that of all models must be of one size.
    chat_template : str or None
        "auto", the name of a built-in template, or a template; None keeps the base's.
    notes : tuple of str
        What the recipe says that has no effect here.
    """

    merge_method: str
    models: tuple[ModelSpec, ...]
    base_model: str | None = None
    parameters: Parameters = field(default_factory=dict)
    sparsify: SparsifySpec | None = None
    rules: tuple[Rule, ...] = ()
    dtype: str | None = None
    out_dtype: str | None = None
    seed: int = 0
    heads: str | None = None
    output: str | None = None
    name: str | None = None
    tokenizer: TokenizerSpec | None = None
    chat_template: str | None = None
    scope: str = "tensor"
    notes: tuple[str, ...] = ()
    slices: tuple[SliceSpec, ...] = ()
    modules: dict[str, ModuleSpec] = field(default_factory=dict)
    outer: tuple[Parameters, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """The checkpoints a merge opens, each once: the base first if there is one, then the models in order."""
        paths = [self.base_model, *(spec.model for spec in self.models), *_paths_in(self.slices)]
        for module in self.modules.values():
            paths += [module.base_model, *(spec.model for spec in module.models), *_paths_in(module.slices)]
        return tuple(dict.fromkeys(path for path in paths if path is not None))

    @property
    def shared(self) -> tuple[Parameters, ...]:
        """Where a parameter is looked for that is given for no model alone, the nearest scope first."""
        return (self.parameters, *self.outer)

    @property
    def inputs(self) -> tuple[str, ...]:
        """All checkpoints that are read: the sources, then the importances of those models that have some."""
        importances = (spec.importance for spec in self.listed if spec.importance is not None)
        return tuple(dict.fromkeys([*self.sources, *importances]))

    @property
    def listed(self) -> tuple[ModelSpec, ...]:
        """Every entry that says what is merged: of `models`, of the slices, of the modules and of their slices."""
        slices = [*self.slices, *(one for module in self.modules.values() for one in module.slices)]
        whole = [*self.models, *(spec for module in self.modules.values() for spec in module.models)]
        return (*whole, *(spec for one in slices for spec in one.sources))

    @property
    def experts(self) -> tuple[ModelSpec, ...]:
        """The models that are merged: without the base where the method takes deltas to it or has it as primary."""
        return self._experts_for(self.merge_method)

    @property
    def output_dtype(self) -> str | None:
        """The type every merged tensor is written in; None keeps each tensor's own."""
        return self.out_dtype or self.dtype

    def rule_for(self, tensor_name: str) -> Rule | None:
        """The rule that applies to a tensor, if any."""
        return next((rule for rule in self.rules if rule.applies(tensor_name)), None)

    def method_for(self, tensor_name: str) -> str:
        """Name of the method that merges a tensor."""
        rule = self.rule_for(tensor_name)
        return self.merge_method if rule is None or rule.merge_method is None else rule.merge_method

    def experts_for(self, tensor_name: str) -> tuple[ModelSpec, ...]:
        """The models merged into a tensor, in order; for a tensor that a rule passes through, the first source."""
        rule = self.rule_for(tensor_name)
        if rule is None or rule.merge_method is None:
            return self.experts
        if rule.merge_method == "passthrough":
            first = self.sources[0]
            return (next((spec for spec in self.models if spec.model == first), ModelSpec(first)),)
        return self._experts_for(rule.merge_method)

    def _experts_for(self, method_name: str) -> tuple[ModelSpec, ...]:
        from mergepipe.tasks.registry import METHODS

        if METHODS[method_name].base == "ignored" and METHODS[self.merge_method].base == "ignored":
            return self.models
        return tuple(spec for spec in self.models if spec.model != self.base_model)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain values, absolute paths and defaults filled in: what is hashed and shown.

        Parsing it again gives an equal recipe, but for `notes`.
        """
        plain: dict[str, Any] = {"merge_method": self.merge_method}
        plain |= _given(base_model=self.base_model)
        if self.slices:
            plain["slices"] = [spec.to_dict() for spec in self.slices]
        elif self.modules:
            plain["modules"] = {name: module.to_dict() for name, module in self.modules.items()}
        else:
            plain["models"] = [spec.to_dict() for spec in self.models]
        plain |= _given(parameters=_plain(self.parameters))
        plain |= _given(sparsify=None if self.sparsify is None else self.sparsify.to_dict())
        plain |= _given(rules=[rule.to_dict() for rule in self.rules])
        plain |= _given(dtype=self.dtype, out_dtype=self.out_dtype, heads=self.heads)
        plain |= {} if self.tokenizer is None else self.tokenizer.to_dict()
        plain |= _given(chat_template=self.chat_template)
        plain |= {"scope": self.scope, "seed": self.seed}
        return plain | _given(output=self.output, name=self.name)


@dataclass(frozen=True, slots=True)
class TensorSettings:
    """What a recipe asks for one tensor: every parameter of its method, resolved and of its proper type.

    Attributes
    ----------
    method : str
    params : dict
        The method's global parameters.
    model_params : tuple of dict
        Its per-model parameters, one dict per model of `Recipe.experts_for`, in order.
    sparsify : str
        The sparsifier that runs first: the recipe's, else the method's own trim, else "none".
    sparsify_params : tuple of dict
        Its parameters, one dict per model; empty for "none".
    scope : {'tensor', 'model'}
        Where thresholds are taken; "model" only for a method or a sparsifier that can do so.
    """

    method: str
    params: dict[str, Any]
    model_params: tuple[dict[str, Any], ...]
    sparsify: str = "none"
    sparsify_params: tuple[dict[str, Any], ...] = ()
    scope: str = "tensor"


def load_recipe(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    relative_to: str | os.PathLike[str] | None = None,
    faults: Faults = FIRST,
) -> Recipe:
    """Read a recipe file.

    Parameters
    ----------
    path : path
        A YAML file of at most 1 MiB.
    overrides : sequence of str
        As of `--set`: ``"parameters.lambda=0.5"``; see :func:`apply_overrides`.
    relative_to : path, optional
        What relative paths in the recipe start from; default: the current folder.
    faults : Faults, optional
        Takes in the faults; where it keeps them, the recipe comes back without the parts that are at fault, good for
        looking at its checkpoints and nothing else.

    Raises
    ------
    RecipeError
        With all faults, if the file is missing, is no safe YAML, or says anything that makes no sense.
    UsageError
        If an override does not fit the recipe.
    """
    document = load_document(Path(path))
    return parse_recipe(apply_overrides(document, overrides), str(path), relative_to=relative_to, faults=faults)


def parse_recipe(
    recipe: str | Mapping[str, Any],
    where: str = "recipe",
    *,
    relative_to: str | os.PathLike[str] | None = None,
    faults: Faults = FIRST,
) -> Recipe:
    """Check a recipe given as YAML text or as plain values.

    Parameters
    ----------
    recipe : str or mapping
    where : str
        What to call it in messages.
    relative_to : path, optional
        What relative paths in the recipe start from; default: the current folder.
    faults : Faults, optional
        As for :func:`load_recipe`.

    Raises
    ------
    RecipeError
        With all faults at once.
    """
    from mergepipe.pipeline.parsing import RecipeParser

    document = read_document(recipe, where) if isinstance(recipe, str) else dict(recipe)
    return RecipeParser(os.path.abspath(relative_to or os.curdir)).parse(document, faults)


def settings(
    recipe: Recipe,
    tensor_name: str,
    n_layers: int,
    *,
    layer: int | Missing | None = MISSING,
    names: Sequence[str] = (),
) -> TensorSettings:
    """What the recipe asks for one tensor.

    A value is looked for in the rule that applies, at the model, under the global parameters, and is the default else.

    Parameters
    ----------
    recipe : Recipe
    tensor_name : str
    n_layers : int
        Layers in the tensor's stack (:func:`mergepipe.pipeline.values.n_layers_of`) or slice, for gradients.
    layer : int or None, optional
        Which of them it belongs to, None for none; by default as its name says.
    names : sequence of str, optional
        What the tensor is called in each model of `recipe.experts_for(tensor_name)`: what filters of the values for
        one model look at. By default its own name.

    Raises
    ------
    RecipeError
        If a parameter without a default has no value for this tensor, or an interpolated one is out of bounds.
    """
    position = layer_of(tensor_name) if isinstance(layer, Missing) else layer
    return _Resolver(recipe, tensor_name, position, n_layers, names).settings()


class _Resolver:
    """Looks the parameters of one tensor up."""

    def __init__(
        self, recipe: Recipe, tensor_name: str, layer: int | None, n_layers: int, names: Sequence[str]
    ) -> None:
        from mergepipe.tasks.registry import METHODS

        self.recipe = recipe
        self.name = tensor_name
        self.layer = layer
        self.n_layers = n_layers
        self.rule = recipe.rule_for(tensor_name)
        self.method: MergeMethod = METHODS[recipe.method_for(tensor_name)]
        experts = recipe.experts_for(tensor_name)
        self.experts = tuple(zip(experts, names or [tensor_name] * len(experts), strict=True))

    def settings(self) -> TensorSettings:
        from mergepipe.tasks.registry import SPARSIFIERS

        parameters = [parameter for parameter in self.method.parameters if not parameter.without_effect]
        params = {p.name: self._value(p, None) for p in parameters if not p.per_model}
        stood_in = {p.name: p.stand_in[2] for p in parameters if p.stand_in and params[p.stand_in[0]] == p.stand_in[1]}
        own = [p for p in parameters if p.per_model and p.name not in stood_in]
        model_params = tuple({**stood_in, **{p.name: self._value(p, expert) for p in own}} for expert in self.experts)
        sparsify, sparsify_params = self._sparsify()
        can = self.recipe.scope in {*self.method.scopes, *(SPARSIFIERS[sparsify].scopes)}
        scope = self.recipe.scope if can else "tensor"
        return TensorSettings(self.method.name, params, model_params, sparsify, sparsify_params, scope)

    def _sparsify(self) -> tuple[str, tuple[dict[str, Any], ...]]:
        from mergepipe.tasks.registry import SPARSIFIERS

        asked = sparsify_of(self.recipe, self.rule, self.method)
        name = self.method.trim if asked is None else asked.method
        if name == "none":
            return name, ()
        sparsifier = SPARSIFIERS[name]
        given = {} if asked is None else asked.parameters
        shared = shared_parameters(self.method, sparsifier, own_trim=asked is None)
        return name, tuple(
            {
                p.name: self._checked(p, self._first(p.name, expert, given, fall_back=p.name in shared))
                for p in sparsifier.parameters
            }
            for expert in self.experts
        )

    def _value(self, parameter: Parameter, expert: tuple[ModelSpec, str] | None) -> Any:
        return self._checked(parameter, self._first(parameter.name, expert, {}, fall_back=True))

    def _first(
        self, name: str, expert: tuple[ModelSpec, str] | None, given: Parameters, *, fall_back: bool
    ) -> Scalar | Missing:
        """The first value there is, looked for at the rule, the model, the slice, the module and the whole recipe."""
        scopes: list[Mapping[str, ValueSpec]] = [given]
        if fall_back:
            scopes += [self.rule.parameters] if self.rule is not None else []
            scopes += [expert[0].parameters] if expert is not None else []
            scopes += self.recipe.shared
        called = self.name if expert is None else expert[1]
        for scope in scopes:
            value = resolve(scope.get(name, MISSING), called, self.layer, self.n_layers)
            if not isinstance(value, Missing):
                return value
        return MISSING

    def _checked(self, parameter: Parameter, value: Scalar | Missing) -> Any:
        path = f"$.parameters.{parameter.name}"
        if isinstance(value, Missing):
            if parameter.default is not REQUIRED:
                return parameter.default
            raise RecipeError([Fault(path, f"no value for tensor '{self.name}': add an entry without a filter")])
        try:
            return parameter.check(value)
        except ValueError as error:
            raise RecipeError([Fault(path, f"for tensor '{self.name}': {error}")]) from None


def sparsify_of(recipe: Recipe, rule: Rule | None, method: MergeMethod) -> SparsifySpec | None:
    """What the recipe asks to run before `method`; None leaves the method its own trim."""
    if rule is not None and rule.sparsify is not None:
        return rule.sparsify
    return recipe.sparsify if method.space == "deltas" else None


def shared_parameters(method: MergeMethod, sparsifier: Sparsifier, *, own_trim: bool) -> frozenset[str]:
    """Parameters of a sparsifier that are also looked for under `parameters`.

    A method's own trim takes all that the method declares; a sparsifier that the recipe names takes its own under
    `sparsify`, and only a `density`, the one that mergekit's recipes give per model, from there too; unless the method
    itself thins by it, after the sparsifier.
    """
    names = {parameter.name for parameter in sparsifier.parameters}
    if own_trim:
        return frozenset(names & {parameter.name for parameter in method.parameters})
    return frozenset() if thins_by_density(method) else frozenset(names & {"density"})


def thins_by_density(method: MergeMethod) -> bool:
    """Whether a method does a thinning of its own that no sparsifier replaces, as `dare_ties` does."""
    own = method.parameter("density")
    return method.trim == "none" and own is not None and not own.without_effect


def _paths_in(slices: Sequence[SliceSpec]) -> list[str | None]:
    """The checkpoints that slices name, base first in each."""
    return [path for one in slices for path in (one.base_model, *(spec.model for spec in one.sources))]


def _plain(parameters: Parameters) -> dict[str, Any]:
    return {name: to_plain(parameters[name]) for name in sorted(parameters)}


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value not in (None, {}, [])}
