"""8-bit checkpoints merge as the weights that they stand for; what is not understood is refused with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import CheckpointError
from mergepipe.pipeline.models import open_model

SHAPES = {"model.layers.0.mlp.up_proj.weight": (300, 200), "model.layers.0.mlp.down_proj.weight": (130, 256)}
NORM = "model.norm.weight"


def quantise(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and the scales to multiply them by."""
    rows, width = weight.shape
    padded = torch.zeros(-(-rows // block[0]) * block[0], -(-width // block[1]) * block[1])
    padded[:rows, :width] = weight
    blocks = padded.view(padded.shape[0] // block[0], block[0], -1, block[1])
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :width]
    return codes.to(torch.float8_e4m3fn).contiguous(), scales


def dequantised(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    spread = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return codes.float() * spread[: codes.shape[0], : codes.shape[1]]


def write(folder: Path, seed: int, kind: str = "block") -> dict[str, torch.Tensor]:
    """An 8-bit checkpoint; the weights that it stands for."""
    torch.manual_seed(seed)
    block = {"block": (128, 128), "row": (1, 1 << 20), "tensor": (1 << 20, 1 << 20)}[kind]
    stored, meant = {NORM: torch.randn(200).bfloat16()}, {}
    meant[NORM] = stored[NORM].float()
    for name, shape in SHAPES.items():
        size = (min(block[0], shape[0]), min(block[1], shape[1]))
        codes, scales = quantise(torch.randn(shape), size)
        meant[name] = dequantised(codes, scales, size)
        stored[name] = codes
        stored[name + ("_scale_inv" if kind == "block" else "_scale")] = scales[0, 0] if kind == "tensor" else scales
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
    config: dict[str, Any] = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    if kind == "block":
        config["quantization_config"]["weight_block_size"] = [128, 128]
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def merge(folder: Path, recipe: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(folder / "recipe.yaml", folder / "work", out=folder / "merged", force=True, **options)
    mergepipe.run(folder / "work", restart=True)
    return load_file(folder / "merged" / "model.safetensors")


@pytest.mark.parametrize("kind", ["block", "row", "tensor"])
def test_weights_are_merged_as_what_they_stand_for(kind: str, tmp_path: Path) -> None:
    """With a plain model and another 8-bit one; bfloat16 by default; no scale and no word of it in the output."""
    base, fine = write(tmp_path / "base", 0, kind), write(tmp_path / "fine", 1, kind)
    torch.manual_seed(2)
    plain = {name: torch.randn(value.shape).bfloat16() for name, value in base.items()}
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain" / "model.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name), "parameters": {"weight": 0.25}} for name in ("fine", "plain")],
    }
    found = merge(tmp_path, recipe)
    assert found.keys() == base.keys()
    for name, value in found.items():
        b = base[name].double()
        expected = b + 0.25 * (fine[name].double() - b) + 0.25 * (plain[name].double() - b)
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value.double(), expected, rtol=2**-8, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8")) == {"model_type": "llama"}


def test_passing_through_dequantises_and_any_cut_gives_the_same(tmp_path: Path) -> None:
    """A tensor that would be copied is written as what it stands for, rounded once; whatever the chunk."""
    meant = write(tmp_path / "base", 0)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "base")}], "dtype": "float32"}
    found = merge(tmp_path, recipe)
    assert all(torch.equal(found[name], value) for name, value in meant.items())
    copied = merge_again(tmp_path, recipe, chunk_size=5000, store="copy")
    assert all(torch.equal(copied[name], value) for name, value in meant.items())


def merge_again(folder: Path, recipe: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    import shutil

    shutil.rmtree(folder / "merged")
    shutil.rmtree(folder / "work")
    return merge(folder, recipe, **options)


def change(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def test_what_does_not_fit_is_refused_with_the_reason(tmp_path: Path) -> None:
    write(tmp_path / "m", 0)
    folder, path = tmp_path / "m", tmp_path / "m" / "model.safetensors"
    change(folder, quantization_config={"quant_method": "fp8"})
    with pytest.raises(CheckpointError, match=r"scales are \(3, 2\), and its config\.json has no weight_block_size"):
        open_model(str(folder))
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(CheckpointError, match=r"has weight_block_size \[64, 64\]: they do not fit"):
        open_model(str(folder))
    change(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    tensors = load_file(path)
    name = next(iter(SHAPES))
    save_file({key: value for key, value in tensors.items() if key != name + "_scale_inv"}, path)
    with pytest.raises(CheckpointError, match=f"'{name}' is F8_E4M3 and has no scales"):
        open_model(str(folder))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "awq"])
def test_other_quantisations_stay_refused(method: str, tmp_path: Path) -> None:
    write(tmp_path / "m", 0)
    change(tmp_path / "m", quantization_config={"quant_method": method})
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "m")}]}
    with pytest.raises(CheckpointError, match=f"quantization_config \\({method}\\)"):
        merge(tmp_path, recipe)


def test_a_code_that_is_no_number(tmp_path: Path) -> None:
    write(tmp_path / "m", 0)
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(SHAPES))
    tensors[name].view(torch.uint8)[2, 3] = 0x7F
    save_file(tensors, path)
    recipe = {"merge_method": "passthrough", "models": [{"model": str(tmp_path / "m")}]}
    with pytest.raises(mergepipe.errors.NonFiniteError, match=f"'{name}' .* at element 403"):
        merge(tmp_path, recipe)
