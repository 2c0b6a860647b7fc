"""`mergepipe inspect`: headers, differences, task vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

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
    told = capsys.readouterr().err
    assert f"'norm.weight' of '{models}/expert-2'" in told
    assert "element 2 (flat index" in told


def test_a_model_is_named_as_in_a_recipe(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an adapter it is what the adapter makes of it; a file stands for itself; 8-bit codes are shown as stored."""
    rng = np.random.default_rng(0)
    base = load_file(models / "base" / "model.safetensors")
    name = next(name for name, value in base.items() if value.ndim == 2)
    rows, columns = base[name].shape
    factors = {"A": rng.normal(size=(2, columns)), "B": rng.normal(size=(rows, 2))}
    (models / "lora").mkdir()
    stem = name.removesuffix(".weight")
    save_file(
        {f"base_model.model.{stem}.lora_{side}.weight": value.astype(np.float32) for side, value in factors.items()},
        models / "lora" / "adapter_model.safetensors",
    )
    (models / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 6}')
    found = inspected(capsys, "base/model.safetensors", "base+lora", "--stats")["statistics"]
    assert found["models"] == [f"{models}/base+{models}/lora"]
    norms = {entry["name"]: entry["norms"][0] for entry in found["tensors"]}
    assert norms.pop(name) == pytest.approx(np.linalg.norm(3 * factors["B"] @ factors["A"]), rel=1e-5)
    assert set(norms.values()) == {0.0}
    assert {tensor["name"] for tensor in inspected(capsys, "base+lora")["checkpoints"][0]["tensors"]} == base.keys()


def test_8_bit_weights_are_compared_as_what_they_stand_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = torch.arange(-8.0, 8.0).reshape(4, 4)
    for model, tensors in (
        ("codes", {"w.weight": numbers.to(torch.float8_e4m3fn), "w.weight_scale_inv": torch.tensor([[0.5]])}),
        ("plain", {"w.weight": (numbers / 2).bfloat16()}),
    ):
        (tmp_path / model).mkdir()
        save_torch(tensors, tmp_path / model / "model.safetensors")
    listed = inspected(capsys, str(tmp_path / "codes"))["checkpoints"][0]
    assert set(listed["dtypes"]) == {"F8_E4M3", "F32"}
    found = inspected(capsys, str(tmp_path / "plain"), str(tmp_path / "codes"), "--stats")
    assert found["statistics"]["total"]["norms"] == [0.0]
    assert found["differences"][0]["extra"] == found["differences"][0]["other_dtype"] == []
