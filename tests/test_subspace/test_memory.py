"""Anonymous memory of whole-matrix merges, measured in a process of its own against what was projected."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import mergepipe
from mergepipe.pipeline.summary import summarize

TESTS = Path(__file__).resolve().parents[1]
MIB = 2**20


def measured(folder: Path, shape: tuple[int, int], method: str, memory: str, models: int = 3) -> tuple[float, float]:
    """Projected and measured peak, in MiB, of a merge of one bf16 matrix."""
    base = np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 0.02
    for number in range(models + 1):
        target = folder / f"model-{number}"
        target.mkdir()
        change = np.random.default_rng(number).standard_normal(shape, dtype=np.float32) * (0.002 if number else 0)
        save_file({"up.weight": (base + change).astype(ml_dtypes.bfloat16)}, target / "model.safetensors")
        (target / "config.json").write_text("{}")
    recipe = {
        "merge_method": method,
        "base_model": str(folder / "model-0"),
        "models": [{"model": str(folder / f"model-{number}")} for number in range(1, models + 1)],
        "parameters": {"svd": "gram"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = mergepipe.build(
        folder / "recipe.yaml", work=folder / "work", out=folder / "merged", memory=memory, workers=2
    )
    command = [sys.executable, "-m", "support.peak", str(folder / "work"), json.dumps({"workers": 2, "device": "cpu"})]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return summarize(plan)["needed_bytes"] / MIB, json.loads(done.stdout)["peak"] / MIB


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(640, 2048), (2048, 640)], ids=str)
@pytest.mark.parametrize("method", ["mda", "iso_c", "iso_cts", "dc_merge", "opcm"])
def test_peak_is_below_what_was_projected(tmp_path: Path, method: str, shape: tuple[int, int]) -> None:
    projected, peak = measured(tmp_path, shape, method, "2GiB")
    assert peak <= projected


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_three_models_of_a_large_matrix_in_2_gib(tmp_path: Path) -> None:
    projected, peak = measured(tmp_path, (4096, 14336), "mda", "2GiB")
    assert peak <= projected <= 2048
