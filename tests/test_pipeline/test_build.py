"""Building and running small real checkpoints: what is written, in which order, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
import zarr
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.pipeline.events import Event, Note, ShardSealed
from mergepipe.pipeline.materialize import materialize
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.space import Need, beside_bytes
from mergepipe.pipeline.status import status
from mergepipe.pipeline.summary import summarize, tensor_rows

BODY = {"layers.0.w": (40, 30), "layers.1.w": (40, 30), "norm": (30,)}


def write_model(folder: Path, seed: int, classes: int = 3, *, shards: int = 1, **changed: Any) -> None:
    """A small f32 checkpoint with a classifier of `classes` classes, and the files that lie beside weights."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in BODY.items()}
    rng = np.random.default_rng(seed)
    for value in tensors.values():
        value += 0.01 * seed * rng.standard_normal(value.shape).astype(np.float32)
    tensors["classifier.weight"] = rng.standard_normal((classes, 30)).astype(np.float32)
    tensors["steps"] = np.array([seed], np.int64)
    tensors |= changed
    folder.mkdir(parents=True)
    names = list(tensors)
    parts = [names[n::shards] for n in range(shards)]
    for number, part in enumerate(parts):
        file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
    if shards > 1:
        weight_map = {
            name: f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            for number, part in enumerate(parts)
            for name in part
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "tiny", "num_labels": classes, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folder with `base`, `a` and `b`."""
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed)
    return tmp_path


def recipe(folder: Path, **keys: Any) -> Path:
    """A recipe over `base`, `a` and `b`; `keys` replace its entries."""
    values: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in ("a", "b")],
        "parameters": {"weight": 0.5},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values | keys))
    return path


def merge(folder: Path, *, events: Callable[[Event], None] | None = None, **keys: Any) -> Path:
    """Build and run in `folder`; the output folder."""
    mergepipe.build(recipe(folder, **keys), work=folder / "work", out=folder / "merged")
    return Path(mergepipe.run(folder / "work", on_event=events).output)


def test_the_output_is_a_whole_checkpoint(models: Path) -> None:
    out = merge(models)
    names = sorted(path.name for path in out.iterdir())
    expected = ["README.md", "config.json", "mergepipe_manifest.json", "model.safetensors", "tokenizer.json"]
    assert names == expected
    assert (out / "config.json").read_bytes() == (models / "base" / "config.json").read_bytes()
    found = load_file(out / "model.safetensors")
    read = {name: load_file(models / name / "model.safetensors") for name in ("base", "a", "b")}
    for name in (*BODY, "classifier.weight"):
        base = read["base"][name].astype(np.float64)
        wanted = base + 0.5 * sum(read[m][name].astype(np.float64) - base for m in "ab")
        assert np.abs(found[name] - wanted).max() <= 4 * np.spacing(np.float32(np.abs(wanted).max()))
    assert found["steps"].tolist() == [0], "integers come from the base"


def test_the_manifest_tells_what_lies_there(models: Path) -> None:
    out = merge(models, merge_method="ties", parameters={"weight": 0.5, "density": 0.3})
    manifest = json.loads((out / "mergepipe_manifest.json").read_bytes())
    (shard,) = manifest["shards"]
    assert shard["sha256"] == hashlib.sha256((out / shard["file"]).read_bytes()).hexdigest()
    assert shard["bytes"] == (out / shard["file"]).stat().st_size
    assert manifest["densities"]["layers.0.w"] == pytest.approx([0.3, 0.3], abs=1e-3)
    assert [entry["model"] for entry in manifest["inputs"]] == ["base", "a", "b"]


def test_statistics_are_zarr_arrays_in_the_workspace(models: Path) -> None:
    merge(models, merge_method="ties", parameters={"weight": 0.5, "density": 0.3})
    group = zarr.open_group(models / "work" / "statistics", mode="r")
    row = list(group.attrs["tensors"]).index("layers.1.w")
    read = {name: load_file(models / name / "model.safetensors")["layers.1.w"] for name in ("base", "a", "b")}
    for k, name in enumerate("ab"):
        delta = np.abs(read[name] - read["base"])
        kept = int(0.3 * delta.size)
        assert group["thresholds"][row, k] == np.sort(delta.ravel())[-kept]
        assert group["densities"][row, k] == pytest.approx(kept / delta.size)
    assert "histogram" not in group, "a megabyte that a few sweeps read"


def test_shards_mirror_the_base_and_the_index_is_last(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed, shards=2)
    sealed: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, ShardSealed):
            sealed.append(event.file)
            assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()

    out = merge(tmp_path, events=listen)
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    base = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_bytes())
    assert index["weight_map"] == base["weight_map"]
    assert sorted(sealed) == sorted(set(index["weight_map"].values()))
    assert not list(out.glob("*.part"))


def test_shard_size_repacks(models: Path) -> None:
    plan = mergepipe.build(recipe(models), work=models / "work", out=models / "merged", shard_size="6KB")
    out = Path(mergepipe.run(models / "work").output)
    assert [len(group) for group in plan.groups] == [3, 2]
    assert len(list(out.glob("model-*-of-00002.safetensors"))) == 2


def test_dtype_changes_weights_and_config_only(models: Path) -> None:
    out = merge(models, dtype="bfloat16")
    config = json.loads((out / "config.json").read_bytes())
    assert config == {"model_type": "tiny", "num_labels": 3, "torch_dtype": "bfloat16"}
    import torch
    from safetensors.torch import load_file as load_torch

    found = load_torch(out / "model.safetensors")
    assert {str(value.dtype) for name, value in found.items() if name != "steps"} == {"torch.bfloat16"}
    assert found["steps"].dtype == torch.int64


def test_heads_of_different_shape_are_kept_and_put_back(tmp_path: Path) -> None:
    for seed, (name, classes) in enumerate((("base", 3), ("a", 5), ("b", 7))):
        write_model(tmp_path / name, seed, classes)
    out = merge(tmp_path, heads="separate")
    body = load_file(out / "model.safetensors")
    one = materialize(out, task="b", out=tmp_path / "one")
    found = load_file(one / "model.safetensors")
    own = load_file(tmp_path / "b" / "model.safetensors")
    assert np.array_equal(found["classifier.weight"], own["classifier.weight"])
    assert np.array_equal(found["layers.0.w"], body["layers.0.w"])
    assert json.loads((one / "config.json").read_bytes())["num_labels"] == 7
    beside = materialize(out, task="b")
    assert beside == tmp_path / "merged-b"
    assert (beside / "model.safetensors").read_bytes() == (one / "model.safetensors").read_bytes()
    with pytest.raises(errors.OutputExistsError, match="merged-b"):
        materialize(out, task="b")
    for name in ("c", "", "../heads/b"):
        with pytest.raises(errors.CheckpointNotFoundError, match=f"no head '{name}'; it has a, b"):
            materialize(out, task=name, out=tmp_path / "other")


def test_a_second_build_changes_nothing_and_a_second_run_has_nothing_to_do(models: Path) -> None:
    first = merge(models)
    before = {path.name: path.stat().st_mtime_ns for path in first.iterdir()}
    notes: list[Event] = []
    assert merge(models, events=notes.append) == first
    assert {path.name: path.stat().st_mtime_ns for path in first.iterdir()} == before
    assert any(isinstance(note, Note) and "complete already" in note.text for note in notes)


def test_a_retrained_input_is_another_plan(models: Path) -> None:
    plan = mergepipe.build(recipe(models), work=models / "work", out=models / "merged")
    (models / "a" / "model.safetensors").unlink()
    (models / "a" / "config.json").unlink()
    (models / "a" / "tokenizer.json").unlink()
    (models / "a").rmdir()
    write_model(models / "a", 9)
    with pytest.raises(errors.InputChangedError, match=r"a/model\.safetensors' changed"):
        mergepipe.run(models / "work")
    again = mergepipe.build(recipe(models), work=models / "work2", out=models / "merged")
    assert again.id != plan.id


def test_a_saved_plan_is_the_plan(models: Path) -> None:
    plan = mergepipe.build(recipe(models), work=models / "work", out=models / "merged")
    assert Plan.from_json((models / "work" / "plan.json").read_bytes()) == plan
    with pytest.raises(errors.WorkspaceError, match="format 99"):
        Plan.from_json(plan.to_json().replace(b'"format": 1', b'"format": 99'))
    with pytest.raises(errors.WorkspaceError, match="damaged"):
        Plan.from_json(b"{")


def test_ids_follow_the_result_and_nothing_else(models: Path) -> None:
    def plan(**how: Any) -> Plan:
        keys = how.pop("keys", {})
        out = how.pop("out", "merged")
        return mergepipe.build(recipe(models, **keys), work=models / "ids", out=models / out, **how)

    same = {plan(out="elsewhere").id, plan(memory="1GiB").id, plan(chunk_size="64KiB").id, plan(store="copy").id}
    assert same == {plan().id}
    other = {plan(keys={"parameters": {"weight": 0.4}}).id, plan(keys={"seed": 1}).id, plan(shard_size="6KB").id}
    assert len(other) == 3
    assert not other & same


def test_planning_reads_no_tensor_byte(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a tensor byte was asked for")

    for reader in ("readers.MmapReader", "direct.DirectReader"):
        monkeypatch.setattr(f"mergepipe.storage.{reader}.window", refuse)
    plan = mergepipe.build(recipe(models), work=models / "work", out=models / "merged")
    assert len(plan.tensors) == 5
    with pytest.raises(AssertionError, match="a tensor byte was asked for"):
        mergepipe.run(models / "work", reader="mmap")


def test_the_summary_adds_up(models: Path) -> None:
    plan = mergepipe.build(recipe(models, merge_method="ties"), work=models / "work", out=models / "merged")
    summary = summarize(plan)
    rows = tensor_rows(plan)
    assert (summary["tensors"], summary["merged"], summary["copied"]) == (5, 4, 1)
    assert summary["parameters"] == 2 * 1200 + 30 + 90 + 1
    assert summary["output_bytes"] == sum(shard.size for shard in plan.layout().shards)
    assert summary["requested_bytes"] == sum(row["bytes_read"] for row in rows)
    assert summary["projected_bytes"] <= plan.allowed
    assert len(list((models / "work").rglob("manifest.json"))) == 3


def test_what_is_refused_before_any_work(models: Path, tmp_path: Path) -> None:
    def refused(
        error: type[errors.MergepipeError], match: str, exit_code: int, out: Path | None = None, **how: Any
    ) -> None:
        keys = how.pop("keys", {})
        with pytest.raises(error, match=match) as caught:
            mergepipe.build(recipe(models, **keys), work=tmp_path / "refused", out=out or tmp_path / "merged", **how)
        assert caught.value.exit_code == exit_code
        assert not (tmp_path / "refused").exists()

    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("important")
    refused(errors.CheckpointNotFoundError, "nowhere", 4, keys={"base_model": str(tmp_path / "nowhere")})
    refused(errors.RecipeError, "tyes", 3, keys={"merge_method": "tyes"})
    refused(errors.RecipeError, "wait", 3, keys={"parameters": {"wait": 0.5}})
    refused(errors.OutputExistsError, r"thesis\.txt", 6, out=tmp_path / "full")
    refused(errors.OutputExistsError, "lies in the model", 6, out=models / "a" / "merged")
    refused(errors.OutputExistsError, "lies in the model", 6, out=models / "a")
    refused(errors.OutputExistsError, "lies in the output", 6, out=models)
    refused(errors.MemoryBudgetError, r"smallest ceiling that would do is --memory \d+MiB", 5, memory="1MiB")
    write_model(tmp_path / "odd", 4, classes=4)
    refused(errors.TensorMismatchError, "classifier.weight", 4, keys={"models": [{"model": str(tmp_path / "odd")}]})
    data = (models / "b" / "model.safetensors").read_bytes()
    (models / "b" / "model.safetensors").write_bytes(data[:-5])
    refused(errors.CheckpointError, r"b/model\.safetensors", 4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_not_a_number_is_named_with_model_tensor_and_index(models: Path, value: float) -> None:
    tensors = load_file(models / "b" / "model.safetensors")
    tensors["layers.1.w"][3, 7] = value
    save_file(tensors, models / "b" / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=r"'layers\.1\.w' of model '.*/b' holds a .* at element 97"):
        merge(models)
    found = status(models / "work")
    assert found.state == "interrupted"
    assert found.failure is not None
    assert "holds a NaN or an infinity at element 97" in found.failure
    assert not (models / "merged" / "model.safetensors").exists()


def test_a_rule_that_applies_to_nothing_is_noted(models: Path) -> None:
    rules = [{"match": r"layers\.\d+\.w", "merge_method": "linear"}, {"match": "lm_haed", "merge_method": "linear"}]
    plan = mergepipe.build(recipe(models, rules=rules), work=models / "work", out=models / "merged")
    assert [note for note in plan.notes if "applies to no tensor" in note] == [
        "the rule for 'lm_haed' applies to no tensor: no name matches, or an earlier rule comes first"
    ]


def test_several_bad_checkpoints_are_told_together(models: Path) -> None:
    keys = {"base_model": str(models / "nowhere"), "models": [{"model": str(models / "gone")}]}
    with pytest.raises(errors.CheckpointError, match=r"(?s)nowhere.*gone"):
        mergepipe.build(recipe(models, **keys), work=models / "work", out=models / "merged")


def test_a_disk_too_small_for_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("base", "a", "b")):
        write_model(tmp_path / name, seed, shards=5)
    plan = mergepipe.build(recipe(tmp_path), work=tmp_path / "w0")
    sizes = sorted(shard.size for shard in plan.layout().shards)
    free = 0
    usage = shutil._ntuple_diskusage  # type: ignore[attr-defined]
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**12, 10**12 - free, free))
    with pytest.raises(errors.DiskFullError, match=r"needs [\d,]+ bytes, 0 are free"):
        mergepipe.build(recipe(tmp_path), work=tmp_path / "w1", out=tmp_path / "merged")
    monkeypatch.setattr("mergepipe.pipeline.build.journal_need", lambda *_: Need(tmp_path, 0, "the journal"))
    free = sum(sizes[-3:]) + beside_bytes(plan)
    notes: list[Event] = []
    mergepipe.build(recipe(tmp_path), work=tmp_path / "w1", out=tmp_path / "merged", on_event=notes.append)
    assert any(isinstance(note, Note) and "--on-shard" in note.text for note in notes)
    free -= 1
    with pytest.raises(errors.DiskFullError, match="3 files of the output"):
        mergepipe.build(recipe(tmp_path), work=tmp_path / "w2", out=tmp_path / "merged")


def test_overflow_of_the_arithmetic_is_named(models: Path) -> None:
    for name in ("base", "a", "b"):
        tensors = load_file(models / name / "model.safetensors")
        tensors["norm"][5] = -3e38 if name == "base" else 3e38
        save_file(tensors, models / name / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=r"'norm' overflows float32 while it is merged, at element 5"):
        merge(models)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {"weight": 2.0, "normalize": False}),
        ("task_arithmetic", {"weight": 1.0}),
        ("ties", {"weight": 1.0, "normalize": False}),
        ("ties", {"weight": 1.0, "density": 0.5}),
    ],
)
def test_overflow_from_bits_to_bits_is_named(models: Path, method: str, parameters: dict[str, Any]) -> None:
    """Of bfloat16 to bfloat16, where nothing is decoded unless something is odd."""
    for name in ("base", "a", "b"):
        tensors = load_file(models / name / "model.safetensors")
        tensors["norm"][5] = -3e38 if name == "base" else 3e38
        stored = {key: v.astype(ml_dtypes.bfloat16) if v.dtype == "f4" else v for key, v in tensors.items()}
        save_file(stored, models / name / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=r"'norm' overflows float32 while it is merged, at element 5"):
        merge(models, merge_method=method, parameters=parameters, dtype="bfloat16")


@pytest.mark.parametrize(("dtype", "remedy"), [("bfloat16", "float32"), ("float16", "bfloat16")])
def test_rounding_to_infinity_is_named(models: Path, dtype: str, remedy: str) -> None:
    """What fits float32 and not the output: the remedy is a type that it fits."""
    for name in ("base", "a", "b"):
        tensors = load_file(models / name / "model.safetensors")
        tensors["norm"][5] = np.finfo(np.float32).max if dtype == "bfloat16" else 1e6
        save_file(tensors, models / name / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=rf"'norm' overflows {dtype} at element 5 .*`dtype: {remedy}`"):
        merge(models, dtype=dtype)


def test_overflow_of_the_output_type_is_named(models: Path) -> None:
    for name in ("base", "a", "b"):
        tensors = load_file(models / name / "model.safetensors")
        tensors["norm"][5] = 1e6
        save_file(tensors, models / name / "model.safetensors")
    with pytest.raises(errors.NonFiniteError, match=r"'norm' overflows float16 at element 5"):
        merge(models, dtype="float16")
