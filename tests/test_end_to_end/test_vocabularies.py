"""Two models with different added tokens and chat templates merge, and transformers uses the result."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import Interrupted
from mergepipe.pipeline.events import UnitFinished
from support.jobs import hashes
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
    assert (out / "chat_template.jinja").read_text(encoding="utf-8").startswith("<think>")


def chain_over_a_union(pair: tuple[Model, Model], folder: Path) -> tuple[list[dict[str, Any]], Model]:
    """A mean without the tokens of a third model, then the mean of both over the union: rows are made of made ones."""
    third = write_llama(folder / "third", byte_tokenizer(["ab", "cd", "op"], {"<x>": True, "<think>": False}), 3)
    plain = {"merge_method": "linear", "parameters": {"weight": 1}}
    first = plain | {"name": "first", "tokenizer_source": "base", "base_model": str(pair[0].folder)}
    first["models"] = [{"model": str(model.folder)} for model in pair]
    tokens = {"<new>": {"source": {"kind": "zero"}}, "<|im_end|>": {"source": str(pair[1].folder)}}
    second = plain | {"tokenizer": {"source": "union", "pad_to_multiple_of": 16, "tokens": tokens}}
    second["models"] = [{"model": name} for name in ("first", str(third.folder), str(pair[1].folder))]
    return [first, second], third


def build_chain(folder: Path, documents: list[dict[str, Any]], out: str = "merged") -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all(documents))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / out, chunk_size="4KiB")


def test_rows_are_made_of_models_that_the_recipe_makes_itself(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Means, zeros and padding from a model that is not there when the plan is made; the same in two recipes."""
    documents, third = chain_over_a_union(pair, tmp_path)
    build_chain(tmp_path, documents)
    assert (tmp_path / "work" / "vocabulary" / "wanted").exists()
    out = mergepipe.run(tmp_path / "work").output
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    assert set(ids) == {*pair[0].vocab, *pair[1].vocab, *third.vocab, "<new>"}
    first = {
        name: value.double().numpy()
        for name, value in load_file(tmp_path / "work" / "merged" / "first" / "model.safetensors").items()
    }
    made = Model(tmp_path, pair[0].vocab, first)
    found = load_file(out / "model.safetensors")
    models = [made, third, pair[1]]
    for name in TABLES:
        tables = [expected_rows(ids, models, name, which, base=None) for which in range(3)]
        for table in tables[:2]:
            table[ids["<|im_end|>"]] = pair[1].tables[name][pair[1].vocab["<|im_end|>"]]
        expected = np.mean(tables, axis=0)
        assert len(found[name]) % 16 == 0
        assert np.allclose(found[name][: len(expected)].numpy(), expected, atol=1e-6), name
        padding = np.mean([table.mean(0) for table in tables], axis=0)
        assert np.allclose(found[name][len(expected) :].numpy(), padding, atol=1e-6), name
    _, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    steps = tmp_path / "steps"
    steps.mkdir()
    apart = [dict(document) for document in documents]
    apart[1]["models"] = [{"model": str(steps / "first")}, *apart[1]["models"][1:]]
    for number, (document, target) in enumerate(zip(apart, ("first", "merged"), strict=True)):
        (steps / "recipe.yaml").write_text(yaml.safe_dump(document))
        mergepipe.build(steps / "recipe.yaml", work=steps / f"work-{number}", out=steps / target)
        mergepipe.run(steps / f"work-{number}")
    by_hand = load_file(steps / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in by_hand.items())


def test_a_chain_over_a_union_goes_on_to_the_same_bytes(pair: tuple[Model, Model], tmp_path: Path) -> None:
    """Stopped again and again, also before rows are made of the merge that lends them; only what changed is redone."""
    documents, _ = chain_over_a_union(pair, tmp_path)
    build_chain(tmp_path, documents)
    lives = 0
    while True:
        stop, seen = threading.Event(), [0]

        def listen(event: object, stop: threading.Event = stop, seen: list[int] = seen, after: int = 1 + lives) -> None:
            seen[0] += isinstance(event, UnitFinished)
            if seen[0] >= after:
                stop.set()

        try:
            mergepipe.run(tmp_path / "work", workers=1 + lives % 2, on_event=listen, stop=stop)
            break
        except Interrupted:
            lives += 1
        if lives % 3 == 2:
            build_chain(tmp_path, documents)
    assert lives >= 4
    other = tmp_path / "straight"
    other.mkdir()
    build_chain(other, documents)
    mergepipe.run(other / "work")
    assert hashes(other / "merged") == hashes(tmp_path / "merged")
    stamp = (tmp_path / "work" / "merged" / "first" / "model.safetensors").stat().st_mtime_ns
    documents[1]["tokenizer"]["pad_to_multiple_of"] = 8
    build_chain(tmp_path, documents, "second")
    mergepipe.run(tmp_path / "work")
    assert (tmp_path / "work" / "merged" / "first" / "model.safetensors").stat().st_mtime_ns == stamp
    assert hashes(tmp_path / "merged") != hashes(tmp_path / "second")


def layers(model: Model, first: int, end: int) -> dict[str, Any]:
    return {"model": str(model.folder), "layer_range": [first, end]}


SOURCES = ["union", "base", "model"]


def made(folder: Path, pair: tuple[Model, Model], source: str, document: dict[str, Any]) -> tuple[Any, dict[str, int]]:
    """The tensors of a merge with a tokenizer, which transformers loads, and the ids of that."""
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump(document | {"tokenizer_source": f"model:{pair[1].folder}" if source == "model" else source})
    )
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    out = mergepipe.run(folder / "work").output
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    ids = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    expected = {"base": set(pair[0].vocab), "model": set(pair[1].vocab), "union": {*pair[0].vocab, *pair[1].vocab}}
    assert set(ids) == expected[source]
    assert model.config.vocab_size == len(ids)
    assert torch.isfinite(model(input_ids=torch.tensor([sorted(ids.values())[-8:]])).logits).all()
    return {name: value.double().numpy() for name, value in model.state_dict().items()}, ids


@pytest.mark.parametrize("source", SOURCES)
def test_a_stack_of_models_of_two_vocabularies(pair: tuple[Model, Model], source: str, tmp_path: Path) -> None:
    """The embedding is the first slice's model's, the head the last one's, both in the rows of one vocabulary."""
    slices = [{"sources": [layers(model, 0, 2)]} for model in pair]
    found, ids = made(tmp_path, pair, source, {"merge_method": "passthrough", "slices": slices})
    for table, which in zip(TABLES, (0, 1), strict=True):
        assert np.array_equal(found[table], expected_rows(ids, list(pair), table, which, base=None)), table
    assert sum(name.endswith("q_proj.weight") for name in found) == 4


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("form", ["slices", "modules", "modules of slices"])
def test_parts_of_models_of_two_vocabularies(pair: tuple[Model, Model], source: str, form: str, tmp_path: Path) -> None:
    slices = [{"sources": [layers(model, n, n + 1) for model in pair]} for n in range(2)]
    tower = {"models": [{"model": str(model.folder)} for model in pair]} if form == "modules" else {"slices": slices}
    parts = tower if form == "slices" else {"modules": {"default": tower}}
    found, ids = made(tmp_path, pair, source, {"merge_method": "linear", "parameters": {"weight": 1}, **parts})
    for table in TABLES:
        rows = [expected_rows(ids, list(pair), table, which, base=None) for which in (0, 1)]
        assert np.allclose(found[table], np.mean(rows, axis=0), atol=1e-6), table


def test_slices_of_two_vocabularies_say_what_to_do(pair: tuple[Model, Model], tmp_path: Path) -> None:
    slices = [{"sources": [layers(model, 0, 2)]} for model in pair]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    with pytest.raises(mergepipe.errors.TensorMismatchError, match="tokenizer_source: union"):
        mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")


def test_towers_with_one_tokenizer(tmp_path: Path) -> None:
    """A model of text and images: only the text tower has rows of tokens, and the image token keeps its meaning."""
    paths, vocabs = [], []
    for seed, more in enumerate(({"<image>": True}, {"<|im|>": True, "<image>": True})):
        tokenizer = byte_tokenizer(["ab", "cd"], more)
        vocabs.append(tokenizer.get_vocab())
        text = transformers.MistralConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, max_position_embeddings=64, vocab_size=len(vocabs[-1]),
        )  # fmt: skip
        vision = transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
            image_size=28, patch_size=14,
        )  # fmt: skip
        image = vocabs[-1]["<image>"]
        config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=image)
        torch.manual_seed(seed)
        model = transformers.Mistral3ForConditionalGeneration(config)
        paths.append(tmp_path / str(seed))
        model.save_pretrained(paths[-1])
        tokenizer.save_pretrained(paths[-1])
    both = [{"model": str(path)} for path in paths]
    modules = {
        "text_decoder": {"models": both},
        "vision_tower": {"models": both[:1]},
        "multi_modal_projector": {"models": both},
    }
    recipe = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"tokenizer_source": f"model:{paths[1]}"}))
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    out = mergepipe.run(tmp_path / "work").output
    found, info = transformers.Mistral3ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert found.config.text_config.vocab_size == len(vocabs[1])
    assert found.config.image_token_index == vocabs[1]["<image>"]
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == vocabs[1]
    name = "model.language_model.embed_tokens.weight"
    tables = [transformers.Mistral3ForConditionalGeneration.from_pretrained(path).state_dict()[name] for path in paths]
    row = (tables[0][vocabs[0]["<image>"]] + tables[1][vocabs[1]["<image>"]]) / 2
    assert torch.allclose(found.state_dict()[name][vocabs[1]["<image>"]], row, atol=1e-6)
