"""What parsing a recipe is made of: a list of faults, and the values of parameters, wherever they stand.

A parser never stops at the first fault: what can't be used is noted and left out, and only at the end is the recipe
made or the lot of them raised.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from mergepipe.errors import Fault
from mergepipe.pipeline.patterns import compile_pattern
from mergepipe.pipeline.recipe import Parameters
from mergepipe.pipeline.scope import Scope
from mergepipe.pipeline.values import MISSING, Filtered, FilterEntry, Gradient, Missing, Scalar, ValueSpec
from mergepipe.tasks.parameter import Parameter

MAX_FAULTS = 50
MAX_MESSAGE = 400


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


class ValueParser:
    """Collects faults and notes, and parses parameters."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.notes: dict[str, None] = {}

    # -- faults

    def _fault(self, path: str, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            message = message[:MAX_MESSAGE] + " …"
        self.faults.append(Fault(path, message))

    def _shown(self) -> list[Fault]:
        """As many faults as an error tells."""
        more = len(self.faults) - MAX_FAULTS
        shown = self.faults[:MAX_FAULTS]
        return [*shown, Fault("$", f"and {more} more faults")] if more > 0 else shown

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

    def _pattern(self, raw: object, path: str) -> str:
        if not isinstance(raw, str) or not raw:
            self._fault(path, f"expected a regular expression, to be found in tensor names, found {raw!r}")
            return ""
        try:
            compile_pattern(raw)
        except ValueError as error:
            self._fault(path, str(error))
        return raw
