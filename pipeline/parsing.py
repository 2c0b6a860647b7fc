"""From plain values to a :class:`~mergepipe.pipeline.recipe.Recipe`: strict, and with all faults at once.

A parser never stops at the first fault: what can't be used is noted and left out, and only at the end is the recipe
made or the lot of them raised. Checks that need a part that is itself at fault are skipped, so that one mistake is
reported once.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mergepipe.errors import Fault, RecipeError
from mergepipe.pipeline.recipe import ModelSpec, Parameters, Recipe, Rule, SparsifySpec
from mergepipe.pipeline.scope import Scope
from mergepipe.pipeline.values import MISSING, Filtered, FilterEntry, Gradient, Missing, Scalar, ValueSpec
from mergepipe.tasks.method import MergeMethod, Parameter

MAX_FAULTS = 50
MAX_MESSAGE = 400

KEYS = (
    *("merge_method", "base_model", "models", "parameters", "sparsify", "scope", "rules", "dtype", "out_dtype"),
    *("tokenizer_source", "chat_template", "seed", "heads", "output", "name"),
)

NOT_MERGED = {
    "slices": "this version does not stack layers: it merges whole models, listed under `models`",
    "modules": "this version does not merge the modules of a model one by one: list whole models under `models`",
    "tokenizer": "this version does not merge vocabularies: it copies the base's tokenizer (`tokenizer_source: base`)",
    "outputs": "this version writes one output per run: give each its own recipe",
}
"""Keys that the dialect has and this version refuses, with the reason."""

MERGEKIT_METHODS = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock"),
    *("nearswap", "arcee_fusion", "passthrough"),
)
"""Names that are no slip of the pen, whether or not there is such a method here."""


def nearest(word: str, known: Iterable[str]) -> str:
    """``: did you mean 'x'?``, or the list of what there is.

    Examples
    --------
    >>> nearest("densty", ["weight", "density"]), nearest("?", ["a", "b"])
    ("did you mean 'density'?", 'there is a, b')
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"there is {', '.join(known)}" if known else "there is none"


class RecipeParser:
    """Parses one recipe; relative paths start from the absolute path `root`."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.faults: list[Fault] = []
        self.notes: dict[str, None] = {}

    def parse(self, document: Mapping[str, Any]) -> Recipe:
        """The recipe that a document describes.

        Raises
        ------
        RecipeError
            With all faults.
        """
        self._unknown_keys(document, "$", KEYS, NOT_MERGED)
        method = self._method(document.get("merge_method"), "$.merge_method")
        base = self._optional(document, "base_model", self._reference)
        raw_models = self._raw_models(document)
        sparsify = self._sparsify(document.get("sparsify"), "$.sparsify")
        scopes = [] if method is None else [Scope("$", method, sparsify)]
        rules = self._rules(document.get("rules"), method, sparsify, scopes)
        models = self._models(raw_models, scopes, base)
        parameters = self._parameters(document.get("parameters"), "$.parameters", scopes)
        plain = self._plain_keys(document, [base, *(model.model for model in models)])
        self._raise()
        assert method is not None  # or its fault has just been raised
        fields = plain | {"base_model": base, "parameters": parameters, "sparsify": sparsify, "rules": rules}
        recipe = Recipe(method.name, models, **fields, notes=tuple(self.notes))
        self._check_whole(recipe, scopes)
        self._raise()
        return recipe

    # -- faults

    def _fault(self, path: str, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + " …"
        self.faults.append(Fault(path, message))

    def _raise(self) -> None:
        if not self.faults:
            return
        more = len(self.faults) - MAX_FAULTS
        shown = self.faults[:MAX_FAULTS]
        raise RecipeError([*shown, Fault("$", f"and {more} more faults")] if more > 0 else shown)

    def _unknown_keys(
        self, mapping: Mapping[Any, Any], path: str, known: Iterable[str], refused: Mapping[str, str] | None = None
    ) -> None:
        refused = refused or {}
        for key in mapping:
            if key in refused:
                self._fault(f"{path}.{key}", refused[key])
            elif key not in known:
                self._fault(f"{path}.{key}", f"is no key that belongs here; {nearest(str(key), known)}")

    def _mapping(self, raw: object, path: str) -> Mapping[str, Any]:
        """`raw` if it is a mapping; else an empty one, and a fault unless it is not given."""
        if isinstance(raw, Mapping):
            return raw
        if raw is not None:
            self._fault(path, f"expected a mapping, found {raw!r}")
        return {}

    def _list(self, raw: object, path: str) -> list[Any]:
        if isinstance(raw, list | tuple):
            return list(raw)
        if raw is not None:
            self._fault(path, f"expected a list, found {raw!r}")
        return []

    # -- the plain keys

    def _optional(
        self, document: Mapping[str, Any], key: str, parse: Callable[[object, str], str | None]
    ) -> str | None:
        raw = document.get(key)
        return None if raw is None else parse(raw, f"$.{key}")

    def _plain_keys(self, document: Mapping[str, Any], models: list[str | None]) -> dict[str, Any]:
        return {
            "dtype": self._optional(document, "dtype", self._dtype),
            "out_dtype": self._optional(document, "out_dtype", self._dtype),
            "seed": self._seed(document.get("seed", 0)),
            "heads": self._optional(document, "heads", lambda raw, path: self._heads(raw, path, models)),
            "output": self._optional(document, "output", self._path),
            "name": self._optional(document, "name", self._text),
            "scope": self._scope(document.get("scope", "tensor")),
            "tokenizer_source": self._one_of(
                document, "tokenizer_source", "base", "this version copies the base's tokenizer"
            ),
            "chat_template": self._one_of(document, "chat_template", "auto", "this version copies the base's template"),
        }

    def _one_of(self, document: Mapping[str, Any], key: str, only: str, reason: str) -> str | None:
        raw = document.get(key)
        if raw is not None and raw != only:
            self._fault(f"$.{key}", f"expected '{only}', found {raw!r}: {reason}")
        return None if raw is None else only

    def _dtype(self, raw: object, path: str) -> str | None:
        from mergepipe.storage.dtypes import MERGED_ALIASES

        if isinstance(raw, str) and raw in MERGED_ALIASES:
            return raw
        self._fault(path, f"{raw!r} is no type that weights are written in; {nearest(str(raw), MERGED_ALIASES)}")
        return None

    def _scope(self, raw: object) -> str:
        if raw not in ("tensor", "model"):
            self._fault("$.scope", f"expected tensor or model, found {raw!r}: where thresholds are taken")
        return str(raw)

    def _seed(self, raw: object) -> int:
        if isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < 1 << 64:
            return raw
        self._fault("$.seed", f"expected a whole number from 0 to 2^64 - 1, found {raw!r}")
        return 0

    def _text(self, raw: object, path: str) -> str | None:
        if isinstance(raw, str) and raw and raw.isprintable():
            return raw
        self._fault(path, f"expected a text without control characters, found {raw!r}")
        return None

    def _path(self, raw: object, path: str) -> str | None:
        text = self._text(raw, path)
        return None if text is None else os.path.abspath(os.path.join(self.root, text))

    def _heads(self, raw: object, path: str, models: list[str | None]) -> str | None:
        if raw in ("base", "separate"):
            return str(raw)
        if not isinstance(raw, str) or not raw.startswith("model:"):
            self._fault(path, f"expected base, separate or model:<path>, found {raw!r}")
            return None
        model = self._path(raw.removeprefix("model:"), path)
        if model is not None and model not in models:
            self._fault(path, f"{model} is none of the models: name one that is listed under `models`")
        return f"model:{model}"

    # -- models

    def _reference(self, raw: object, path: str) -> str | None:
        """The absolute path of a checkpoint, written as a string or as mergekit's mapping."""
        if isinstance(raw, Mapping):
            self._unknown_keys(raw, path, ("model", "path", "revision", "lora", "override_architecture"))
            if raw.get("override_architecture") is not None:
                self._note("`override_architecture` has no effect: tensors are merged by name, whatever the model")
            for key, what in (("revision", "revisions of a hub"), ("lora", "adapters")):
                if raw.get(key) is not None:
                    self._fault(f"{path}.{key}", f"this version does not take {what}: give the folder of a checkpoint")
            inner = "model" if "model" in raw else "path"
            return self._reference(raw.get(inner), f"{path}.{inner}")
        model = self._path(raw, path)
        if model is not None and "+" in str(raw) and not os.path.exists(model):
            adapter = str(raw).partition("+")[2]
            self._fault(path, f"this version does not apply adapters ({adapter!r}): give the folder of a whole model")
        return model

    def _raw_models(self, document: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], str]]:
        """Path in the recipe, entry and checkpoint of each model that can be told."""
        raw = document.get("models")
        if not raw and raw in (None, [], ()):
            if not any(key in document for key in NOT_MERGED):
                self._fault("$.models", "is missing or empty: list the models to merge, each as `- model: FOLDER`")
            return []
        entries: list[tuple[str, Mapping[str, Any], str]] = []
        for index, item in enumerate(self._list(raw, "$.models")):
            path = f"$.models[{index}]"
            if not isinstance(item, Mapping) or "model" not in item:
                self._fault(path, f"expected a mapping with `model`, found {item!r}")
                continue
            self._unknown_keys(item, path, ("model", "parameters"))
            model = self._reference(item["model"], f"{path}.model")
            if model is not None:
                entries.append((path, item, model))
        return entries

    def _models(
        self, entries: list[tuple[str, Mapping[str, Any], str]], scopes: list[Scope], base: str | None
    ) -> tuple[ModelSpec, ...]:
        seen: dict[str, str] = {}
        specs = []
        for path, item, model in entries:
            same = os.path.realpath(model)
            if same in seen:
                self._fault(f"{path}.model", f"{model} is listed already, at {seen[same]}: leave one of the two out")
            seen.setdefault(same, path)
            if base is not None and same == os.path.realpath(base):
                model = base
            parameters = self._parameters(item.get("parameters"), f"{path}.parameters", scopes, one_model=True)
            if parameters and model == base and scopes and scopes[0].method.base != "ignored":
                message = f"this is the base of {scopes[0].method.name}, no expert, and takes no parameters: drop them"
                self._fault(f"{path}.parameters", message)
            specs.append(ModelSpec(model, parameters))
        return tuple(specs)

    # -- methods, sparsifiers, rules

    def _method(self, raw: object, path: str) -> MergeMethod | None:
        from mergepipe.tasks.registry import METHODS

        if isinstance(raw, str) and raw in METHODS:
            return METHODS[raw]
        if raw is None:
            self._fault(path, f"is missing; {nearest('', METHODS)}")
        elif raw in MERGEKIT_METHODS:
            self._fault(path, f"{raw} is not in this version; there is {', '.join(sorted(METHODS))}")
        else:
            self._fault(path, f"{raw!r} is no method of this version; {nearest(str(raw), METHODS)}")
        return None

    def _sparsify(self, raw: object, path: str) -> SparsifySpec | None:
        from mergepipe.tasks.registry import SPARSIFIERS

        if raw is None:
            return None
        given = dict(raw) if isinstance(raw, Mapping) else {"method": raw}
        name = given.pop("method", None)
        known = {*SPARSIFIERS, "none"}
        if not isinstance(name, str) or name not in known:
            where = f"{path}.method" if isinstance(raw, Mapping) else path
            self._fault(where, f"{name!r} is no sparsifier of this version; {nearest(str(name), known)}")
            return None
        declared = {p.name: p for p in SPARSIFIERS[name].parameters} if name in SPARSIFIERS else {}
        parameters: Parameters = {}
        for key, value in given.items():
            if key not in declared:
                self._fault(f"{path}.{key}", f"is no parameter of {name}; {nearest(str(key), declared)}")
                continue
            self._take(parameters, declared[key], value, f"{path}.{key}")
        return SparsifySpec(name, parameters)

    def _rules(
        self, raw: object, host: MergeMethod | None, sparsify: SparsifySpec | None, scopes: list[Scope]
    ) -> tuple[Rule, ...]:
        """The rules; appends a scope for each."""
        rules = []
        for index, item in enumerate(self._list(raw, "$.rules")):
            path = f"$.rules[{index}]"
            if not isinstance(item, Mapping):
                self._fault(path, f"expected a mapping with `match`, found {item!r}")
                continue
            self._unknown_keys(item, path, ("match", "merge_method", "sparsify", "parameters"))
            match = self._pattern(item.get("match"), f"{path}.match")
            name = item.get("merge_method")
            method = host if name is None else self._method(name, f"{path}.merge_method")
            own = self._sparsify(item.get("sparsify"), f"{path}.sparsify")
            if method is None:
                continue
            asked = own or (sparsify if method.space == "deltas" else None)
            scope = Scope(path, method, asked, "$.sparsify" if own is None else f"{path}.sparsify")
            parameters = self._parameters(item.get("parameters"), f"{path}.parameters", [scope])
            rule = Rule(match, None if name is None else method.name, own, parameters)
            rules.append(rule)
            scopes.append(Scope(path, method, asked, scope.sparsify_path, rule))
        return tuple(rules)

    def _pattern(self, raw: object, path: str) -> str:
        if not isinstance(raw, str) or not raw:
            self._fault(path, f"expected a regular expression, to be found in tensor names, found {raw!r}")
            return ""
        try:
            re.compile(raw)
        except (re.error, RecursionError, OverflowError) as error:
            self._fault(path, f"{raw!r} is no regular expression: {error}")
        return raw

    # -- parameters

    def _parameters(self, raw: object, path: str, scopes: list[Scope], *, one_model: bool = False) -> Parameters:
        """The parameters given at one place, checked against the scopes that they reach."""
        parameters: Parameters = {}
        for key, value in self._mapping(raw, path).items():
            declared = [p for p in (scope.declared(key) for scope in scopes) if p is not None]
            effective = [p for p in declared if not p.without_effect]
            asking = [scope for scope in scopes if scope.asked is not None]
            used = any(scope.uses(key) for scope in scopes)
            if not scopes:
                continue
            if asking and not used and (effective or (declared and key == "density")):
                self._fault(f"{path}.{key}", asking[0].replaced(key))
            elif not declared:
                methods = ", ".join(dict.fromkeys(scope.method.name for scope in scopes))
                known = set().union(*(scope.names() for scope in scopes))
                self._fault(f"{path}.{key}", f"is no parameter of {methods}; {nearest(str(key), known)}")
            elif not effective:
                self._note(f"`{key}` has no effect in {scopes[0].method.name}")
            elif one_model and not any(p.per_model or key in s.shared() for p in effective for s in scopes):
                self._fault(f"{path}.{key}", "is a setting of the whole merge: move it to $.parameters")
            else:
                self._take(parameters, effective[0], value, f"{path}.{key}")
        return parameters

    def _note(self, text: str) -> None:
        self.notes.setdefault(text)

    def _take(self, parameters: Parameters, parameter: Parameter, raw: object, path: str) -> None:
        spec = self._spec(parameter, raw, path)
        if not isinstance(spec, Missing):
            parameters[parameter.name] = spec

    def _spec(self, parameter: Parameter, raw: object, path: str) -> ValueSpec | Missing:
        if isinstance(raw, Mapping):
            raw = [raw]
        if isinstance(raw, list | tuple) and any(isinstance(item, Mapping) for item in raw):
            entries = [self._entry(parameter, item, f"{path}[{index}]") for index, item in enumerate(raw)]
            return Filtered(tuple(entry for entry in entries if entry is not None))
        return self._scalar_or_gradient(parameter, raw, path)

    def _entry(self, parameter: Parameter, raw: object, path: str) -> FilterEntry | None:
        if not isinstance(raw, Mapping) or "value" not in raw:
            self._fault(path, f"expected {{filter: part of a name, value: …}}, found {raw!r}")
            return None
        self._unknown_keys(raw, path, ("filter", "value"))
        word = raw.get("filter")
        if word is not None and not (isinstance(word, str) and word):
            self._fault(f"{path}.filter", f"expected a part of tensor names, or none for all, found {word!r}")
        value = self._scalar_or_gradient(parameter, raw["value"], f"{path}.value")
        return None if isinstance(value, Missing) else FilterEntry(None if word == "*" else word, value)

    def _scalar_or_gradient(self, parameter: Parameter, raw: object, path: str) -> Scalar | Gradient | Missing:
        if parameter.kind == "patterns" or not isinstance(raw, list | tuple):
            return self._scalar(parameter, raw, path)
        if not raw:
            self._fault(path, f"is an empty list: expected {parameter.expected}, or a list of such for a gradient")
            return MISSING
        if parameter.kind in ("integer", "rank"):
            self._fault(path, f"takes no gradient: expected {parameter.expected}")
            return MISSING
        values = [self._scalar(parameter, item, f"{path}[{index}]", unset=False) for index, item in enumerate(raw)]
        return Gradient(tuple(value for value in values if not isinstance(value, Missing)))

    def _scalar(self, parameter: Parameter, raw: object, path: str, *, unset: bool = True) -> Scalar | Missing:
        try:
            if raw is None and not unset:
                raise ValueError(f"expected {parameter.expected}, found nothing")
            value: Scalar = parameter.check(raw)
        except ValueError as error:
            self._fault(path, str(error))
            return MISSING
        except OverflowError:
            self._fault(path, f"expected {parameter.expected}, found a number too large for any")
            return MISSING
        if parameter.kind == "patterns" and isinstance(value, tuple):
            for index, pattern in enumerate(value):
                self._pattern(pattern, f"{path}[{index}]")
        return value

    # -- the recipe as a whole

    def _check_whole(self, recipe: Recipe, scopes: list[Scope]) -> None:
        if recipe.scope == "model" and scopes and not scopes[0].takes("model"):
            self._fault("$.scope", f"has no effect: {scopes[0].thinning} takes no threshold over the whole model")
        for scope in scopes:
            baseless = scope.method.base == "optional" and recipe.base_model is None
            if scope.asked is not None and (scope.method.space != "deltas" or baseless):
                message = f"{scope.method.name} merges weights, there is no task vector to thin: leave `sparsify` out"
                message += " or name a `base_model`" if baseless else ""
                self._fault(scope.sparsify_path, message)
            if scope.method.base in ("required", "primary") and recipe.base_model is None:
                self._fault("$.base_model", f"is missing: {scope.method.name} needs one")
                continue
            count = scope.count_fault(len(scope.experts(recipe)))
            if count is not None:
                self._fault("$.models" if scope.rule is None else f"{scope.path}.merge_method", count)
            if scope.rule is None:
                for path, message in scope.without_effect(recipe):
                    self._fault(path, message)
            for path, message in scope.lacking(recipe):
                self._fault(path, message)
