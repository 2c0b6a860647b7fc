"""Models with adapters (`model+lora`) in slices, in several documents, and over merged vocabularies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from safetensors.numpy import load_file

import mergepipe
from mergepipe.errors import CheckpointError
from support import whole
from support.plain_adapters import write_adapter
from support.vocabularies import TABLES, byte_tokenizer, expected_rows, write_model

pytestmark = pytest.mark.filterwarnings("default")

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (30, 8),
    **{f"layers.{n}.{part}.weight": (9, 8) for n in range(3) for part in ("up", "down")},
    "norm.weight": (8,),
}


def merge(folder: Path, *documents: dict[str, Any]) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all(documents).replace("@", f"{folder}/"))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work", workers=2).output


def read(folder: Path) -> whole.Model:
    files = sorted(folder.glob("model*.safetensors"))
    return {name: value.astype("f8") for path in files for name, value in load_file(path).items()}


def test_slices_of_models_with_adapters(tmp_path: Path) -> None:
    """Each layer with what the adapter has for it there, wherever it comes to stand."""
    base, (expert,) = whole.family(4, models=1, shapes=SHAPES)
    whole.write(tmp_path / "base", base)
    whole.write(tmp_path / "expert", expert)
    tuned = write_adapter(tmp_path / "lora", base, [f"layers.{n}.up.weight" for n in range(3)], 1)
    other = write_adapter(tmp_path / "lora-1", expert, ["layers.2.down.weight", "embed.weight"], 2)
    names = "@base+@lora", "@expert+@lora-1"
    cuts = [((0, 1), (2, 3)), ((0, 2), (1, 3))]
    slices = [
        {"sources": [{"model": n, "layer_range": list(cut)} for n, cut in zip(names, both, strict=True)]}
        for both in cuts
    ]
    document = {"merge_method": "linear", "parameters": {"weight": 1}, "slices": slices, "dtype": "float32"}
    found = read(merge(tmp_path, document))
    for number, (one, two) in enumerate([(0, 2), (0, 1), (1, 2)]):
        for part in ("up", "down"):
            mean = (tuned[f"layers.{one}.{part}.weight"] + other[f"layers.{two}.{part}.weight"]) / 2
            np.testing.assert_allclose(found[f"layers.{number}.{part}.weight"], mean, rtol=1e-6, atol=1e-6)
    for name in ("embed.weight", "norm.weight"):
        np.testing.assert_allclose(found[name], (tuned[name] + other[name]) / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("on", ["model.layers.0.mlp.up.weight", "lm_head.weight"])
def test_adapters_and_a_merged_vocabulary(on: str, tmp_path: Path) -> None:
    """Applied where rows stay as they lie; where tables move, the model is made first, by the same recipe."""
    models = [
        write_model(tmp_path / "base", byte_tokenizer(["ab"]), 0),
        write_model(tmp_path / "chat", byte_tokenizer(["ab"], {"<chat>": True}), 1),
    ]
    values = read(models[0].folder)
    tuned = write_adapter(tmp_path / "lora", values, [on], 3)
    plain = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "union"}
    direct = plain | {"models": [{"model": "@base+@lora"}, {"model": "@chat"}]}
    if on in TABLES:
        with pytest.raises(CheckpointError, match="in a document of its own"):
            merge(tmp_path, direct)
        first = {"name": "tuned", "merge_method": "passthrough", "models": [{"model": "@base+@lora"}]}
        out = merge(tmp_path, first, plain | {"models": [{"model": "tuned"}, {"model": "@chat"}]})
        models[0].tables[on] = tuned[on]
    else:
        out = merge(tmp_path, direct)
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    found, other = read(out), read(models[1].folder)
    for name, value in found.items():
        if name in TABLES:
            expected = np.mean([expected_rows(ids, models, name, which, base=None) for which in (0, 1)], axis=0)
        else:
            expected = (tuned[name] + other[name]) / 2
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6, err_msg=name)
