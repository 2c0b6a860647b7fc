"""Recipes of several documents: merges that read each other, through build, run, status, verify and clean."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import (
    CheckpointError,
    InputChangedError,
    Interrupted,
    MemoryBudgetError,
    OutputExistsError,
    RecipeError,
    UsageError,
    WorkspaceError,
)
from mergepipe.pipeline.chain import chain_of
from mergepipe.pipeline.clean import clean
from mergepipe.pipeline.events import Event, Note, TensorFinished
from mergepipe.pipeline.status import status
from mergepipe.pipeline.verify import verify
from support.checkpoints import read_tensors
from support.jobs import hashes, write_model

Document = dict[str, Any]


def linear(*models: str, name: str | None = None, **more: Any) -> Document:
    """A document that averages models."""
    listed = [{"model": model} for model in models]
    named = {} if name is None else {"name": name}
    return named | {"merge_method": "linear", "models": listed, "parameters": {"weight": 1}} | more


def names(*documents: Document, **how: Any) -> list[str]:
    return [merge.name for merge in chain_of(documents, Path("/w"), relative_to="/models", **how)]


def faults(*documents: Document) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        chain_of(documents, Path("/w"), relative_to="/models")
    return {fault.path: fault.message for fault in caught.value.faults}


# -- which merges there are


def test_merges_come_after_those_that_they_read() -> None:
    documents = linear("b", "c"), linear("a", "x", name="b"), linear("a", "b", name="c"), linear("x", "y", name="a")
    assert names(*documents) == ["a", "b", "c", ""]


def test_the_result_is_the_document_without_a_name_or_the_last() -> None:
    assert names(linear("x", "y", name="a"), linear("a", "y", name="b")) == ["a", "b"]
    assert names(linear("a", "y"), linear("x", "y", name="a")) == ["a", ""]


def test_a_name_stands_for_a_model_wherever_one_is_named() -> None:
    slices = [{"sources": [{"model": {"model": {"path": "a"}}, "layer_range": [0, 1]}], "base_model": "a"}]
    tower = {"models": [{"model": "a"}], "base_model": "a"}
    documents = [
        linear("x", "y", name="a"),
        {"name": "b", "merge_method": "passthrough", "slices": slices},
        {"name": "c", "merge_method": "linear", "modules": {"t": tower}, "parameters": {"weight": 1}},
        linear("a", "b", "c", base_model="a", heads="model:a"),
    ]
    merges = chain_of(documents, Path("/w"), relative_to="/models")
    assert [set(merge.recipe.sources) for merge in merges[1:]] == [
        {"/w/merged/a"},
        {"/w/merged/a"},
        {"/w/merged/a", "/w/merged/b", "/w/merged/c"},
    ]
    assert merges[-1].recipe.heads == "model:/w/merged/a"
    assert [merge.reads for merge in merges] == [(), ("a",), ("a",), ("a", "b", "c")]


def test_names_become_folders_of_their_own() -> None:
    documents = [linear("x", "y", name=name) for name in ("a/b", "a b", "..", "a-b")]
    merges = chain_of([*documents, linear("a/b", "a b", "..", "a-b")], Path("/w"), relative_to="/models")
    folders = [merge.output for merge in merges[:-1]]
    assert len(set(folders)) == 4
    assert all(folder is not None and Path(folder).parent == Path("/w/merged") for folder in folders)
    assert all(folder is not None and not Path(folder).name.startswith(".") for folder in folders)


def test_what_nobody_reads_is_noted_and_not_made() -> None:
    merges = chain_of([linear("x", "y", name="a"), linear("x", "y")], Path("/w"), relative_to="/models")
    assert [merge.name for merge in merges] == [""]
    assert any("'a'" in note for note in merges[0].recipe.notes)


def test_the_faults_of_all_documents_come_together() -> None:
    found = faults(
        linear("x", "y", name="a", merge_method="linea"),
        linear("a", "y", name="b", dtpe="x"),
        linear("b", "z", seed=-1),
    )
    assert set(found) == {"a: $.merge_method", "b: $.dtpe", "document 3: $.seed"}


def test_names_that_clash_and_circles() -> None:
    assert "already" in faults(linear("x", name="a"), linear("y", name="a"), linear("a"))["document 2: $.name"]
    assert "document 1: $.name" in faults(linear("x", "y"), linear("x", "y"))
    assert (
        "a reads b reads a" in faults(linear("b", "x", name="a"), linear("a", "x", name="b"), linear("a", "x"))["a: $"]
    )
    assert "circle" in faults(linear("a", "x", name="a"), linear("a", "x"))["a: $"]


def test_overrides_reach_the_result_or_the_document_named() -> None:
    documents = linear("x", "y", name="a"), linear("a", "y")
    merges = chain_of(documents, Path("/w"), ["parameters.weight=2", "documents[0].parameters.weight=3"])
    assert [merge.recipe.parameters["weight"] for merge in merges] == [3, 2]
    with pytest.raises(UsageError, match="2 documents"):
        chain_of(documents, Path("/w"), ["documents[2].parameters.weight=3"])


# -- made

SLOW = pytest.mark.slow


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Four small models of two layers in one folder."""
    shapes = {"embed.weight": (40, 16), "norm.weight": (16,)}
    shapes |= {f"layers.{n}.{part}.weight": (32, 16) for n in range(2) for part in ("up", "down", "gate")}
    for number, name in enumerate("abcd"):
        write_model(tmp_path / name, number, shapes, parent_seed=9)
    return tmp_path


def written(folder: Path, *documents: Document) -> Path:
    """A recipe file with the folder's models."""
    text = yaml.safe_dump_all(json.loads(json.dumps(documents).replace('"@', f'"{folder}/')))
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def build(folder: Path, *documents: Document, **how: Any) -> Path:
    mergepipe.build(written(folder, *documents), work=folder / "work", out=folder / "merged", **how)
    return folder / "work"


FIRST = linear("@a", "@b", name="first", dtype="float32")
STACK: Document = {
    "name": "stack",
    "merge_method": "passthrough",
    "slices": [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in ("first", "@c")],
}
OTHER: Document = {**STACK, "name": "other", "slices": STACK["slices"][::-1]}
RESULT: Document = {
    "merge_method": "ties",
    "base_model": "stack",
    "models": [{"model": "other"}],
    "parameters": {"weight": 0.5, "density": 0.5},
}
CHAIN = (FIRST, STACK, OTHER, RESULT)


def test_a_chain_is_what_its_merges_make_one_by_one(models: Path) -> None:
    work = build(models, *CHAIN)
    assert not (work / "merged").exists(), "building makes nothing"
    mergepipe.run(work)
    step = {
        "first": models / "by-hand" / "first",
        "stack": models / "by-hand" / "stack",
        "other": models / "by-hand/other",
    }
    text = json.dumps(CHAIN).replace('"@', f'"{models}/')
    for name, folder in step.items():
        text = text.replace(f'"model": "{name}"', f'"model": "{folder}"').replace(
            f'"base_model": "{name}"', f'"base_model": "{folder}"'
        )
    for number, document in enumerate(json.loads(text)):
        (models / "one.yaml").write_text(yaml.safe_dump(document))
        out = step.get(document.get("name"), models / "by-hand" / "result")
        mergepipe.build(models / "one.yaml", work=models / f"work-{number}", out=out)
        mergepipe.run(models / f"work-{number}")
    expected, made = read_tensors(models / "by-hand" / "result"), read_tensors(models / "merged")
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], value) for name, value in expected.items())
    assert all(name.split(".")[1] in "0123" for name in made if name.startswith("layers"))


def test_only_what_changed_is_made_again(models: Path) -> None:
    work = build(models, *CHAIN)
    mergepipe.run(work)
    before = {name: _stamps(work / "merged" / name) for name in ("first", "stack", "other")}
    first = hashes(models / "merged")
    changed = OTHER | {"slices": [*OTHER["slices"], OTHER["slices"][0]]}
    taller = STACK | {"slices": [*STACK["slices"], STACK["slices"][0]]}
    mergepipe.build(written(models, FIRST, taller, changed, RESULT), work=work, out=models / "second")
    mergepipe.run(work)
    after = {name: _stamps(work / "merged" / name) for name in ("first", "stack", "other")}
    assert {name for name in before if before[name] != after[name]} == {"stack", "other"}
    assert hashes(models / "merged") == first


def _stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def stop_at(name: str, stop: threading.Event) -> Callable[[Event], None]:
    """Stop the run at the first finished tensor after the merge of this name began."""
    seen: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Note) and f"'{name}'" in event.text:
            seen.append(name)
        if seen and isinstance(event, TensorFinished):
            stop.set()

    return listen


@pytest.mark.parametrize("name", [pytest.param("first", marks=SLOW), "stack", pytest.param("other", marks=SLOW)])
def test_an_interrupted_chain_goes_on(models: Path, name: str) -> None:
    work = build(models, *CHAIN)
    stop = threading.Event()
    with pytest.raises(Interrupted) as caught:
        mergepipe.run(work, workers=1, stop=stop, on_event=stop_at(name, stop))
    assert f"--work {work}`" in str(caught.value)
    found = status(work)
    assert found.state == "interrupted"
    assert found.merges[name] in ("interrupted", "done")
    assert found.done_bytes < found.total_bytes
    mergepipe.run(work)
    assert status(work).state == "done"
    once = models / "once"
    mergepipe.build(models / "recipe.yaml", work=once / "work", out=once / "merged")
    mergepipe.run(once / "work")
    assert hashes(once / "merged") == hashes(models / "merged")


def test_an_earlier_merge_that_lost_a_file_is_made_again(models: Path) -> None:
    work = build(models, *CHAIN)
    mergepipe.run(work)
    expected = hashes(models / "merged")
    (work / "merged" / "first" / "model.safetensors").unlink()
    os.rename(models / "merged", models / "away")
    mergepipe.build(models / "recipe.yaml", work=work, out=models / "merged")
    mergepipe.run(work, restart=True)
    assert hashes(models / "merged") == expected


def test_an_earlier_merge_that_was_tampered_with_is_refused(models: Path) -> None:
    work = build(models, *CHAIN)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        mergepipe.run(work, workers=1, stop=stop, on_event=stop_at("other", stop))
    os.utime(work / "merged" / "first" / "model.safetensors")
    with pytest.raises(InputChangedError, match="first"):
        mergepipe.run(work)


def test_faults_of_later_merges_show_before_any_work(models: Path) -> None:
    past = STACK | {"slices": [{"sources": [{"model": "first", "layer_range": [0, 3]}]}]}
    narrow = linear("first", "@missing", name="narrow")
    with pytest.raises(CheckpointError) as caught:
        build(models, FIRST, past, narrow, linear("stack", "narrow"))
    text = str(caught.value)
    assert "in the merge 'stack'" in text
    assert "which has 0 to 1" in text
    assert "in the merge 'narrow'" in text
    assert "by their names: first, stack, narrow" in text
    bad = RESULT | {"parameters": {"weight": [{"filter": "up", "value": 1}]}}
    with pytest.raises(RecipeError, match=r"the result: \$\.parameters\.weight"):
        build(models, FIRST, STACK, OTHER, bad)
    with pytest.raises(MemoryBudgetError, match="in the merge 'first'"):
        build(models, *CHAIN, memory="1MiB")
    assert not (models / "work").exists()


def test_unfinished_work_of_another_chain_is_not_dropped_unasked(models: Path) -> None:
    work = build(models, *CHAIN)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        mergepipe.run(work, workers=1, stop=stop, on_event=stop_at("first", stop))
    for other in ((FIRST | {"dtype": "float16"}, STACK, OTHER, RESULT), (linear("@a", "@b"),)):
        with pytest.raises(WorkspaceError, match="--force"):
            build(models, *other)
    build(models, linear("@a", "@b"), force=True)
    assert not (work / "merges").exists()
    mergepipe.run(work)
    assert status(work).merges == {}


def test_status_plan_verify_and_clean_know_all_merges(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = build(models, *CHAIN)
    assert status(work).merges == {"first": "built", "stack": "built", "other": "built"}
    assert verify(work).damage == []
    assert main(["plan", "-w", str(work), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert list(shown["merges"]) == ["first", "stack", "other"]
    mergepipe.run(work)
    found = status(work)
    assert (found.state, set(found.merges.values())) == ("done", {"done"})
    assert main(["status", "-w", str(work)]) == 0
    assert "merge     stack: done" in capsys.readouterr().out
    assert verify(work, full=True).damage == []
    shard = work / "merged" / "first" / "model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert [item.file for item in verify(work, full=True).damage] == [str(shard)]
    card = (models / "merged" / "README.md").read_text(encoding="utf-8")
    assert card.count("merge_method:") == 4
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["a", "b", "c"]
    clean(work)
    assert not work.exists()
    assert (models / "merged" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"out": "full"}, OutputExistsError, "is not empty"),
        ({"on_shard": "true"}, UsageError, "where the file's path goes"),
        ({"memory": "1MiB"}, MemoryBudgetError, "MiB"),
    ],
    ids=["out", "on-shard", "memory"],
)
def test_what_the_result_refuses_is_refused_before_any_work(
    models: Path, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    work = build(models, *CHAIN)
    (models / "full").mkdir()
    (models / "full" / "a").touch()
    if "out" in options:
        options = {"out": models / options["out"]}
    with pytest.raises(error, match=told):
        mergepipe.run(work, **options)
    assert status(work).merges == dict.fromkeys(("first", "stack", "other"), "built")
    assert not (work / "merged").exists()


def test_the_result_of_a_chain_is_moved(models: Path) -> None:
    work = build(models, *CHAIN)
    assert mergepipe.run(work, out=models / "elsewhere").output == models / "elsewhere"
    assert (models / "elsewhere" / "config.json").exists()
    assert not (models / "merged").exists()


def test_importances_that_an_earlier_merge_makes(models: Path) -> None:
    """A name stands for a checkpoint of importances, too."""
    squares = linear("@c", name="squares", merge_method="passthrough") | {"parameters": {"scale": 0.0}}
    experts = [{"model": f"@{name}", "importance": "squares"} for name in "ab"]
    mean = linear("@a", "@b", dtype="float32")
    work = build(models, squares, {"merge_method": "fisher", "models": experts, "dtype": "float32"})
    mergepipe.run(work)
    found = read_tensors(models / "merged")
    mergepipe.build(written(models, mean), work=models / "plain", out=models / "by-hand")
    mergepipe.run(models / "plain")
    expected = read_tensors(models / "by-hand")
    assert all(torch.equal(found[name], value) for name, value in expected.items())
