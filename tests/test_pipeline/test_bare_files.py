"""State dicts without a configuration, each a file of its own; and tensors that not all of them have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import TensorMismatchError
from mergepipe.pipeline.check import check

SHAPES = {"unet.conv.weight": (4, 3, 3, 3), "unet.norm.bias": (4,), "logit_scale": ()}


def state(seed: int, **more: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (SHAPES | more).items()}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Three files of two formats; `b` has a tensor of its own, `c` lacks one and has another."""
    states = {"a.safetensors": state(0, both=(5,)), "b.pt": state(1, both=(5,), only_b=(2, 2)), "c.ckpt": state(2)}
    save_file(states["a.safetensors"], tmp_path / "a.safetensors")
    torch.save(states["b.pt"], tmp_path / "b.pt")
    torch.save({"state_dict": states["c.ckpt"], "epoch": 3}, tmp_path / "c.ckpt")
    return states


def merge(
    folder: Path, method: str, names: list[str], base: str | None = None, **options: Any
) -> dict[str, torch.Tensor]:
    weights = [1.0, 2.0, 4.0]
    models = [{"model": str(folder / n), "parameters": {"weight": weights[i]}} for i, n in enumerate(names)]
    recipe: dict[str, Any] = {"merge_method": method, "models": models}
    if base is not None:
        recipe["base_model"] = str(folder / base)
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    plan = mergepipe.build(folder / "r.yaml", folder / "w", out=folder / "out", force=True, **options)
    mergepipe.run(folder / "w", restart=True)
    assert any("epoch beside the state dict" in note for note in plan.notes) is ("c.ckpt" in names)
    return load_file(folder / "out" / "model.safetensors")


def test_files_of_one_set_of_tensors(tmp_path: Path) -> None:
    states = [state(0), state(1)]
    save_file(states[0], tmp_path / "a.safetensors")
    torch.save(states[1], tmp_path / "b.bin")
    found = merge(tmp_path, "linear", ["a.safetensors", "b.bin"])
    for name in SHAPES:
        torch.testing.assert_close(found[name], (states[0][name] + 2 * states[1][name]) / 3)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["README.md", "mergepipe_manifest.json", "model.safetensors"]
    assert "library_name" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (
        json.loads((tmp_path / "out" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["inputs"][1]["model"]
        == "b.bin"
    )


def test_files_that_differ_are_an_error_by_default(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match="--tensors union or intersection") as caught:
        merge(tmp_path, "linear", list(files))
    assert "'only_b' is in" in str(caught.value)
    assert {fault.kind for fault in check(tmp_path / "r.yaml", tmp_path / "w2").faults} == {"checkpoint"}
    assert check(tmp_path / "r.yaml", tmp_path / "w2", tensors="union").faults == ()


def test_the_intersection(files: dict[str, Any], tmp_path: Path) -> None:
    found = merge(tmp_path, "linear", list(files), tensors="intersection")
    assert found.keys() == SHAPES.keys()
    for name in SHAPES:
        expected = sum(weight * files[file][name] for weight, file in zip((1, 2, 4), files, strict=True)) / 7
        torch.testing.assert_close(found[name], expected)


def test_the_union(files: dict[str, Any], tmp_path: Path) -> None:
    """Each tensor is the average of those who have it, with their own weights."""
    found = merge(tmp_path, "linear", list(files), tensors="union")
    assert found.keys() == {*SHAPES, "both", "only_b"}
    torch.testing.assert_close(found["both"], (files["a.safetensors"]["both"] + 2 * files["b.pt"]["both"]) / 3)
    assert torch.equal(found["only_b"], files["b.pt"]["only_b"])


def test_the_union_over_a_base(files: dict[str, Any], tmp_path: Path) -> None:
    """What the base lacks has no delta and is copied; what experts lack has fewer."""
    found = merge(tmp_path, "task_arithmetic", ["b.pt", "c.ckpt"], base="a.safetensors", tensors="union")
    base, b = files["a.safetensors"], files["b.pt"]
    torch.testing.assert_close(found["both"], base["both"] + (b["both"] - base["both"]))
    assert torch.equal(found["only_b"], b["only_b"])


def test_the_union_with_shapes_that_differ_is_an_error(files: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state(3, both=(6,)), tmp_path / "b.pt")
    with pytest.raises(TensorMismatchError, match=r"'both' is \(5,\) in .* but \(6,\)"):
        merge(tmp_path, "linear", list(files), tensors="union")


@pytest.mark.parametrize("method", ["slerp", "model_stock"])
def test_a_method_with_too_few_models_copies(method: str, files: dict[str, Any], tmp_path: Path) -> None:
    """A tensor that only one of two models has can't be interpolated."""
    names = ["b.pt"] if method == "slerp" else ["b.pt", "c.ckpt"]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "base_model": str(tmp_path / "a.safetensors"),
        "models": [{"model": str(tmp_path / name)} for name in names],
        "parameters": {"t": 0.5} if method == "slerp" else {},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    plan = mergepipe.build(tmp_path / "r.yaml", tmp_path / "w", out=tmp_path / "out", tensors="union")
    mergepipe.run(tmp_path / "w")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["only_b"], files["b.pt"]["only_b"])
    assert any("too few models have it" in note for note in plan.notes)
    if method == "model_stock":
        assert torch.equal(found["both"], files["a.safetensors"]["both"])
