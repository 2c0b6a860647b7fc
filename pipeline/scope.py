"""The ways in which one recipe treats tensors: its own, and that of each rule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergepipe.errors import Fault
from mergepipe.pipeline.recipe import (
    ModelSpec,
    Recipe,
    Rule,
    SparsifySpec,
    shared_parameters,
    sparsify_of,
    thins_by_density,
)
from mergepipe.tasks.method import MergeMethod, Sparsifier
from mergepipe.tasks.parameter import REQUIRED, Parameter

if TYPE_CHECKING:
    from mergepipe.pipeline.align import Alignment


@dataclass(frozen=True, slots=True)
class Scope:
    """One way in which a recipe treats tensors: its own, that of one of its parts, or that of a rule.

    `asked` is the sparsifier that the recipe names for it; None leaves the method its own trim. `listing` is where its
    models stand.
    """

    path: str
    method: MergeMethod
    asked: SparsifySpec | None
    sparsify_path: str = "$.sparsify"
    rule: Rule | None = None
    listing: str = "$.models"

    @property
    def sparsifier(self) -> Sparsifier | None:
        """The sparsifier that `asked` names; None for "none" and where nothing is asked."""
        from mergepipe.tasks.registry import SPARSIFIERS

        return None if self.asked is None else SPARSIFIERS.get(self.asked.method)

    def takes(self, scope: str) -> bool:
        """Whether thresholds can be taken over a tensor, or the whole model."""
        from mergepipe.tasks.registry import SPARSIFIERS

        name = self.method.trim if self.asked is None else self.asked.method
        return scope in self.method.scopes or (name in SPARSIFIERS and scope in SPARSIFIERS[name].scopes)

    @property
    def thinning(self) -> str:
        """The method and what thins for it, in words."""
        name = self.method.trim if self.asked is None else self.asked.method
        return self.method.name if name == "none" else f"{self.method.name} with the sparsifier {name}"

    def shared(self) -> dict[str, Parameter]:
        """Parameters of the named sparsifier that are given under `parameters`."""
        if self.asked is None or self.sparsifier is None:
            return {}
        names = shared_parameters(self.method, self.sparsifier, own_trim=False) - set(self.asked.parameters)
        return {p.name: p for p in self.sparsifier.parameters if p.name in names}

    def declared(self, name: str) -> Parameter | None:
        """The parameter `name` of this scope; the sparsifier's, where both have it."""
        return self.shared().get(name) or self.method.parameter(name)

    def names(self) -> set[str]:
        """Every parameter there is."""
        return {p.name for p in self.method.parameters} | set(self.shared())

    def uses(self, name: str) -> bool:
        """Whether a parameter given under `parameters` changes anything: not if it is that of a trim replaced."""
        from mergepipe.tasks.registry import SPARSIFIERS

        own = self.method.parameter(name)
        has_own = own is not None and not own.without_effect
        if name in self.shared():
            return True
        if self.asked is None or self.method.trim == "none":
            return has_own
        return has_own and name not in {p.name for p in SPARSIFIERS[self.method.trim].parameters}

    def experts(self, recipe: Recipe) -> list[tuple[str, ModelSpec]]:
        """The models that are merged, each with its path in the recipe."""
        listed = [(f"{self.listing}[{index}]", spec) for index, spec in enumerate(recipe.models)]
        if self.rule is not None and self.rule.merge_method == "passthrough":
            return listed[:1]
        everyone = self.method.base == "ignored" and recipe.experts == recipe.models
        return [(path, spec) for path, spec in listed if everyone or spec.model != recipe.base_model]

    def faults(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Path and message of whatever a plain recipe, treated in this way, does wrong as a whole."""
        found = []
        baseless = self.method.base == "optional" and recipe.base_model is None
        if (message := self.idle_sparsifier(baseless=baseless)) is not None:
            found.append((self.sparsify_path, message))
        if self.method.base in ("required", "primary") and recipe.base_model is None:
            return [*found, ("$.base_model", f"is missing: {self.method.name} needs one")]
        if (count := self.count_fault(len(self.experts(recipe)))) is not None:
            found.append((self.listing if self.rule is None else f"{self.path}.merge_method", count))
        found += self.lacking_importance(recipe)
        return found + (self.without_effect(recipe) if self.rule is None else []) + self.lacking(recipe)

    def idle_sparsifier(self, *, baseless: bool) -> str | None:
        """What to say of a sparsifier where there is no task vector to thin."""
        if self.asked is None or (self.method.space == "deltas" and not baseless):
            return None
        message = f"{self.method.name} merges weights, there is no task vector to thin: leave `sparsify` out"
        return message + (" or name a `base_model`" if baseless else "")

    def count_fault(self, found: int) -> str | None:
        """What is wrong with merging `found` models, if anything."""
        low, high = self.method.min_models, self.method.max_models
        if low <= found and (high is None or found <= high):
            return None
        takes = f"exactly {low}" if low == high else f"at least {low}" if high is None else f"{low} to {high}"
        rest = "" if self.method.base == "ignored" else ", the base not counted"
        return f"{self.method.name} takes {takes} {'model' if low == high == 1 else 'models'}{rest}; found {found}"

    def stands_in(self, parameter: Parameter, recipe: Recipe) -> bool:
        """Whether another parameter says that this one is not to be given."""
        if parameter.stand_in is None:
            return False
        name, choice, _ = parameter.stand_in
        own = {} if self.rule is None else self.rule.parameters
        return next((scope[name] for scope in (own, *recipe.shared) if name in scope), None) == choice

    def without_effect(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Path and message for each parameter that is given although another one takes its place."""
        faults = []
        for p in self.method.parameters:
            if not self.stands_in(p, recipe) or p.stand_in is None:
                continue
            given = [(self.path, recipe.parameters), *((path, spec.parameters) for path, spec in self.experts(recipe))]
            message = f"has no effect with `{p.stand_in[0]}: {p.stand_in[1]}`: leave one of the two out"
            faults += [(f"{path}.parameters.{p.name}", message) for path, parameters in given if p.name in parameters]
        return faults

    def lacking_importance(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Path and message for each model without the importances that the method needs."""
        if not self.method.importance:
            return []
        message = (
            f"is missing: {self.method.name} needs a checkpoint of importances (`importance: FOLDER`) at each model"
        )
        return [(f"{path}.importance", message) for path, spec in self.experts(recipe) if spec.importance is None]

    def lacking(self, recipe: Recipe) -> list[tuple[str, str]]:
        """Path and message for each parameter without a default that is given nowhere.

        Whether the filters of one that is given match is seen tensor by tensor.
        """
        everywhere = set().union(*recipe.shared, {} if self.rule is None else self.rule.parameters)
        faults = []
        for p in self.method.parameters:
            if p.default is not REQUIRED or p.without_effect or p.name in everywhere or self.stands_in(p, recipe):
                continue
            models = [(path, p.name in spec.parameters) for path, spec in self.experts(recipe)]
            if p.per_model and any(given for _, given in models):
                message = f"is missing: {self.method.name} needs it for every model; {p.doc}"
                faults += [(f"{path}.parameters.{p.name}", message) for path, given in models if not given]
            else:
                where = " here for all models, or at each model" if p.per_model else ""
                message = f"is missing: {self.method.name} needs {p.expected}{where}; {p.doc}"
                faults.append((f"{self.path}.parameters.{p.name}", message))
        return faults + self._lacking_of_sparsifier(recipe, everywhere)

    def _lacking_of_sparsifier(self, recipe: Recipe, everywhere: set[str]) -> list[tuple[str, str]]:
        if self.asked is None or self.sparsifier is None:
            return []
        experts = self.experts(recipe)
        given = set(self.asked.parameters)
        takes_density = any(p.name == "density" for p in self.sparsifier.parameters)
        if takes_density and "density" not in given and thins_by_density(self.method):
            message = (
                f"is missing: {self.method.name} takes the density under `parameters` for its own thinning, which "
                f"comes after that of {self.asked.method}"
            )
            return [(f"{self.sparsify_path}.density", message)]
        given |= {
            name for name in self.shared() if name in everywhere or all(name in spec.parameters for _, spec in experts)
        }
        return [
            (f"{self.sparsify_path}.{p.name}", f"is missing: {self.asked.method} needs {p.expected}; {p.doc}")
            for p in self.sparsifier.parameters
            if p.default is REQUIRED and p.name not in given
        ]

    def replaced(self, name: str) -> str:
        """What to say of a parameter that :meth:`uses` denies any effect where a sparsifier is asked for."""
        asked = "none" if self.asked is None else self.asked.method
        role = f"replaces the trim of {self.method.name}" if self.method.trim != "none" else "decides what is kept"
        return f"has no effect, `sparsify: {asked}` {role}: leave {name} out, or leave `sparsify` out"


def rule_faults(alignment: Alignment) -> list[Fault]:
    """What rules do wrong where they reach: in a recipe of several parts that is known with the tensors only."""
    from mergepipe.tasks.registry import METHODS

    if len(alignment.views) < 2:
        return []
    found: dict[tuple[int, int], list[tuple[str, str]]] = {}
    for tensor in alignment.tensors:
        part = alignment.views[tensor.part].part
        rule = part.recipe.rule_for(tensor.name)
        if rule is None or (tensor.part, id(rule)) in found:
            continue
        method = METHODS[part.recipe.method_for(tensor.name)]
        asked = sparsify_of(part.recipe, rule, method)
        at = f"$.rules[{next(number for number, one in enumerate(part.recipe.rules) if one is rule)}]"
        scope = Scope(at, method, asked, "$.sparsify", rule, part.listing)
        found[tensor.part, id(rule)] = [
            (path, f"for '{tensor.name}': {text}") for path, text in scope.faults(part.recipe)
        ]
    return [Fault(path, text) for faults in found.values() for path, text in faults]
