"""The oracle suite: the same recipes through mergekit, in an environment of its own, and through mergepipe.

mergekit is no dependency. The suite runs where ``MERGEPIPE_MERGEKIT_PYTHON`` names the Python of an environment that
has mergekit 0.1.5, and is skipped with that reason elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from oracle.cases import CASES
from oracle.rival import run_mergekit
from support.checkpoints import Family, write_family

FAMILIES = ("llama-float32", "llama-bfloat16", "qwen2-float32", "qwen2-bfloat16")


@dataclass(frozen=True)
class Bench:
    """A family of checkpoints and what mergekit made of every case over it."""

    family: Family
    dtype: str
    rival: dict[str, Path]


@pytest.fixture(scope="session")
def mergekit_python() -> Path:
    """The Python that has mergekit."""
    named = os.environ.get("MERGEPIPE_MERGEKIT_PYTHON")
    if not named:
        pytest.skip("MERGEPIPE_MERGEKIT_PYTHON is not set: `make test-mergekit` makes the environment and sets it")
    if not Path(named).is_file():
        pytest.fail(f"MERGEPIPE_MERGEKIT_PYTHON is {named}, which is no file: expected the Python of an environment")
    return Path(named)


@pytest.fixture(scope="session", params=FAMILIES)
def bench(request: pytest.FixtureRequest, mergekit_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One family after the other, each merged by mergekit in one process."""
    kind, dtype = request.param.split("-")
    folder = tmp_path_factory.mktemp(request.param)
    family = write_family(folder, kind, dtype, experts=3)
    recipes = {case.name: case.recipe(family, dtype) for case in CASES}
    return Bench(family, dtype, run_mergekit(mergekit_python, recipes, folder / "mergekit"))
