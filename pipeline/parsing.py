"""From plain values to a :class:`~mergepipe.pipeline.recipe.Recipe`: strict, and with all faults at once.

A parser never stops at the first fault: what can't be used is noted and left out, and only at the end is the recipe
made or the lot of them raised. Checks that need a part that is itself at fault are skipped, so that one mistake is
reported once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from mergepipe.errors import RecipeError
from mergepipe.pipeline.faults import FIRST, Faults, independent
from mergepipe.pipeline.parse_parts import Entry, PartsParser
from mergepipe.pipeline.parse_values import nearest
from mergepipe.pipeline.parts import Part, parts_of
from mergepipe.pipeline.recipe import ModelSpec, Parameters, Recipe, Rule, SparsifySpec
from mergepipe.pipeline.references import Reference, is_hub_id, parse_reference, split_revision
from mergepipe.pipeline.scope import Scope
from mergepipe.pipeline.tokenizer_keys import parse_chat_template, parse_tokenizer
from mergepipe.tasks.method import MergeMethod
from mergepipe.tasks.parameter import REQUIRED

KEYS = (
    *("merge_method", "base_model", "models", "parameters", "sparsify", "scope", "rules", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "seed", "heads", "output", "name"),
    *("slices", "modules"),
)

NOT_MERGED = {
    "outputs": "this version writes one output per run: give each its own recipe",
}
"""Keys that the dialect has and this version refuses, with the reason."""

STRAYS = {
    "random_seed": "it is an option of mergekit's command, no key of its recipes; say `seed` for other random masks",
    "embed_slerp": "embeddings are merged as `t` says for them",
}
"""Keys that mergekit ignores, and that many published recipes have all the same, with what to know instead."""

MERGEKIT_METHODS = (
    *("linear", "slerp", "nuslerp", "multislerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties"),
    *("breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "sce", "ram", "ramplus_tl", "model_stock"),
    *("nearswap", "arcee_fusion", "passthrough"),
)
"""Names that are no slip of the pen, whether or not there is such a method here."""


def _stand_ins(scopes: Iterable[Scope]) -> Parameters:
    """A value for everything that has to be given: with it, the rest of a recipe that lacks some can be looked at."""
    required = (p for scope in scopes for p in scope.method.parameters if p.default is REQUIRED)
    return {p.name: 1.0 if p.kind == "number" and p.inside(1.0) else p.minimum or 0.0 for p in required}


class RecipeParser(PartsParser):
    """Parses one recipe; relative paths start from the absolute path `root`."""

    def __init__(self, root: str) -> None:
        super().__init__()
        self.root = root

    def parse(self, document: Mapping[str, Any], faults: Faults = FIRST) -> Recipe:
        """The recipe that a document describes.

        Raises
        ------
        RecipeError
            With all faults; unless `faults` keeps them, then the recipe is made from the parts that are sound.
        """
        self._unknown_keys({key: value for key, value in document.items() if key not in STRAYS}, "$", KEYS, NOT_MERGED)
        for key in sorted(STRAYS.keys() & document.keys()):
            self._note(f"`{key}` has no effect, nor has it in mergekit: {STRAYS[key]}")
        method = self._method(document.get("merge_method"), "$.merge_method")
        base = self._optional(document, "base_model", self._reference)
        form = self._form(document)
        raw_models = self._raw_models(document) if form == "models" else []
        sparsify = self._sparsify(document.get("sparsify"), "$.sparsify")
        scopes = self._part_scopes(document, form, method, sparsify)
        hosts = list({scope.method.name: scope.method for scope in scopes}.values())
        rules = self._rules(document.get("rules"), hosts, sparsify, scopes)
        parts: dict[str, Any] = {"models": self._models(raw_models, scopes, base, method)}
        if form == "slices":
            parts["slices"] = self._slices(document["slices"], "$.slices", scopes, base)
        elif form == "modules":
            parts["modules"] = self._modules(document["modules"], scopes, base, method)
        parameters = self._parameters(document.get("parameters"), "$.parameters", scopes)
        plain = self._plain_keys(document, [base, *Recipe("", **parts).sources])
        at_fault = {fault.path for fault in self.faults}
        plain = {key: value for key, value in plain.items() if f"$.{key}" not in at_fault}
        fields = plain | {"base_model": base, "parameters": parameters, "sparsify": sparsify, "rules": rules}
        recipe = Recipe("passthrough" if method is None else method.name, **parts, **fields, notes=tuple(self.notes))
        before, self.faults = self.faults, []
        shaping = ("$.slices", "$.modules", *(f"$.{key}" for key in NOT_MERGED))
        if method is not None and not any(path.startswith(shaping) and ".parameters" not in path for path in at_fault):
            self._check_whole(recipe, scopes)
        self.faults = [*before, *independent(self.faults, before)]
        if self.faults:
            faults.take(RecipeError(self.faults if faults.keep else self._shown()))
        return replace(recipe, parameters=_stand_ins(scopes) | parameters) if self.faults else recipe

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
            "tokenizer": parse_tokenizer(document, self._fault, self._reference),
            "chat_template": parse_chat_template(document.get("chat_template"), self._fault),
        }

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
        model = self._reference(raw.removeprefix("model:"), path)
        if model is not None and model not in models:
            self._fault(path, f"{model} is none of the models: name one that is listed under `models`")
        return f"model:{model}"

    # -- models

    def _reference(self, raw: object, path: str) -> str | None:
        """What a model is called, local paths absolute: written as a string or as mergekit's mapping."""
        if not isinstance(raw, Mapping):
            text = self._text(raw, path)
            return None if text is None else str(parse_reference(text, self.root))
        self._unknown_keys(raw, path, ("model", "path", "revision", "lora", "override_architecture"))
        if raw.get("override_architecture") is not None:
            self._note("`override_architecture` has no effect: tensors are merged by name, whatever the model")
        inner = "model" if "model" in raw else "path"
        model = self._reference(raw.get(inner), f"{path}.{inner}")
        lora = None if raw.get("lora") is None else self._reference(raw["lora"], f"{path}.lora")
        model = self._at_revision(model, raw.get("revision"), f"{path}.revision")
        if model is None or lora is None:
            return model
        if parse_reference(model).adapter or parse_reference(lora).adapter:
            self._fault(f"{path}.lora", "this version applies one adapter: merge the others into the model first")
        return str(Reference(model, lora))

    def _at_revision(self, model: str | None, raw: object, path: str) -> str | None:
        revision = None if raw is None else self._text(raw, path)
        if model is None or revision is None:
            return model
        reference = parse_reference(model)
        if not is_hub_id(reference.model) or split_revision(reference.model)[1]:
            self._fault(path, f"{reference.model} is a folder, or has a revision already: only a hub id takes one")
            return model
        return str(Reference(f"{reference.model}@{revision}", reference.adapter))

    def _raw_models(self, document: Mapping[str, Any], at: str = "$") -> list[Entry]:
        """Path in the recipe, entry and checkpoint of each model that can be told."""
        raw = document.get("models")
        if not raw and raw in (None, [], ()):
            if not any(key in document for key in NOT_MERGED):
                self._fault(f"{at}.models", "is missing or empty: list the models to merge, each as `- model: FOLDER`")
            return []
        entries: list[Entry] = []
        for index, item in enumerate(self._list(raw, f"{at}.models")):
            path = f"{at}.models[{index}]"
            if not isinstance(item, Mapping) or "model" not in item:
                self._fault(path, f"expected a mapping with `model`, found {item!r}")
                if isinstance(item, Mapping):
                    self._unknown_keys(item, path, ("model", "parameters"))
                continue
            self._unknown_keys(item, path, ("model", "importance", "parameters"))
            model = self._reference(item["model"], f"{path}.model")
            if model is not None:
                entries.append((path, item, model))
        return entries

    def _models(
        self, entries: list[Entry], scopes: list[Scope], base: str | None, host: MergeMethod | None
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
            if parameters and model == base and host is not None and host.base != "ignored":
                message = f"this is the base of {host.name}, no expert, and takes no parameters: drop them"
                self._fault(f"{path}.parameters", message)
            raw = item.get("importance")
            importance = None if raw is None else self._reference(raw, f"{path}.importance")
            specs.append(ModelSpec(model, parameters, importance=importance))
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
        self, raw: object, hosts: list[MergeMethod], sparsify: SparsifySpec | None, scopes: list[Scope]
    ) -> tuple[Rule, ...]:
        """The rules; appends the scopes of each, one for every method that it may go with."""
        rules = []
        for index, item in enumerate(self._list(raw, "$.rules")):
            path = f"$.rules[{index}]"
            if not isinstance(item, Mapping):
                self._fault(path, f"expected a mapping with `match`, found {item!r}")
                continue
            self._unknown_keys(item, path, ("match", "merge_method", "sparsify", "parameters"))
            match = self._pattern(item.get("match"), f"{path}.match")
            name = item.get("merge_method")
            own_method = None if name is None else self._method(name, f"{path}.merge_method")
            own = self._sparsify(item.get("sparsify"), f"{path}.sparsify")
            methods = hosts if name is None else [own_method] if own_method is not None else []
            if not methods:
                continue
            where = "$.sparsify" if own is None else f"{path}.sparsify"
            asked = [own or (sparsify if method.space == "deltas" else None) for method in methods]
            pairs = list(zip(methods, asked, strict=True))
            here = [Scope(path, method, thinned, where) for method, thinned in pairs]
            parameters = self._parameters(item.get("parameters"), f"{path}.parameters", here)
            rule = Rule(match, None if own_method is None else own_method.name, own, parameters)
            rules.append(rule)
            scopes += [Scope(path, method, thinned, where, rule) for method, thinned in pairs]
        return tuple(rules)

    # -- the recipe as a whole

    def _check_whole(self, recipe: Recipe, scopes: list[Scope]) -> None:
        parts = parts_of(recipe)
        own = {scope.path: scope for scope in scopes if scope.rule is None}
        if recipe.scope == "model" and own and not any(scope.takes("model") for scope in own.values()):
            thinning = ", ".join(dict.fromkeys(scope.thinning for scope in own.values()))
            self._fault("$.scope", f"has no effect: {thinning} takes no threshold over the whole model")
        if recipe.sparsify is not None and own and all(scope.asked is None for scope in own.values()):
            self._fault("$.sparsify", "has no effect: every part of the recipe merges weights, not task vectors")
        rules_take_some = any(scope.method.importance for scope in scopes if scope.rule is not None)
        for part in parts if not rules_take_some else ():
            for index, spec in enumerate(part.recipe.models if part.path in own else ()):
                if spec.importance is not None and not own[part.path].method.importance:
                    method = own[part.path].method.name
                    message = f"has no effect: {method} takes no importances (fisher does), leave it out"
                    self._fault(f"{part.listing}[{index}].importance", message)
        checked = [part for part in parts if part.path in own]
        lacking = [{_last(*lack) for lack in own[part.path].lacking(part.recipe)} for part in checked]
        lacking_everywhere = set.intersection(*lacking) if lacking else set()
        for part in checked:
            self._check_part(part, own[part.path], lacking_everywhere)
        for scope in scopes:
            if scope.rule is None:
                continue
            if len(parts) == 1:
                for path, message in scope.faults(parts[0].recipe):
                    self._fault(path, message)
            elif (idle := scope.idle_sparsifier(baseless=False)) is not None:
                # Which parts a rule reaches is seen when tensors are known.
                self._fault(scope.sparsify_path, idle)

    def _check_part(self, part: Part, scope: Scope, lacking_everywhere: set[tuple[str, str]]) -> None:
        method = scope.method
        if part.sliced and method.base != "ignored" and part.base_model not in (None, *part.ranges):
            message = (
                f"the base {part.base_model} is no source: {method.name} needs to know which of its layers; list it"
            )
            self._fault(part.listing, message)
            return
        for path, message in scope.faults(part.recipe):
            # What no part has is missing once, in the recipe.
            once = _last(path, message) in lacking_everywhere
            self._fault_once("$" + path.removeprefix(part.path) if once and part.path != "$" else path, message)

    def _fault_once(self, path: str, message: str) -> None:
        if not any((fault.path, fault.message) == (path, message) for fault in self.faults):
            self._fault(path, message)


def _last(path: str, message: str) -> tuple[str, str]:
    """What is lacking, wherever it is."""
    return path.rpartition(".")[2], message
