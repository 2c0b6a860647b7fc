"""One parameter of a method: what a recipe may write, and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()

Kind = Literal["number", "integer", "flag", "choice", "patterns", "rank"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method or a sparsifier: its type, bounds, default and meaning.

    Attributes
    ----------
    name : str
        As it stands in a recipe.
    kind : {'number', 'integer', 'flag', 'choice', 'patterns', 'rank'}
    doc : str
        One line for `mergepipe methods` and the documentation.
    default : object
        `REQUIRED` where a recipe has to give it; None where "not set" means something.
    per_model : bool
        True if each model may have its own value.
    minimum, maximum : float or None
        Bounds, included unless `open_minimum` / `open_maximum`.
    choices : tuple of str
        For kind 'choice'.
    without_effect : bool
        True for a key that mergekit declares and that changes nothing here: accepted and noted.
    stand_in : (str, str, float) or None
        ``(name, choice, value)``: where parameter `name` of the method is `choice`, this one is not to be given, and
        kernels find `value` in its place.
    """

    name: str
    kind: Kind
    doc: str
    default: object = REQUIRED
    per_model: bool = False
    minimum: float | None = None
    maximum: float | None = None
    open_minimum: bool = False
    open_maximum: bool = False
    choices: tuple[str, ...] = ()
    without_effect: bool = False
    stand_in: tuple[str, str, float] | None = None

    def check(self, value: object) -> Any:
        """The value in its proper type.

        Raises
        ------
        ValueError
            If it is of the wrong type or out of bounds; the message says what was expected and what was found.

        Examples
        --------
        >>> Parameter("density", "number", "kept fraction", 1.0, minimum=0, maximum=1).check(1)
        1.0
        >>> Parameter("density", "number", "kept fraction", 1.0, minimum=0, maximum=1).check(1.5)
        Traceback (most recent call last):
        ...
        ValueError: expected a number from 0 to 1, found 1.5
        """
        if value is None and self.default is None:
            return None
        if self.kind == "flag" and isinstance(value, bool | int) and value in (0, 1):
            return bool(value)
        if self.kind == "choice" and value in self.choices:
            return value
        if self.kind == "patterns" and isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        if self.kind == "rank" and not isinstance(value, bool):
            # 1 is one component, 1.0 all of them.
            if value == "auto" or (isinstance(value, int) and value >= 1):
                return value
            if isinstance(value, float) and 0 < value <= 1:
                return value
        if self.kind in ("number", "integer") and isinstance(value, int | float) and not isinstance(value, bool):
            whole = self.kind == "integer"
            if math.isfinite(value) and (not whole or value == int(value)) and self.inside(value):
                return int(value) if whole else float(value)
        raise ValueError(f"expected {self.expected}, found {value!r}")

    def inside(self, value: float) -> bool:
        """Whether a number is within the bounds."""
        low = self.minimum is None or value > self.minimum or (value == self.minimum and not self.open_minimum)
        high = self.maximum is None or value < self.maximum or (value == self.maximum and not self.open_maximum)
        return low and high

    @property
    def expected(self) -> str:
        """What a recipe may write here, in words."""
        if self.kind == "flag":
            return "true or false"
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        if self.kind == "patterns":
            return "a list of regular expressions"
        if self.kind == "rank":
            return "auto, a whole number from 1, or a fraction above 0.0 to 1.0"
        noun = "a whole number" if self.kind == "integer" else "a number"
        parts = []
        if self.minimum is not None:
            parts.append(f"{'above' if self.open_minimum else 'from'} {self.minimum:g}")
        if self.maximum is not None:
            parts.append(f"{'below' if self.open_maximum else 'to'} {self.maximum:g}")
        return " ".join([noun, *parts])
