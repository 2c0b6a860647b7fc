"""`mergepipe inspect`: headers, differences, task vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mergepipe.cli.main import main
from mergepipe.pipeline import compare


def inspected(capsys: pytest.CaptureFixture[str], *args: str) -> dict:
    assert main(["inspect", *args, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_checkpoint(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "base"]) == 0
    out = capsys.readouterr().out
    assert "3 tensors, 21 parameters" in out
    assert "4 x 3" in out
    (found,) = inspected(capsys, "base")["checkpoints"]
    assert found["dtypes"]["F32"] == {"tensors": 2, "parameters": 16, "bytes": 64}
    shapes = {tensor["name"]: tensor["shape"] for tensor in found["tensors"]}
    assert shapes == {"layers.0.weight": [4, 3], "norm.weight": [4], "position_ids": [5]}


def test_same_headers(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "base", "expert-1"]) == 0
    assert "same tensor names, shapes and dtypes" in capsys.readouterr().out


def test_every_kind_of_difference(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "expert-2" / "model.safetensors"
    tensors = load_file(path)
    tensors["head"] = tensors.pop("norm.weight")
    tensors["layers.0.weight"] = tensors["layers.0.weight"].astype(np.float16)
    tensors["position_ids"] = tensors["position_ids"][:2]
    save_file(tensors, path)
    (difference,) = inspected(capsys, "base", "expert-2")["differences"]
    assert difference | {"checkpoint": ""} == {
        "checkpoint": "",
        "missing": ["norm.weight"],
        "extra": ["head"],
        "other_shape": ["position_ids"],
        "other_dtype": ["layers.0.weight"],
    }
    assert main(["inspect", "base", "expert-2"]) == 0
    out = capsys.readouterr().out
    for line in ("lacks (1): norm.weight", "has besides (1): head", "other shape (1)", "other dtype (1)"):
        assert line in out


@pytest.mark.parametrize("window", [1, 5, 1 << 20])
def test_task_vectors(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(compare, "WINDOW", window)
    found = inspected(capsys, "base", "expert-1", "expert-2", "--stats")["statistics"]
    by_name = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert set(by_name) == {"layers.0.weight", "norm.weight"}, "integers have no task vector"
    assert by_name["layers.0.weight"]["base_norm"] == pytest.approx(48**0.5)
    assert by_name["layers.0.weight"]["norms"] == pytest.approx([3**0.5, 0])
    assert by_name["layers.0.weight"]["densities"] == [0.25, 0.0]
    assert by_name["norm.weight"]["norms"] == [0.0, 6.0]
    assert by_name["norm.weight"]["densities"] == [0.0, 1.0]
    assert found["total"]["norms"] == pytest.approx([3**0.5, 6.0])
    assert main(["inspect", "base", "expert-1", "--stats"]) == 0
    assert "expert-1 norm" in capsys.readouterr().out


def test_nan_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = models / "expert-2" / "model.safetensors"
    tensors = load_file(path)
    tensors["norm.weight"][2] = np.nan
    save_file(tensors, path)
    assert main(["inspect", "base", "expert-2", "--stats"]) == 4
    assert "'norm.weight' in" in (told := capsys.readouterr().err)
    assert "flat index 2" in told
