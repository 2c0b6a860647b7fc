"""A folder with a base and two experts of three tensors, and a recipe over them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

RECIPE = """\
merge_method: task_arithmetic
base_model: ./base
models:
  - model: ./expert-1
    parameters: {weight: 0.5}
  - model: ./expert-2
    parameters: {weight: 0.5}
"""


def write_model(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """A checkpoint of one file."""
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is the current one: base is zero but for a step, experts differ in known places."""
    monkeypatch.chdir(tmp_path)
    base = {
        "layers.0.weight": np.full((4, 3), 2.0, np.float32),
        "norm.weight": np.zeros(4, np.float32),
        "position_ids": np.arange(5),
    }
    first = base | {"layers.0.weight": base["layers.0.weight"] + np.eye(4, 3, dtype=np.float32)}
    second = base | {"norm.weight": np.full(4, 3.0, np.float32)}
    for name, tensors in (("base", base), ("expert-1", first), ("expert-2", second)):
        write_model(tmp_path / name, tensors)
    (tmp_path / "mergepipe.yaml").write_text(RECIPE)
    return tmp_path
