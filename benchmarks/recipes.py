"""A recipe for every method of the registry, over the same checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mergepipe.tasks.registry import METHODS

VALUES = {"weight": 0.5, "density": 0.2, "t": 0.3}
"""What is given where a method asks for it; all else is as it is by default."""


def recipe_for(name: str, folders: Sequence[Path], importance: Path | None = None) -> dict[str, Any]:
    """A recipe by the method `name`, of the base (the first folder) and as many of the others as it takes.

    Where a method takes importances, `importance` is that of every model, by default the model itself: as large as a
    real one, which is all that counts for a plan.
    """
    method = METHODS[name]
    base, *experts = folders
    known = {parameter.name for parameter in method.parameters if not parameter.without_effect}
    models: list[dict[str, Any]] = [{"model": str(path)} for path in experts[: method.max_models]]
    if method.importance:
        models = [{**entry, "importance": str(importance or entry["model"])} for entry in models]
    given = {key: value for key, value in VALUES.items() if key in known}
    recipe: dict[str, Any] = {"merge_method": name, "models": models, "parameters": given}
    if method.base != "ignored":
        recipe["base_model"] = str(base)
    return recipe
