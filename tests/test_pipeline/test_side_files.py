"""What lies beside the weights: the base's own files, only what the merge changes in them, and a card."""

from __future__ import annotations

import json
import os
import stat
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import CheckpointError, HandOverError, InputChangedError, OutputExistsError
from mergepipe.pipeline import measure, outputs
from mergepipe.pipeline.events import Event, ShardSealed
from mergepipe.pipeline.handover import hand_over
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.side_files import copy_side_files, put_values
from mergepipe.pipeline.space import output_need
from support.jobs import build_job, write_job
from support.vocabularies import byte_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("default")


def merge(folder: Path, **more: Any) -> Path:
    """Two models of one tokenizer; the first lends its files."""
    tokenizer = byte_tokenizer(["ab"])
    models = [write_model(folder / name, tokenizer, seed, template="T") for seed, name in enumerate("ab")]
    config = json.loads((models[0].folder / "config.json").read_text(encoding="utf-8"))
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
    expected = json.loads((tmp_path / "a" / "config.json").read_text(encoding="utf-8"))
    expected["dtype"] = expected["text_config"]["dtype"] = "bfloat16"
    assert list(json.loads((out / "config.json").read_text(encoding="utf-8")).items()) == list(expected.items())


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
    text = (merge(tmp_path, tokenizer_source="union") / "README.md").read_text(encoding="utf-8")
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


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a built merge of two small models; the first, ``base``, lends its files."""
    write_job(tmp_path)
    build_job(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("how", ["changed", "broken", "gone"])
def test_a_file_that_changed_since_the_build_is_refused_by_name(job: Path, name: str, how: str) -> None:
    path = job / "base" / name
    if how == "gone":
        path.unlink()
    else:
        path.write_text("{" if how == "broken" else '{"model_type": "other"}')
    with pytest.raises(InputChangedError, match=str(path)):
        mergepipe.run(job / "work")
    assert not (job / "merged").exists(), "that is found before any work"


def test_a_file_that_came_since_the_build_is_refused_by_name(job: Path) -> None:
    (job / "base" / "chat_template.jinja").write_text("new")
    with pytest.raises(InputChangedError, match=r"chat_template\.jinja' has come"):
        mergepipe.run(job / "work")


def test_a_file_that_changes_during_the_work_is_refused_and_the_weights_are_kept(job: Path) -> None:
    def change(event: Event) -> None:
        if isinstance(event, ShardSealed):
            (job / "base" / "config.json").write_text('{"model_type": "other"}')

    with pytest.raises(InputChangedError, match=r"config\.json"):
        mergepipe.run(job / "work", on_event=change)
    assert not (job / "merged" / "model.safetensors").exists()
    plan = json.loads((job / "work" / "plan.json").read_text(encoding="utf-8"))["id"]
    build_job(job)
    assert json.loads((job / "work" / "plan.json").read_text(encoding="utf-8"))["id"] == plan
    told: list[str] = []
    mergepipe.run(job / "work", on_event=lambda event: told.append(str(event)))
    assert any("going on with an earlier run" in text for text in told)
    assert json.loads((job / "merged" / "config.json").read_text(encoding="utf-8"))["model_type"] == "other"


def test_a_finished_merge_with_older_files_is_not_taken_for_that_of_a_new_build(job: Path) -> None:
    mergepipe.run(job / "work")
    build_job(job)
    (job / "base" / "tokenizer.json").write_text('{"new": 1}')
    with pytest.raises(OutputExistsError, match="not empty"):
        build_job(job)


@pytest.mark.parametrize("kind", ["link to nothing", "pipe"])
def test_what_is_no_file_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    write_job(tmp_path)
    odd = tmp_path / "base" / "tokenizer.model"
    if kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=str(odd)):
        build_job(tmp_path)
    odd.unlink()
    odd.mkdir()
    build_job(tmp_path)


def test_a_large_file_is_copied_a_piece_at_a_time_and_has_its_room(job: Path) -> None:
    size = 64 * 1024 * 1024
    before = output_need(read_plan(job)).nbytes
    with open(job / "base" / "tokenizer.model", "wb") as file:
        file.truncate(size)
    build_job(job)
    assert output_need(read_plan(job)).nbytes == before + size
    tracemalloc.start()
    copy_side_files(job / "base", job, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (job / "tokenizer.model").stat().st_size == size
    assert peak < 8 * 1024 * 1024


def test_the_manifest_has_the_peak_of_what_follows_the_weights(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, size = outputs.put_side_files, 1 << 40  # more than the process of the tests ever has

    def hungry(*args: Any) -> None:
        monkeypatch.setattr(measure, "anonymous_bytes", lambda: size)
        time.sleep(0.2)
        real(*args)

    monkeypatch.setattr(outputs, "put_side_files", hungry)
    assert mergepipe.run(job / "work").manifest["peak_anonymous_bytes"] == size
    assert (
        json.loads((job / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["peak_anonymous_bytes"]
        == size
    )


def read_plan(job: Path) -> Plan:
    return Plan.from_json((job / "work" / "plan.json").read_bytes())


def test_of_a_command_that_says_much_the_end_is_kept(tmp_path: Path) -> None:
    tracemalloc.start()
    with pytest.raises(HandOverError, match="no such bucket"):
        hand_over("head -c 50000000 /dev/zero; echo no such bucket >&2; false {path}", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 1024 * 1024


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    """The same of two experts that keep heads of their own, with what belongs to a model beside them."""
    write_job(tmp_path, heads="separate")
    for number in (1, 2):
        path = tmp_path / f"expert-{number}" / "model.safetensors"
        save_file(load_file(path) | {"classifier.weight": np.ones((number, 64), np.float16)}, path)
    build_job(tmp_path)
    return tmp_path


@pytest.mark.parametrize("how", ["changed", "gone", "has come"])
def test_a_file_beside_a_head_that_changed_since_the_build_is_refused_by_name(heads: Path, how: str) -> None:
    path = heads / "expert-2" / ("merges.txt" if how == "has come" else "config.json")
    if how == "gone":
        path.unlink()
    else:
        path.write_text('{"model_type": "other"}')
    with pytest.raises(InputChangedError, match=f"{path}' .*{how}"):
        mergepipe.run(heads / "work")
    assert not (heads / "merged").exists(), "that is found before any work"
    build_job(heads)
    out = mergepipe.run(heads / "work").output
    if how == "changed":
        assert json.loads((out / "heads" / "expert-2" / "config.json").read_text())["model_type"] == "other"


@pytest.mark.parametrize("restored", [False, True])
def test_a_file_beside_a_head_that_changes_during_the_work_is_refused(heads: Path, restored: bool) -> None:
    """Also one that has its old contents, size and time again: what was copied meanwhile is another."""
    path = heads / "expert-1" / "config.json"
    data, status = path.read_bytes(), path.stat()

    def change(event: Event) -> None:
        if isinstance(event, ShardSealed):
            path.write_bytes(data.replace(b"tiny", b"huge"))
            if restored:
                path.write_bytes(data)
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(InputChangedError, match=str(path)):
        mergepipe.run(heads / "work", on_event=change)
    assert not (heads / "merged" / "model.safetensors").exists()
    build_job(heads)
    out = mergepipe.run(heads / "work").output
    assert (out / "heads" / "expert-1" / "config.json").read_bytes() == path.read_bytes()


def test_what_lies_beside_heads_is_counted(heads: Path) -> None:
    before = output_need(read_plan(heads)).nbytes
    with open(heads / "expert-1" / "tokenizer.model", "wb") as file:
        file.truncate(1 << 20)
    build_job(heads)
    assert output_need(read_plan(heads)).nbytes == before + (1 << 20)
