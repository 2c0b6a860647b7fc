"""`emr_unified` where the base is not read as it lies: slices, another vocabulary, adapters, an earlier merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import yaml
from safetensors.numpy import load_file

import mergepipe
from mergepipe.errors import CheckpointError, RecipeError
from mergepipe.pipeline.materialize import materialize
from mergepipe.pipeline.space import output_need
from support import whole
from support.plain_adapters import write_adapter
from support.vocabularies import TABLES, Model, byte_tokenizer, expected_rows, write_model

pytestmark = pytest.mark.filterwarnings("default")

SHAPES: dict[str, tuple[int, ...]] = {
    "embed.weight": (30, 8),
    **{f"layers.{n}.{part}.weight": (9, 8) for n in range(3) for part in ("up", "down")},
    "norm.weight": (8,),
}


@pytest.fixture
def models(tmp_path: Path) -> tuple[whole.Model, list[whole.Model]]:
    """A base and two experts, written in `base`, `e0` and `e1`."""
    base, experts = whole.family(3, models=2, shapes=SHAPES)
    for name, model in (("base", base), ("e0", experts[0]), ("e1", experts[1])):
        whole.write(tmp_path / name, model)
    return base, experts


def merge(folder: Path, *documents: dict[str, Any]) -> Path:
    text = yaml.safe_dump_all(documents).replace("@", f"{folder}/")
    (folder / "recipe.yaml").write_text(text)
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work", workers=2).output


def read(folder: Path) -> whole.Model:
    """The values of a checkpoint of one file or several."""
    files = sorted(folder.glob("model*.safetensors"))
    return {name: value.astype("f8") for path in files for name, value in load_file(path).items()}


def check_tasks(folder: Path, base: whole.Model, experts: list[whole.Model]) -> None:
    """The unified model and both tasks, against models put together by hand."""
    unified, tasks, _ = whole.emr(base, experts)
    found = read(folder / "merged")
    assert found.keys() == unified.keys()
    for name, value in unified.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    for number, expected in enumerate(tasks):
        made = read(materialize(folder / "merged", task=f"e{number}", out=folder / f"task-{number}"))
        for name, value in expected.items():
            np.testing.assert_allclose(made[name], value, rtol=1e-6, atol=1e-6, err_msg=name)


def stacked(model: whole.Model, layers: list[int]) -> whole.Model:
    """A model of these layers, numbered anew."""
    made = {name: value for name, value in model.items() if not name.startswith("layers")}
    for number, layer in enumerate(layers):
        made |= {f"layers.{number}.{part}.weight": model[f"layers.{layer}.{part}.weight"] for part in ("up", "down")}
    return made


def test_tasks_of_a_stack(models: tuple[whole.Model, list[whole.Model]], tmp_path: Path) -> None:
    """Layers taken in another order and twice: rescalers are over all of them, masks know the base's names."""
    base, experts = models
    cuts = [(0, 2), (1, 3)]
    slices = [
        {"sources": [{"model": f"@{name}", "layer_range": list(cut)} for name in ("base", "e0", "e1")]} for cut in cuts
    ]
    merge(tmp_path, {"merge_method": "emr_unified", "base_model": "@base", "slices": slices})
    layers = [0, 1, 1, 2]
    check_tasks(tmp_path, stacked(base, layers), [stacked(expert, layers) for expert in experts])


def test_tasks_over_two_bases_are_refused(models: tuple[whole.Model, list[whole.Model]], tmp_path: Path) -> None:
    slices = [
        {"base_model": f"@{base}", "sources": [{"model": f"@{name}", "layer_range": cut} for name in (base, "e1")]}
        for base, cut in (("base", [0, 2]), ("e0", [2, 3]))
    ]
    with pytest.raises(RecipeError, match="would be over several bases, 'base' and 'e0'"):
        merge(tmp_path, {"merge_method": "emr_unified", "slices": slices})


def test_tasks_over_a_base_that_an_earlier_merge_makes(
    models: tuple[whole.Model, list[whole.Model]], tmp_path: Path
) -> None:
    """The workspace holds the base then; it is known by its plan, whatever times its files have."""
    base, experts = models
    mean = {"name": "mean", "merge_method": "linear", "parameters": {"weight": 1}}
    mean["models"] = [{"model": "@base"}, {"model": "@e1"}]
    merge(
        tmp_path,
        mean,
        {"merge_method": "emr_unified", "base_model": "mean", "models": [{"model": "@e0"}, {"model": "@e1"}]},
    )
    middle = {name: (value + experts[1][name]) / 2 for name, value in base.items()}
    check_tasks(tmp_path, middle, experts)


def test_tasks_over_another_vocabulary(tmp_path: Path) -> None:
    """The base's tables as they were merged lie beside the masks, and count as disk space."""
    plain = ["ab", "cd"]
    models: list[Model] = [
        write_model(tmp_path / "base", byte_tokenizer(plain), 0),
        write_model(tmp_path / "e0", byte_tokenizer(plain, {"<chat>": True, "<tool>": False}), 1),
        write_model(tmp_path / "e1", byte_tokenizer(plain, {"<x>": True}), 2),
    ]
    document = {"merge_method": "emr_unified", "base_model": "@base", "tokenizer_source": "union"}
    out = merge(tmp_path, document | {"models": [{"model": "@e0"}, {"model": "@e1"}]})
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    fitted = []
    for which, model in enumerate(models):
        values = read(model.folder)
        fitted.append(values | {name: expected_rows(ids, models, name, which) for name in TABLES})
    check_tasks(tmp_path, fitted[0], fitted[1:])
    assert sorted(path.name for path in (out / "tasks").iterdir()) == ["base.safetensors", "e0", "e1"]
    kept = load_file(out / "tasks" / "base.safetensors")
    assert set(kept) == set(TABLES)
    assert all(np.array_equal(kept[name], fitted[0][name].astype("f4")) for name in TABLES)
    plan = mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "again", out=tmp_path / "other")
    written = sum(path.stat().st_size for path in (out / "tasks").rglob("*") if path.is_file())
    assert output_need(plan).nbytes >= plan.layout().nbytes + written


def test_tasks_over_a_base_with_an_adapter(models: tuple[whole.Model, list[whole.Model]], tmp_path: Path) -> None:
    """No file holds such a base: refused. Made in a document of its own, as the message says, it is one like any."""
    base, experts = models
    adapted = write_adapter(tmp_path / "lora", base, ["layers.1.up.weight"], 5)
    expert = write_adapter(tmp_path / "lora-0", experts[0], ["layers.0.up.weight", "layers.1.up.weight"], 6)
    listed = [{"model": "@e0+@lora-0"}, {"model": "@e1"}]
    with pytest.raises(CheckpointError, match="a document of its own before this one"):
        merge(tmp_path, {"merge_method": "emr_unified", "base_model": "@base+@lora", "models": listed})
    whole_base = {"name": "whole", "merge_method": "passthrough", "models": [{"model": "@base+@lora"}]}
    merge(tmp_path, whole_base, {"merge_method": "emr_unified", "base_model": "whole", "models": listed})
    (tmp_path / "merged" / "tasks" / "e0+lora-0").rename(tmp_path / "merged" / "tasks" / "e0")
    check_tasks(tmp_path, adapted, [expert, experts[1]])
