"""Every method and sparsifier has its page in docs/methods.md, and every recipe there is one that builds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import mergepipe
from mergepipe.tasks.method import MergeMethod, Sparsifier
from mergepipe.tasks.registry import METHODS, SPARSIFIERS
from support.whole import family, write

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
WORDS = ("when", "cost", "parameter", "how sure", "```yaml")
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (8, 12),
    "model.layers.0.mlp.up_proj.weight": (12, 9),
    "model.layers.0.self_attn.q_proj.weight": (9, 12),
    "model.norm.weight": (12,),
}

ADAPTER = {"A": (2, 12), "B": (9, 2)}


def sections() -> list[tuple[str, str]]:
    """Headings of the second and third level, each with what stands below it."""
    parts = re.split(r"^###? (.*)\n", TEXT, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def page_of(name: str, *, sparsifier: bool) -> str:
    """The fullest page of a method, or of a sparsifier; two of them share their names with methods."""
    headings = [heading for heading, _ in sections()]
    start = headings.index("Each sparsifier")
    found = [
        text
        for number, (heading, text) in enumerate(sections())
        if re.search(rf"`(merge_method: )?{name}`", heading) and (number > start) == sparsifier
    ]
    assert found, f"docs/methods.md has no page for {name}"
    return max(found, key=lambda text: sum(word in text.lower() for word in WORDS))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_its_page(name: str) -> None:
    page = page_of(name, sparsifier=False)
    for word in WORDS:
        assert word in page.lower(), f"the page of {name} says nothing of '{word}'"
    specification = METHODS[name].specification
    assert specification == "published" or specification in page
    assert_lists_are_there(METHODS[name], page)
    named = {parameter.name for parameter in METHODS[name].parameters if not parameter.without_effect}
    listed = page.partition("**Parameters**")[2].partition("\n* **How sure**")[0]
    others = {p.name for entry in (METHODS, SPARSIFIERS) for m in entry.values() for p in m.parameters} - named
    shared = {p.name for heading, text in sections() if text == page for other in re.findall(r"`(\w+)`", heading)
              for p in METHODS[other].parameters}  # fmt: skip
    wrong = set(re.findall(r"`(\w+)[`:]", listed)) & (others - shared) - {"scope"}
    assert not wrong, f"the page of {name} names parameters that it has not: {wrong}"


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_every_sparsifier_has_its_page(name: str) -> None:
    page = page_of(name, sparsifier=True)
    assert "```yaml" in page
    assert f"sparsify: {name}\n" in page or f"sparsify: {{method: {name}," in page
    assert SPARSIFIERS[name].specification == "published" or SPARSIFIERS[name].specification in page
    assert_lists_are_there(SPARSIFIERS[name], page)


def assert_lists_are_there(declared: MergeMethod | Sparsifier, page: str) -> None:
    """What is known of the original of a reconstruction, and what is our choice; nothing of what is published."""
    assert bool(declared.known) == bool(declared.chosen) == (declared.specification != "published")
    missing = [line for line in (*declared.known, *declared.chosen) if f"- {line}\n" not in page]
    assert not missing


RECIPES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models under the names that the recipes use."""
    folder = tmp_path_factory.mktemp("models")
    base, experts = family(5, models=5, shapes=SHAPES)
    names = ("base", "expert-a", "expert-b", "expert-c", "instruct", "reasoning")
    for name, model in zip(names, (base, *experts), strict=True):
        write(folder / name, model)
        assert all(np.isfinite(value).all() for value in model.values())
    for name, model in zip(("importance-a", "importance-b"), experts, strict=False):
        write(folder / name, {tensor: np.abs(value) for tensor, value in model.items()})
    rng = np.random.default_rng(6)
    for name in ("adapter-a", "adapter-b"):
        pair = {f"base_model.model.q.lora_{side}.weight": rng.normal(size=shape) for side, shape in ADAPTER.items()}
        write(folder / name, pair)
        (folder / name / "model.safetensors").rename(folder / name / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_every_recipe_builds(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.chdir(models)
    recipe: dict[str, Any] = yaml.safe_load(RECIPES[number])
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[number])
    plan = mergepipe.build(path, work=tmp_path / "work", out=tmp_path / "merged", memory="2GiB")
    assert recipe["merge_method"] in METHODS
    assert plan is not None
