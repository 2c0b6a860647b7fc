"""Two models with different added tokens and chat templates merge, and transformers uses the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from support.vocabularies import Model, byte_tokenizer, expected_rows, write_llama

pytestmark = pytest.mark.filterwarnings("default")

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
METHODS: dict[str, dict[str, Any]] = {
    "scf_rkl": {},
    "slerp": {"t": 0.3},
    "ties": {"weight": 0.5, "density": 0.4},
    "arcee_fusion": {},
    "mda": {},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    folder = tmp_path_factory.mktemp("pair")
    plain = ["ab", "cd"]
    reasons = byte_tokenizer(plain, {"<think>": False, "</think>": False})
    chats = byte_tokenizer(plain, {"<|im_start|>": True, "<|im_end|>": True, "<think>": False})
    return (
        write_llama(folder / "reasons", reasons, 1, template="<think>{{ messages[0]['content'] }}"),
        write_llama(folder / "chats", chats, 2, template="<|im_start|>{{ messages[0]['content'] }}<|im_end|>"),
    )


def merge(folder: Path, method: str, primary: Path, donor: Path, **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    document = {"merge_method": method, "base_model": str(primary), "models": [{"model": str(donor)}], **more}
    if METHODS[method]:
        document["parameters"] = METHODS[method]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    return mergepipe.run(folder / "work", workers=2, device="cpu").output


def rearranged(folder: Path, models: list[Model], which: int, ids: dict[str, int]) -> Path:
    """A model with its tables put by hand into another vocabulary."""
    model = transformers.AutoModelForCausalLM.from_pretrained(models[which].folder)
    model.resize_token_embeddings(len(ids))
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in TABLES:
        tensors[name] = torch.from_numpy(expected_rows(ids, models, name, which).astype(np.float32))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "method", [name if name == "scf_rkl" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_a_merge_over_a_union_is_that_of_tables_put_in_order_by_hand(
    pair: tuple[Model, Model], method: str, swapped: bool, tmp_path: Path
) -> None:
    """To the byte, whichever model is the primary; the tokenizer and the template are the primary's."""
    models = list(reversed(pair)) if swapped else list(pair)
    primary, donor = (model.folder for model in models)
    out = merge(tmp_path / "union", method, primary, donor, tokenizer_source="union")
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer.get_vocab()
    assert set(ids) == {*models[0].vocab, *models[1].vocab}
    assert models[0].vocab.items() <= ids.items()
    by_hand = [rearranged(tmp_path / f"by-hand-{n}", models, n, ids) for n in (0, 1)]
    expected = load_file(merge(tmp_path / "plain", method, *by_hand) / "model.safetensors")
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert model.config.vocab_size == len(ids)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "ab cd"}], tokenize=False)
    assert text == ("<|im_start|>ab cd<|im_end|>" if swapped else "<think>ab cd")
    tokens = tokenizer("<think>ab<|im_end|>", return_tensors="pt")
    assert {ids["<think>"], ids["<|im_end|>"]} <= set(tokens.input_ids[0].tolist())
    assert torch.isfinite(model(input_ids=tokens.input_ids).logits).all()


def test_scf_rkl_without_the_key_says_what_to_do(pair: tuple[Model, Model], tmp_path: Path) -> None:
    with pytest.raises(mergepipe.errors.CheckpointError, match="tokenizer_source: union"):
        merge(tmp_path, "scf_rkl", pair[0].folder, pair[1].folder)


def test_a_merge_of_a_merge_adds_to_its_vocabulary(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Several documents: the later one reads the earlier one's tokenizer before it is written."""
    third = write_llama(tmp_path / "third", byte_tokenizer(["ab", "cd"], {"<x>": True}), 3)
    plain = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "union"}
    first = {**plain, "name": "first", "models": [{"model": str(model.folder)} for model in pair]}
    second = {**plain, "models": [{"model": "first"}, {"model": str(third.folder)}]}
    second |= {"base_model": "first", "chat_template": "auto"}
    first |= {"base_model": str(pair[0].folder)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump_all([first, second]))
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    out = mergepipe.run(tmp_path / "work").output
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    assert set(ids) == {*pair[0].vocab, *pair[1].vocab, "<x>"}
    found = load_file(out / "model.safetensors")
    for name in TABLES:
        tables = [expected_rows(ids, list(pair), name, number) for number in (0, 1)]
        middle = (tables[0] + tables[1]) / 2
        own = third.tables[name][[third.vocab.get(token, 0) for token in sorted(ids, key=ids.__getitem__)]]
        for token, number in ids.items():
            if token == "<x>":
                row = third.tables[name][third.vocab[token]]
            elif token in third.vocab:
                row = (middle[number] + own[number]) / 2
            else:
                row = middle[number]
            assert np.allclose(found[name][number].numpy(), row, atol=1e-6), (name, token)
    assert (out / "chat_template.jinja").read_text().startswith("<think>")
