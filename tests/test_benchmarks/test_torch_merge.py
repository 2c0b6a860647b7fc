"""The rival written by hand merges what mergepipe merges: seconds of another merge would say nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import mergepipe
from benchmarks.bench_run import BY_HAND, recipe_of
from benchmarks.bench_run import METHODS as TIMED
from benchmarks.data import Layout, write_checkpoints
from benchmarks.process import run_torch
from benchmarks.torch_merge import METHODS, load, merge

ROOT = Path(__file__).resolve().parents[2]
TINY = Layout(64, 160, 2, 300, 4, 2)


def merged_by_us(recipe: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    mergepipe.run(folder / "work")
    return load(folder / "merged")


def places(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Numbers that count bfloat16 values upwards, both zeros alike."""
    bits = tensor.view(torch.int16).numpy().astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_same_merge(method: str, tmp_path: Path) -> None:
    """Up to one unit in the last place, as the order of roundings goes, and nearly always to the bit."""
    recipe = recipe_of(method, write_checkpoints(tmp_path / "models", TINY), 0.2)
    ours, theirs = merged_by_us(recipe, tmp_path / "ours"), merge(recipe)
    assert {name: tensor.dtype for name, tensor in theirs.items()} == dict.fromkeys(ours, torch.bfloat16)
    apart = [np.abs(places(ours[name]) - places(theirs[name])).ravel() for name in ours]
    assert max(each.max() for each in apart) <= 1
    assert np.mean(np.concatenate(apart) == 0) >= 0.99


def test_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = recipe_of("ties", write_checkpoints(tmp_path / "models", TINY), 0.2)
    used = run_torch(recipe, tmp_path / "run")
    assert used.wall_s > 0
    assert 0 < used.peak_anonymous <= used.peak_rss
    found, expected = load_file(tmp_path / "run" / "theirs" / "model.safetensors"), merge(recipe)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_another_merge_is_refused(tmp_path: Path) -> None:
    assert METHODS == BY_HAND
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for method in {*TIMED} - {*METHODS}:
        with pytest.raises(ValueError, match="is not written out here"):
            merge(recipe_of(method, folders, 0.2))
    recipe = recipe_of("linear", folders, 0.2)
    recipe["parameters"]["normalize"] = False
    with pytest.raises(ValueError, match="normalize"):
        merge(recipe)
