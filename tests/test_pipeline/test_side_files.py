"""What lies beside the weights: the base's own files, only what the merge changes in them, and a card."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergepipe
from mergepipe.pipeline.outputs import put_values
from support.vocabularies import byte_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("default")


def merge(folder: Path, **more: Any) -> Path:
    """Two models of one tokenizer; the first lends its files."""
    tokenizer = byte_tokenizer(["ab"])
    models = [write_model(folder / name, tokenizer, seed, template="T") for seed, name in enumerate("ab")]
    config = json.loads((models[0].folder / "config.json").read_text())
    (models[0].folder / "config.json").write_text(json.dumps(config | CONFIG))
    (models[0].folder / "generation_config.json").write_text('{"top_k":  7, "eos_token_id": [1]}')
    (models[0].folder / "preprocessor_config.json").write_text("{}")
    listed = [{"model": str(model.folder), "parameters": {"weight": 1}} for model in models]
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": listed, **more}))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work").output


CONFIG: dict[str, Any] = {"zebra": [1, {"deep": True}], "dtype": "float32", "text_config": {"dtype": "float32", "x": 1}}


def test_files_are_the_bases_to_the_byte(tmp_path: Path) -> None:
    out = merge(tmp_path)
    names = {path.name for path in (tmp_path / "a").iterdir()} - {"model.safetensors"}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "a" / name).read_bytes(), name


def test_only_the_type_changes_and_where_parts_repeat_it(tmp_path: Path) -> None:
    """Keys keep their order."""
    out = merge(tmp_path, dtype="bfloat16")
    expected = json.loads((tmp_path / "a" / "config.json").read_text())
    expected["dtype"] = expected["text_config"]["dtype"] = "bfloat16"
    assert list(json.loads((out / "config.json").read_text()).items()) == list(expected.items())


def test_a_type_that_is_there_already_changes_nothing(tmp_path: Path) -> None:
    out = merge(tmp_path, dtype="float32")
    assert (out / "config.json").read_bytes() == (tmp_path / "a" / "config.json").read_bytes()


def test_a_part_of_a_type_of_its_own_keeps_it() -> None:
    values = {"torch_dtype": "float32", "vision": {"torch_dtype": "float16"}, "text": {"torch_dtype": "float32"}}
    put_values(values, {"torch_dtype": "bfloat16"})
    assert values == {
        "torch_dtype": "bfloat16", "vision": {"torch_dtype": "float16"}, "text": {"torch_dtype": "bfloat16"}
    }  # fmt: skip


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)])
def test_modes_are_as_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    """Weights included: others can read what they are meant to."""
    before = os.umask(umask)
    try:
        out = merge(tmp_path, tokenizer={"source": "base", "pad_to_multiple_of": 64}, chat_template="chatml")
    finally:
        os.umask(before)
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in out.iterdir()} == {
        path.name: oct(mode) for path in out.iterdir()
    }


def test_the_card(tmp_path: Path) -> None:
    """Its front matter is what the hub reads; below stand the method with its paper, and the recipe."""
    text = (merge(tmp_path, tokenizer_source="union") / "README.md").read_text()
    front, _, body = text.removeprefix("---\n").partition("\n---\n")
    values = yaml.safe_load(front)
    assert values["base_model"] == ["a", "b"]
    assert values["library_name"] == "transformers"
    assert values["tags"][:2] == ["mergekit", "merge"]
    assert "arxiv.org" in body
    recipe = yaml.safe_load(body.partition("```yaml\n")[2].partition("```")[0])
    assert (recipe["merge_method"], recipe["tokenizer_source"]) == ("linear", "union")
    assert [entry["model"] for entry in recipe["models"]] == ["a", "b"]
    assert str(tmp_path) not in text
