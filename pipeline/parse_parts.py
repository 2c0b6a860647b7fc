"""Parsing `slices` and `modules`: recipes that are merged in parts."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergepipe.pipeline.parse_values import ValueParser
from mergepipe.pipeline.recipe import ModelSpec, ModuleSpec, SliceSpec, SparsifySpec
from mergepipe.pipeline.scope import Scope
from mergepipe.tasks.method import MergeMethod

Entry = tuple[str, Mapping[str, Any], str]
"""Path in the recipe, entry and checkpoint of a model."""

SOURCE_KEYS = ("model", "layer_range", "importance", "parameters")
SLICE_KEYS = ("sources", "base_model", "merge_method", "parameters", "residual_weight")
MODULE_KEYS = ("models", "slices", "base_model", "merge_method", "parameters")

MAX_LAYERS = 100_000
"""More layers than any model has."""


class PartsParser(ValueParser):
    """Parses slices and modules."""

    @abstractmethod
    def _reference(self, raw: object, path: str) -> str | None:
        """The absolute path of a checkpoint."""

    @abstractmethod
    def _method(self, raw: object, path: str) -> MergeMethod | None:
        """The method of a name."""

    @abstractmethod
    def _raw_models(self, document: Mapping[str, Any], at: str = "$") -> list[Entry]:
        """The models that are listed in a recipe or a module."""

    @abstractmethod
    def _models(
        self, entries: list[Entry], scopes: list[Scope], base: str | None, host: MergeMethod | None
    ) -> tuple[ModelSpec, ...]:
        """The same, with their parameters."""

    # -- which parts there are

    def _form(self, document: Mapping[str, Any]) -> str:
        """Which of `models`, `slices` and `modules` says what is merged."""
        given = [key for key in ("slices", "modules") if document.get(key) is not None]
        if document.get("models") is not None and given:
            given.insert(0, "models")
        if len(given) > 1:
            self._fault(
                f"$.{given[1]}", f"can't stand beside `{given[0]}`: a recipe has one of models, slices, modules"
            )
        return given[0] if given else "models"

    def _part_scopes(
        self, document: Mapping[str, Any], form: str, host: MergeMethod | None, sparsify: SparsifySpec | None
    ) -> list[Scope]:
        """How each part treats its tensors; one scope for a recipe of whole models."""
        if form == "models":
            return [] if host is None else [Scope("$", host, sparsify)]
        scopes = []
        for path, listing, own in self._places(document, form):
            method = host if own is None else self._known(own)
            if method is not None:
                asked = sparsify if own is None or method.space == "deltas" else None
                scopes.append(Scope(path, method, asked, listing=listing))
        return scopes

    @staticmethod
    def _known(name: object) -> MergeMethod | None:
        from mergepipe.tasks.registry import METHODS

        return METHODS.get(name) if isinstance(name, str) else None

    @staticmethod
    def _places(document: Mapping[str, Any], form: str) -> Iterator[tuple[str, str, object]]:
        """Path of each part, of the list of its models, and its own method, if it names one."""
        towers = document.get("modules") if form == "modules" else {"": document}
        for name, tower in towers.items() if isinstance(towers, Mapping) else ():
            if not isinstance(tower, Mapping):
                continue
            at, own = (f"$.modules.{name}", tower.get("merge_method")) if name else ("$", None)
            slices = tower.get("slices")
            if slices is None:
                yield at, f"{at}.models", own
            for index, one in enumerate(slices if isinstance(slices, list | tuple) else ()):
                if isinstance(one, Mapping):
                    path = f"{at}.slices[{index}]"
                    yield path, f"{path}.sources", one.get("merge_method") or own

    # -- their contents

    def _slices(self, raw: object, path: str, scopes: list[Scope], base: str | None) -> tuple[SliceSpec, ...]:
        """The slices of a recipe or a module, `path` being theirs."""
        items = self._list(raw, path)
        if not items and isinstance(raw, list | tuple):
            self._fault(path, "is empty: list at least one slice, each with `sources`")
        found = [self._slice(item, f"{path}[{index}]", scopes, base) for index, item in enumerate(items)]
        slices = tuple(one for one in found if one is not None)
        counts = [_layers(one) for one in slices]
        if (
            slices
            and all(spec.layer_range for one in slices for spec in one.sources or (ModelSpec(""),))
            and not any(counts)
        ):
            self._fault(path, "makes a model without a layer: every `layer_range` is empty")
        for index, count in enumerate(counts[1:-1], start=1):
            if count == 0 and slices[index].sources:
                self._note(f"`{path}[{index}]` is empty and has no effect")
        return slices

    def _slice(self, raw: object, path: str, scopes: list[Scope], base: str | None) -> SliceSpec | None:
        if not isinstance(raw, Mapping):
            self._fault(path, f"expected a mapping with `sources`, found {raw!r}")
            return None
        self._unknown_keys(raw, path, SLICE_KEYS)
        if raw.get("residual_weight") is not None:
            self._note("`residual_weight` has no effect, nor has it in mergekit")
        own_base, method = self._own(raw, path)
        here = _reaching(scopes, path)
        sources = self._sources(raw.get("sources"), f"{path}.sources", here, own_base or base)
        parameters = self._parameters(raw.get("parameters"), f"{path}.parameters", here)
        return SliceSpec(sources, own_base, method, parameters)

    def _own(self, raw: Mapping[str, Any], path: str) -> tuple[str | None, str | None]:
        """The base and the method that a part names for itself."""
        base, method = raw.get("base_model"), raw.get("merge_method")
        found = None if method is None else self._method(method, f"{path}.merge_method")
        reference = None if base is None else self._reference(base, f"{path}.base_model")
        return reference, None if found is None else found.name

    def _sources(self, raw: object, path: str, scopes: list[Scope], base: str | None) -> tuple[ModelSpec, ...]:
        items = self._list(raw, path)
        if not items and (raw is None or isinstance(raw, list | tuple)):
            self._fault(path, "is missing or empty: list what the slice is made from, as {model, layer_range}")
        specs: list[ModelSpec] = []
        seen: dict[str, int] = {}
        for index, item in enumerate(items):
            spec = self._source(item, f"{path}[{index}]", scopes, base)
            if spec is None:
                continue
            first = seen.setdefault(os.path.realpath(spec.model), index)
            if first != index:
                message = f"{spec.model} is a source already, at {path}[{first}]: give it a slice of its own"
                self._fault(f"{path}[{index}].model", message)
            specs.append(spec)
        ranges = [spec.layer_range for spec in specs if spec.layer_range is not None]
        if len({stop - start for start, stop in ranges}) > 1:
            counted = ", ".join(
                f"{stop - start} of {s.model}" for s in specs if s.layer_range for start, stop in [s.layer_range]
            )
            self._fault(path, f"take different numbers of layers: {counted}; all sources of a slice need the same")
        return tuple(specs)

    def _source(self, raw: object, path: str, scopes: list[Scope], base: str | None) -> ModelSpec | None:
        if not isinstance(raw, Mapping) or "model" not in raw:
            self._fault(path, f"expected a mapping with `model` and `layer_range`, found {raw!r}")
            return None
        self._unknown_keys(raw, path, SOURCE_KEYS)
        model = self._reference(raw["model"], f"{path}.model")
        layers = self._layer_range(raw.get("layer_range"), f"{path}.layer_range")
        if model is not None and base is not None and os.path.realpath(model) == os.path.realpath(base):
            model = base
        parameters = self._parameters(raw.get("parameters"), f"{path}.parameters", scopes, one_model=True)
        if parameters and model == base and scopes and scopes[0].method.base != "ignored":
            message = f"this is the base of {scopes[0].method.name}, no expert, and takes no parameters: drop them"
            self._fault(f"{path}.parameters", message)
        raw_importance = raw.get("importance")
        importance = None if raw_importance is None else self._reference(raw_importance, f"{path}.importance")
        return None if model is None else ModelSpec(model, parameters, layers, importance)

    def _layer_range(self, raw: object, path: str) -> tuple[int, int] | None:
        numbers = list(raw) if isinstance(raw, list | tuple) else []
        whole = [n for n in numbers if isinstance(n, int) and not isinstance(n, bool)]
        if len(numbers) == len(whole) == 2 and 0 <= whole[0] <= whole[1] <= MAX_LAYERS:
            return whole[0], whole[1]
        expected = "expected [first, end], two whole numbers from 0, the end not included and not before the first"
        self._fault(path, "is missing: " + expected if raw is None else f"{expected}; found {raw!r}")
        return None

    def _modules(
        self, raw: object, scopes: list[Scope], base: str | None, host: MergeMethod | None
    ) -> dict[str, ModuleSpec]:
        modules = {}
        towers = self._mapping(raw, "$.modules")
        if not towers and isinstance(raw, Mapping):
            self._fault("$.modules", "is empty: name at least one tower, such as `text_decoder`")
        for name, tower in towers.items():
            path = f"$.modules.{name}"
            if not isinstance(tower, Mapping):
                self._fault(path, f"expected a mapping with `models` or `slices`, found {tower!r}")
                continue
            modules[name] = self._module(tower, path, scopes, base, host)
        return modules

    def _module(
        self,
        raw: Mapping[str, Any],
        path: str,
        scopes: list[Scope],
        base: str | None,
        host: MergeMethod | None,
    ) -> ModuleSpec:
        self._unknown_keys(raw, path, MODULE_KEYS)
        own_base, name = self._own(raw, path)
        method = host if name is None else self._known(name)
        inside = [scope for scope in scopes if scope.rule is not None or scope.path.startswith(path)]
        parameters = self._parameters(raw.get("parameters"), f"{path}.parameters", inside)
        models: tuple[ModelSpec, ...] = ()
        slices: tuple[SliceSpec, ...] = ()
        if raw.get("slices") is not None:
            if raw.get("models") is not None:
                self._fault(f"{path}.slices", "can't stand beside `models`: a module has one of the two")
            slices = self._slices(raw["slices"], f"{path}.slices", scopes, own_base or base)
        else:
            models = self._models(self._raw_models(raw, path), _reaching(scopes, path), own_base or base, method)
        return ModuleSpec(models, slices, own_base, name, parameters)


def _reaching(scopes: Sequence[Scope], path: str) -> list[Scope]:
    """The scope of one part, and those of all rules."""
    return [scope for scope in scopes if scope.rule is not None or scope.path == path]


def _layers(one: SliceSpec) -> int:
    return max((spec.layer_range[1] - spec.layer_range[0] for spec in one.sources if spec.layer_range), default=0)
