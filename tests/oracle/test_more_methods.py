"""mergekit's further methods, run by both tools, against float64 and each other.

Ours is within 2 units in the last place (4 for spherical methods) of the largest number an element's sum goes through;
mergekit within twice that, or what its own roundings on the way allow, written at each case. Where several answers are
right (a magnitude at a threshold, votes that cancel) anything from the least to the greatest of them counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from oracle.conftest import FAMILIES, Bench
from oracle.expected import Outcome, ulp
from oracle.more_cases import CASES, MoreCase
from oracle.rival import run_mergekit
from oracle.test_mergekit import as_numpy, run_mergepipe
from support.checkpoints import read_tensors, write_family

pytestmark = pytest.mark.oracle


@pytest.fixture(scope="session", params=FAMILIES)
def more(request: pytest.FixtureRequest, mergekit_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One family after the other, each merged by mergekit in one process."""
    kind, dtype = request.param.split("-")
    folder = tmp_path_factory.mktemp(f"more-{request.param}")
    family = write_family(folder, kind, dtype, experts=3)
    recipes = {case.name: case.recipe(family, dtype) for case in CASES}
    return Bench(family, dtype, run_mergekit(mergekit_python, recipes, folder / "mergekit"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_recipe_same_model(case: MoreCase, more: Bench, tmp_path: Path) -> None:
    """Every tensor of both outputs is right, and they agree wherever only one answer is."""
    rival = more.rival[case.name]
    assert (rival / "merged").is_dir(), (rival / "error.txt").read_text(encoding="utf-8")
    theirs = read_tensors(rival / "merged")
    ours = read_tensors(run_mergepipe(case.recipe(more.family, more.dtype), tmp_path / "ours"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    inputs = [read_tensors(folder) for folder in more.family.folders[: len(case.per_model) + 1]]
    faults = []
    for name in ours:
        base, *models = [as_numpy(tensors[name]).astype(np.float32) for tensors in inputs]
        faults += compare(case, name, as_numpy(ours[name]), as_numpy(theirs[name]), base, models)
    assert not faults, "\n".join(faults)


def compare(case: MoreCase, name: str, ours: Any, theirs: Any, base: Any, models: list[Any]) -> list[str]:
    """What is wrong about one tensor, in words; nothing if it is right."""
    ulps = 4.0 if case.spherical else 2.0
    possible = list(case.possible(base, models))
    faults = []
    bounds = (3.0 if case.rounded else ulps, max(2 * ulps, case.apart))
    for tool, result, units in zip(("mergepipe", "mergekit"), (ours, theirs), bounds, strict=True):
        if tool == "mergekit" and case.unstable and ours.dtype != np.float32:
            continue
        wrong = ~between(result, possible, units)
        if wrong.any():
            faults.append(
                f"{name}: {tool} is off at {np.count_nonzero(wrong)} of {wrong.size} {_worst(result, possible)}"
            )
    if ours.dtype == np.float32:
        first = possible[0]
        sure = np.all([np.abs(other.value - first.value) <= ulps * ulp(first.largest) for other in possible], axis=0)
        distance = np.abs(ours.astype(np.float64) - theirs) / ulp(first.largest)
        if (distance[sure] > max(ulps, case.apart)).any():
            faults.append(f"{name}: the two differ by up to {distance[sure].max():.3g} units")
    return faults


def between(result: Any, possible: list[Outcome], units: float) -> Any:
    """Where `result` lies between the least and the greatest answer, given `units` of error in float32."""
    errors = [units * ulp(one.largest) for one in possible]
    low = np.min([one.value - error for one, error in zip(possible, errors, strict=True)], axis=0)
    high = np.max([one.value + error for one, error in zip(possible, errors, strict=True)], axis=0)
    if result.dtype == ml_dtypes.bfloat16:
        low, high = (x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64) for x in (low, high))
    return (result.astype(np.float64) >= low) & (result.astype(np.float64) <= high)


def _worst(result: Any, possible: list[Outcome]) -> str:
    apart = np.min([np.abs(result.astype(np.float64) - one.value) / ulp(one.largest) for one in possible], axis=0)
    return f"by up to {apart.max():.3g} units"
