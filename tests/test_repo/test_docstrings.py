"""Every example in a docstring runs, under the name that the package is installed with."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def installed_names() -> list[str]:
    """Full names of all modules on disk. (pkgutil can't list them: an editable install hides the layers from it.)"""
    names = ["mergepipe", "mergepipe.errors"]
    for layer in ("cli", "pipeline", "tasks", "storage"):
        for path in sorted((ROOT / layer).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(["mergepipe", *parts]).removesuffix(".__init__"))
    return names


@pytest.mark.parametrize("name", installed_names())
def test_examples_run(name: str) -> None:
    module = import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    outcome = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
