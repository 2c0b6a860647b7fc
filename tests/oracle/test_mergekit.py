"""mergepipe against mergekit 0.1.5: the same recipe, tensor by tensor.

float32: they differ by 2 units in the last place at most (4 for `slerp`) of the largest number an element's sum goes
through, unless mergekit is the one farther from the float64 result (its `slerp` takes the angle in float32 and is up
to 6 off); and mergepipe is within twice that distance of the float64 result everywhere. bfloat16: both compute in
float32 and round once; each result must be the rounding of a number within such a distance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import yaml

import mergepipe
from oracle.cases import CASES, Case
from oracle.conftest import Bench
from oracle.expected import agrees, at_threshold, distance, outcomes, ulp
from support.checkpoints import read_tensors

pytestmark = pytest.mark.oracle

ULPS = {"slerp": 4.0}
"""How far the two may be apart, in float32 units in the last place; 2 for every other method."""


def run_mergepipe(recipe: dict[str, Any], folder: Path) -> Path:
    """Merge with mergepipe; its output folder."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return Path(mergepipe.run(folder / "work").output)


def as_numpy(tensor: torch.Tensor) -> Any:
    """The tensor's values, bfloat16 as `ml_dtypes` has it."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_recipe_same_model(case: Case, bench: Bench, tmp_path: Path) -> None:
    """Every tensor of both outputs is right, and they agree with each other wherever no threshold is tied."""
    rival = bench.rival[case.name]
    assert (rival / "merged").is_dir(), (rival / "error.txt").read_text(encoding="utf-8")
    theirs = read_tensors(rival / "merged")
    ours = read_tensors(run_mergepipe(case.recipe(bench.family, bench.dtype), tmp_path / "ours"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    inputs = [read_tensors(folder) for folder in bench.family.folders[: len(case.per_model) + 1]]
    faults = []
    for name in ours:
        base, *models = [as_numpy(tensors[name]).astype(np.float32) for tensors in inputs]
        faults += compare(case, name, as_numpy(ours[name]), as_numpy(theirs[name]), base, models)
    assert not faults, "\n".join(faults)


def compare(case: Case, name: str, ours: Any, theirs: Any, base: Any, models: list[Any]) -> list[str]:
    """What is wrong about one tensor, in words; nothing if it is right."""
    values, ulps = case.values(name), ULPS.get(case.method, 2.0)
    possible = outcomes(case.method, values, base, models)
    faults = []
    for tool, result, allowed in (("mergepipe", ours, 2 * ulps), ("mergekit", theirs, 4 * ulps)):
        wrong = ~agrees(result, possible, allowed)
        if wrong.any():
            faults.append(f"{name}: {tool} is off at {np.count_nonzero(wrong)} of {wrong.size}, first {_first(wrong)}")
    if ours.dtype == np.float32:
        apart = np.abs(ours.astype(np.float64) - theirs) > ulps * ulp(possible[0].largest)
        apart &= distance(theirs, possible) <= distance(ours, possible)
        if case.method == "ties":
            apart &= ~at_threshold(values, base, models)
        if apart.any():
            faults.append(f"{name}: the two differ at {np.count_nonzero(apart)} of {apart.size}, first {_first(apart)}")
    return faults


def _first(mask: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])
