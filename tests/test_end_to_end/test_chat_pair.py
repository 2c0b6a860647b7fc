"""Two models of one family with other added tokens and other chat templates, merged by SCF-RKL, either one first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import mergepipe
from support.checkpoints import read_tensors
from support.language import make_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers imports modules that warn about themselves

ADDED = {"instruct": ("<|user|>", "<|assistant|>"), "reasoning": ("<think>", "</think>")}
TEMPLATES = {
    "instruct": "<|user|>{{ messages[0].content }}<|assistant|>",
    "reasoning": "{{ messages[0].content }}<think>",
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both models: of one vocabulary size, whose last two tokens mean something else in each."""
    folder = tmp_path_factory.mktemp("pair")
    tokenizers = {name: make_tokenizer(ADDED[name], template=TEMPLATES[name]) for name in ADDED}
    base = write_model(folder / "base", tokenizers["instruct"])
    return {
        name: write_model(folder / name, tokenizer, seed=seed, start=base, changed=0.05)
        for seed, (name, tokenizer) in enumerate(tokenizers.items(), 1)
    }


def merge(pair: dict[str, Path], primary: str, donor: str, folder: Path) -> Path:
    recipe: dict[str, Any] = {
        "merge_method": "scf_rkl",
        "base_model": str(pair[primary]),
        "models": [{"model": str(pair[donor])}],
        "parameters": {"quantile": 0.75},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mergepipe.build(path, work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work").output


@pytest.mark.parametrize(("primary", "donor"), [("instruct", "reasoning"), ("reasoning", "instruct")])
def test_the_primary_gives_tokens_template_and_most_of_the_weights(
    pair: dict[str, Path], tmp_path: Path, primary: str, donor: str
) -> None:
    merged = merge(pair, primary, donor, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.convert_ids_to_tokens([11, 12]) == list(ADDED[primary])
    said = tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False)
    assert said == TEMPLATES[primary].replace("{{ messages[0].content }}", "abc")

    a, b, found = (read_tensors(folder) for folder in (pair[primary], pair[donor], merged))
    taken = total = 0
    for name, value in found.items():
        differs = a[name] != b[name]
        from_b = (value == b[name]) & differs
        assert torch.equal(value, torch.where(from_b, b[name], a[name])), "each element is one of the two, to the bit"
        taken, total = taken + int(from_b.sum()), total + value.numel()
    assert 0.2 < taken / total < 0.3

    model, info = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items() if keys} == {}
    assert json.loads((merged / "config.json").read_text(encoding="utf-8"))["vocab_size"] == len(tokenizer)
    ids = torch.tensor([tokenizer(said)["input_ids"]])
    assert torch.isfinite(model(ids).logits).all()


def test_swapping_the_primary_is_another_merge(pair: dict[str, Path], tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    one = read_tensors(merge(pair, "instruct", "reasoning", tmp_path / "one"))
    other = read_tensors(merge(pair, "reasoning", "instruct", tmp_path / "other"))
    differing = sum(int((one[name] != other[name]).sum()) for name in one)
    assert differing > 0.4 * sum(value.numel() for value in one.values())
