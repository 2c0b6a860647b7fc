"""Merged vocabularies: which row of which model each model's tables are read with, and what the output says of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

import mergepipe
from mergepipe.errors import (
    CheckpointError,
    NonFiniteError,
    RecipeError,
    TensorMismatchError,
    UsageError,
    WorkspaceError,
)
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.vocabulary_rows import gathered_manifests
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks import convert
from support.jobs import hashes
from support.vocabularies import TABLES, Model, byte_tokenizer, expected_rows, write_model

# transformers loads lazily through modules that warn about themselves; none of it is about the checkpoint.
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Model]:
    """A base, one that adds tokens, one that adds the same in another order and one more, one of another vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    plain = ["ab", "cd", "abc"]
    chat = {"<|im_start|>": True, "<tool>": False}
    return [
        write_model(folder / "base", byte_tokenizer(plain), 0, template="A{{ messages }}"),
        write_model(folder / "chat", byte_tokenizer(plain, chat), 1, template="B{{ messages }}"),
        write_model(folder / "more", byte_tokenizer(plain, dict(reversed(chat.items())) | {"<x>": True}), 2),
        write_model(folder / "other", byte_tokenizer(["op", "ab", "Ġa"]), 3, template="B{{ messages }}"),
    ]


def recipe(models: list[Model], base: Model | None, **more: Any) -> dict[str, Any]:
    """A linear merge; the base among its models or not."""
    listed = [{"model": str(model.folder), "parameters": {"weight": 1}} for model in models]
    own = {} if base is None else {"base_model": str(base.folder)}
    return {"merge_method": "linear", "models": listed, **own, **more}


def build(folder: Path, document: dict[str, Any], **how: Any) -> Plan:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    return mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **how)


def tables(folder: Path, plan: Plan, name: str) -> list[np.ndarray]:
    """One table of every model, as a run reads it: through the workspace that `build` has written."""
    workspace = Workspace(folder / "work")
    stores = [ChunkManifest.load(workspace.manifest_file(n, model.label)) for n, model in enumerate(plan.models)]
    found = []
    with MmapReader() as reader:
        for manifest in gathered_manifests(workspace.vocabulary, plan.vocabulary, stores):
            shape, dtype = manifest.shape(name), manifest.arrays[name].dtype
            out = np.empty(int(np.prod(shape)))
            with reader.window(manifest.segments(name, 0, out.size), last=False) as window:
                assert convert.decode(window.view(DTYPES[dtype].bits), dtype, out) == -1
            found.append(out.reshape(shape))
    return found


def ids_of(folder: Path) -> dict[str, int]:
    import transformers

    found: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


def check_rows(folder: Path, plan: Plan, ids: dict[str, int], models: list[Model], base: int | None = 0) -> None:
    """Every table of every model, row by row."""
    for name in TABLES:
        for which, found in enumerate(tables(folder, plan, name)):
            expected = expected_rows(ids, models, name, which, base=base).astype(np.float32)
            assert found.shape == expected.shape, name
            assert np.array_equal(found, expected), (name, which)


@pytest.mark.parametrize("base", [0, 1, 3, None])
def test_a_union_keeps_the_bases_ids_and_gives_every_model_every_row(
    models: list[Model], tmp_path: Path, base: int | None
) -> None:
    order = models if base is None else [models[base], *(model for n, model in enumerate(models) if n != base)]
    document = recipe(models, None if base is None else models[base], tokenizer_source="union")
    plan = build(tmp_path, document)
    mergepipe.run(tmp_path / "work")
    ids = ids_of(tmp_path / "merged")
    assert set(ids) == {token for model in models for token in model.vocab}
    assert order[0].vocab.items() <= ids.items()
    check_rows(tmp_path, plan, ids, order, None if base is None else 0)
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == len(ids)
    merged = mergepipe_tables(tmp_path / "merged")
    for name in TABLES:
        mean = np.mean([expected_rows(ids, order, name, n, base=None if base is None else 0) for n in range(4)], axis=0)
        assert np.allclose(merged[name], mean, rtol=1e-6, atol=1e-7)


def mergepipe_tables(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for name, value in load_file(folder / "model.safetensors").items() if name in TABLES}


@pytest.mark.parametrize("source", ["base", "more", "outside"])
def test_the_vocabulary_of_one_model(models: list[Model], tmp_path: Path, source: str) -> None:
    """Its ids and nothing else; tokens that nobody merged has are rows of zeros."""
    merged = models[:2] if source == "outside" else models
    named = {"base": "base", "more": f"model:{models[2].folder}", "outside": str(models[3].folder)}[source]
    plan = build(tmp_path, recipe(merged, models[0], tokenizer_source=named))
    mergepipe.run(tmp_path / "work")
    origin = models[{"base": 0, "more": 2, "outside": 3}[source]]
    assert ids_of(tmp_path / "merged") == origin.vocab
    check_rows(tmp_path, plan, origin.vocab, merged)
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (origin.folder / "tokenizer.json").read_bytes()


def test_tokens_with_a_source_of_their_own(models: list[Model], tmp_path: Path) -> None:
    base, chat, more, _ = models
    tokens = {
        "<tool>": {"source": str(chat.folder)},
        "<|im_start|>": {"source": {"kind": "model_token", "model": str(more.folder), "token": "<s>"}, "force": True},
        "<x>": {"source": {"kind": "model_token", "model": str(base.folder), "token_id": 7}},
        "</s>": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "zero"}},
    }
    plan = build(tmp_path, recipe(models[:3], base, tokenizer={"source": "union", "tokens": tokens}))
    mergepipe.run(tmp_path / "work")
    ids = ids_of(tmp_path / "merged")
    assert ids["<new>"] == max(ids.values())
    for name in TABLES:
        found = tables(tmp_path, plan, name)
        rows = {token: [table[ids[token]] for table in found] for token in tokens}
        own = [model.tables[name] for model in models[:3]]
        tool = own[1][chat.vocab["<tool>"]]
        assert np.array_equal(rows["<tool>"], [tool, tool, own[2][more.vocab["<tool>"]]])
        assert np.array_equal(rows["<|im_start|>"], [own[2][0]] * 3)
        assert np.array_equal(rows["<x>"], [own[0][7], own[0][7], own[2][more.vocab["<x>"]]])
        assert not np.any(rows["</s>"])
        assert not np.any(rows["<new>"])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"<x>": {"source": "CHAT"}}, "has no '<x>': name a model that has it"),
        ({"<x>": {"source": "OTHER"}}, "none of the models"),
        ({"<x>": {"source": {"kind": "model_token", "model": "CHAT", "token": "nope"}}}, "has no 'nope'"),
        (
            {"<x>": {"source": {"kind": "model_token", "model": "CHAT", "token_id": 999}}},
            "row 999 is not in the tables",
        ),
    ],
)
def test_a_token_from_nowhere(models: list[Model], tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    text = json.dumps(entry).replace("CHAT", str(models[1].folder)).replace("OTHER", str(models[3].folder))
    with pytest.raises(RecipeError, match=message) as caught:
        build(tmp_path, recipe(models[:3], models[0], tokenizer={"source": "union", "tokens": json.loads(text)}))
    assert caught.value.faults[0].path == "$.tokenizer.tokens['<x>'].source"


def test_padding_is_the_mean_of_all_rows(models: list[Model], tmp_path: Path) -> None:
    plan = build(tmp_path, recipe(models, models[0], tokenizer={"source": "union", "pad_to_multiple_of": 16}))
    mergepipe.run(tmp_path / "work")
    ids = ids_of(tmp_path / "merged")
    rows = -(-len(ids) // 16) * 16
    assert rows > len(ids)
    for name in TABLES:
        for which, found in enumerate(tables(tmp_path, plan, name)):
            expected = expected_rows(ids, models, name, which).astype(np.float32).astype(float)
            assert len(found) == rows
            assert np.array_equal(found[: len(ids)], expected)
            assert np.allclose(found[len(ids) :], expected.mean(axis=0), rtol=1e-7, atol=1e-9)
    assert json.loads((tmp_path / "merged" / "config.json").read_text(encoding="utf-8"))["vocab_size"] == rows


def test_rows_beyond_the_tokenizer_are_left_out_and_said_so(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(["ab"])
    two = [write_model(tmp_path / name, tokenizer, seed, rows=64) for seed, name in enumerate("ab")]
    plan = build(tmp_path / "job", recipe(two, two[0], tokenizer_source="base"))
    assert plan.tensors[0].shape[0] == len(tokenizer)
    assert any("left out" in note and str(64 - len(tokenizer)) in note for note in plan.notes)
    assert build(tmp_path / "plain", recipe(two, two[0])).tensors[0].shape[0] == 64


def test_nothing_is_gathered_where_nothing_changes(models: list[Model], tmp_path: Path) -> None:
    """The same tokenizer everywhere: the inputs are mapped as they lie."""
    again = write_model(tmp_path / "again", byte_tokenizer(["ab", "cd", "abc"]), 9)
    plan = build(tmp_path / "job", recipe([models[0], again], models[0], tokenizer_source="union"))
    assert plan.vocabulary is not None
    assert plan.vocabulary.gathers == ()
    assert plan.beside.files == ()


def test_models_of_different_types_lend_converted_rows(models: list[Model], tmp_path: Path) -> None:
    """A row of a float32 model becomes bfloat16 for one that is: rounded once."""
    narrow = write_model(tmp_path / "narrow", byte_tokenizer(["ab"]), 5, dtype="bfloat16")
    plan = build(tmp_path / "job", recipe([narrow, models[1]], narrow, tokenizer_source="union"))
    found = tables(tmp_path / "job", plan, "lm_head.weight")
    mergepipe.run(tmp_path / "job" / "work")
    ids = ids_of(tmp_path / "job" / "merged")
    lent = models[1].tables["lm_head.weight"][models[1].vocab["<tool>"]]
    row = found[0][ids["<tool>"]]
    assert not np.any(row.astype(np.float32).view(np.uint32) % 65536)
    assert np.allclose(row, lent, rtol=2**-8)
    assert not np.array_equal(row, lent)
    own = narrow.tables["lm_head.weight"]
    assert np.array_equal(found[0][[narrow.vocab[token] for token in narrow.vocab]], own[list(narrow.vocab.values())])


def test_ids_of_special_tokens_move_with_their_tokens(models: list[Model], tmp_path: Path) -> None:
    """In the configuration and in the generation configuration; those of tokens that are gone are said."""
    tokenizer = byte_tokenizer(["ab"], {"<eot>": True, "<image>": True})
    ids = tokenizer.get_vocab()
    own = write_model(
        tmp_path / "own", tokenizer, 1, eos_token_id=[1, ids["<eot>"]], pad_token_id=ids["<eot>"],
        text_config={"image_token_index": ids["<image>"], "vocab_size": len(ids)}, num_image_tokens=4,
    )  # fmt: skip
    (own.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids["<eot>"], "top_k": 1}))
    target = byte_tokenizer(["cd", "ef", "gh"], {"<image>": True})
    other = write_model(tmp_path / "other", target, 2)
    plan = build(tmp_path / "job", recipe([own, other], own, tokenizer_source=f"model:{other.folder}"))
    mergepipe.run(tmp_path / "job" / "work")
    config = json.loads((tmp_path / "job" / "merged" / "config.json").read_text(encoding="utf-8"))
    rows = len(target)
    assert config["eos_token_id"] == [1]
    assert config["pad_token_id"] == 2  # the token is gone: what the tokenizer pads with
    assert config["text_config"] == {"image_token_index": target.get_vocab()["<image>"], "vocab_size": rows}
    assert (config["vocab_size"], config["num_image_tokens"], config["bos_token_id"]) == (rows, 4, 0)
    generation = json.loads((tmp_path / "job" / "merged" / "generation_config.json").read_text(encoding="utf-8"))
    assert generation == {"eos_token_id": 1, "top_k": 1}
    assert any("`pad_token_id`" in note for note in plan.notes)


# ── how it is done changes no byte ──


def test_store_chunks_workers_and_reader_change_no_byte(models: list[Model], tmp_path: Path) -> None:
    document = recipe(models, models[0], tokenizer={"source": "union", "pad_to_multiple_of": 32})
    document |= {"merge_method": "ties", "parameters": {"density": 0.5, "weight": 1}}
    document["models"] = [{"model": entry["model"]} for entry in document["models"]]
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"workers": 1, "reader": "mmap"}),
        ({"chunk_size": 512}, {"workers": 2, "reader": "direct"}),
        ({"store": "copy", "chunk_size": 300}, {"workers": 2}),
    ]
    found = []
    for number, (how, options) in enumerate(ways):
        folder = tmp_path / str(number)
        build(folder, document, **how)
        mergepipe.run(folder / "work", **options)
        found.append(hashes(folder / "merged"))
    assert found[0] == found[1] == found[2]


def test_a_second_build_keeps_finished_work_and_says_the_same(models: list[Model], tmp_path: Path) -> None:
    document = recipe(models, models[0], tokenizer={"source": "union", "pad_to_multiple_of": 32})
    first = build(tmp_path, document)
    files = {path.relative_to(tmp_path): path.read_bytes() for path in (tmp_path / "work" / "vocabulary").rglob("*.*")}
    second = build(tmp_path, document)
    assert first.id == second.id
    assert files == {path: (tmp_path / path).read_bytes() for path in files}
    other = build(tmp_path, recipe(models, models[0], tokenizer_source="union"))
    assert other.id != first.id


def test_the_plan_stays_small(models: list[Model], tmp_path: Path) -> None:
    plan = build(tmp_path, recipe(models, models[0], tokenizer_source="union"))
    assert plan.vocabulary is not None
    assert len(plan.vocabulary.gathers) == 4 * len(TABLES)
    assert len({gather.row_map for gather in plan.vocabulary.gathers}) == 4  # the tables of a model share one
    assert len(plan.to_json()) < 20_000
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("victim", ["map-*", "made-*/model.safetensors", "record.json"])
@pytest.mark.parametrize("how", ["gone", "changed"])
def test_damaged_side_files_are_refused(models: list[Model], tmp_path: Path, victim: str, how: str) -> None:
    build(tmp_path, recipe(models, models[0], tokenizer={"source": "union", "pad_to_multiple_of": 32}))
    path = next((tmp_path / "work" / "vocabulary").glob(victim))
    data = path.read_bytes()
    path.unlink()
    if how == "changed":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(WorkspaceError, match="build the workspace again"):
        mergepipe.run(tmp_path / "work")


def test_cleaning_removes_them(models: list[Model], tmp_path: Path) -> None:
    build(tmp_path, recipe(models, models[0], tokenizer_source="union", chat_template="auto"))
    Workspace(tmp_path / "work").remove()
    assert not (tmp_path / "work").exists()


# ── what can't be done ──


def test_sizes_that_differ_without_the_key_name_it(models: list[Model], tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match="tokenizer_source: union"):
        build(tmp_path, recipe(models[:2], models[0]))


def test_a_model_without_a_tokenizer(models: list[Model], tmp_path: Path) -> None:
    """With as many rows as the base it is taken to have the base's; else it is an error that names it."""
    same = write_model(tmp_path / "same", None, 1, rows=len(models[0].vocab))
    plan = build(tmp_path / "a", recipe([models[0], same, models[1]], models[0], tokenizer_source="union"))
    assert any("has no tokenizer" in note for note in plan.notes)
    check_rows(
        tmp_path / "a",
        plan,
        ids_of_plan(tmp_path / "a"),
        [models[0], Model(same.folder, models[0].vocab, same.tables), models[1]],
    )
    differs = write_model(tmp_path / "differs", None, 1, rows=7)
    with pytest.raises(CheckpointError, match=r"'.*differs' has no tokenizer"):
        build(tmp_path / "b", recipe([models[0], differs], models[0], tokenizer_source="union"))


def ids_of_plan(folder: Path) -> dict[str, int]:
    mergepipe.run(folder / "work")
    return ids_of(folder / "merged")


def test_models_without_a_vocabulary(tmp_path: Path) -> None:
    two = [write_model(tmp_path / name, None, 1, rows=5, tables=()) for name in "ab"]
    with pytest.raises(CheckpointError, match="leave `tokenizer_source` out"):
        build(tmp_path / "job", recipe(two, two[0], tokenizer_source="base"))


def test_a_broken_tokenizer_is_named(models: list[Model], tmp_path: Path) -> None:
    broken = write_model(tmp_path / "broken", byte_tokenizer(["ab"]), 1)
    (broken.folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"the tokenizer in '.*broken' can't be read"):
        build(tmp_path / "job", recipe([models[0], broken], models[0], tokenizer_source="union"))


def test_without_the_libraries_the_extra_is_named(
    models: list[Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'mergepipe\[tokenizers\]'"):
        build(tmp_path, recipe(models, models[0], tokenizer_source="union"))


def test_a_row_that_is_averaged_must_be_finite(models: list[Model], tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    bad = write_model(tmp_path / "bad", byte_tokenizer(["ab", "cd", "abc"], {"<tool>": False}), 1)
    tensors = load_file(bad.folder / "model.safetensors")
    tensors["lm_head.weight"][bad.vocab["<tool>"], 3] = np.inf
    save_file(tensors, bad.folder / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"row \d+ of 'lm_head.weight' in '.*bad'"):
        build(tmp_path / "job", recipe([models[0], models[1], bad], models[0], tokenizer_source="union"))


def test_other_tokens_at_the_same_ids_are_told(models: list[Model], tmp_path: Path) -> None:
    """Tables of one size merge by position where the recipe says nothing of tokenizers, but not in silence."""
    rng = np.random.default_rng(0)
    tables = rng.normal(size=(40, 8)).astype(np.float32)
    for name, model in (("one", models[0]), ("same", models[0]), ("two", models[3])):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"model.embed_tokens.weight": tables}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 40}))
        (folder / "tokenizer.json").write_bytes((model.folder / "tokenizer.json").read_bytes())
    document = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / name)} for name in ("one", "same", "two")],
        "parameters": {"weight": 1.0},
    }
    told = [note for note in build(tmp_path / "job", document).notes if "token by token" in note]
    assert len(told) == 1
    assert f"'{tmp_path / 'two'}' has other tokens than '{tmp_path / 'one'}' at " in told[0]
    (tmp_path / "two" / "tokenizer.json").write_text("{")
    assert not [note for note in build(tmp_path / "broken", document).notes if "token by token" in note]


@pytest.mark.parametrize("ignoring", [False, True])
def test_a_tokenizer_that_finds_the_entries_of_others_is_told(
    models: list[Model], ignoring: bool, tmp_path: Path
) -> None:
    """One that takes whole words first, as those of Llama 3, cuts texts into what others bring."""
    first = write_model(tmp_path / "first", byte_tokenizer(["ab", "cd"]), 0)
    path = first.folder / "tokenizer.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["model"]["ignore_merges"] = ignoring
    path.write_text(json.dumps(document))
    plan = build(tmp_path / "job", recipe([first, models[3]], first, tokenizer_source="union"))
    told = [note for note in plan.notes if "cut otherwise" in note]
    assert len(told) == ignoring
    assert all("2 plain entries" in note for note in told)
