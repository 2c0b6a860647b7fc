"""Whole-matrix methods through `build` and `run`: the same bytes however they are cut, killed and resumed."""

from __future__ import annotations

import json
import shutil
import threading
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import Interrupted, MemoryBudgetError, NonFiniteError, RecipeError, UsageError, WorkspaceError
from mergepipe.pipeline import devices
from mergepipe.pipeline.memory import RESERVED_BYTES, TORCH_BYTES
from mergepipe.storage.journal import Journal
from mergepipe.storage.workspace import Workspace
from support import matrices as whole
from support import reference
from support.jobs import hashes

HERE = devices.choose("auto", None, needed=True)
"""Where runs that are not told otherwise work on matrices."""

SHAPES = {
    "model.embed_tokens.weight": (50, 40),
    "model.layers.0.up.weight": (20, 70_000),  # two units; rows wider than a block
    "model.layers.0.down.weight": (70_000, 20),
    "model.layers.0.norm.weight": (64,),
    "model.layers.0.experts": (3, 8, 9),
    "model.layers.1.up.weight": (40, 64),
    "lm_head.weight": (50, 40),
}


@cache
def values_of(number: int) -> dict[str, np.ndarray[Any, Any]]:
    """The base, or an expert near it."""
    draw = np.random.default_rng(number)
    drawn = {name: draw.standard_normal(shape) for name, shape in SHAPES.items()}
    return {name: values_of(0)[name] + 0.1 * values for name, values in drawn.items()} if number else drawn


def write(folder: Path, dtype: Any = np.float16, models: int = 3, **extra: Any) -> Path:
    """A base and experts near it, and a recipe; a few megabytes."""
    for number in range(models + 1):
        target = folder / ("base" if number == 0 else f"expert-{number}")
        target.mkdir(parents=True)
        tensors = {name: values.astype(dtype) for name, values in values_of(number).items()}
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
        (target / "config.json").write_text(json.dumps({"model_type": "tiny"}))
    recipe = {
        "merge_method": "mda",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / f"expert-{number}")} for number in range(1, models + 1)],
        **extra,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def build(folder: Path, work: str = "work", out: str = "merged", **how: Any) -> Path:
    mergepipe.build(folder / "recipe.yaml", work=folder / work, out=folder / out, **{"memory": "2GiB", **how})
    return folder / work


def tensors(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return load_file(folder / "model.safetensors")


def task_vectors(name: str, dtype: Any = np.float32) -> tuple[Any, list[Any]]:
    """A tensor of the base and what is added to it, as they are stored."""
    work = np.float64 if dtype is np.float64 else np.float32
    base, *experts = (values_of(number)[name].astype(dtype).astype(work) for number in range(4))
    return base.astype(np.float64), [(expert - base).astype(np.float64) for expert in experts]


@lru_cache(maxsize=2 * len(SHAPES))
def update_of(method: str, name: str, dtype: Any = np.float32, sparsify: str = "none") -> Any:
    """What the reference makes of a tensor: the same for every route there is to it."""
    thinners: dict[str, Any] = {
        "none": lambda delta: delta,
        "magnitude": lambda delta: reference.magnitude(delta, 0.3),
        "tadrop": lambda delta: reference.tadrop(delta, {}),
    }
    deltas = [thinners[sparsify](delta) for delta in task_vectors(name, dtype)[1]]
    is_matrix = len(SHAPES[name]) == 2 and "embed" not in name and "head" not in name
    return getattr(whole, method)(deltas) if is_matrix else np.mean(deltas, 0)


def whole_matrices(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: record for name, record in manifest["tensors"].items() if "route" in record}


@pytest.mark.parametrize("svd", ["exact", "gram"])
@pytest.mark.parametrize(
    "dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name
)
def test_against_the_reference(tmp_path: Path, dtype: Any, svd: str) -> None:
    folder = write(tmp_path, dtype, parameters={"svd": svd, "lambda": 0.7})
    result = mergepipe.run(build(folder))
    merged = tensors(folder / "merged")
    for name in SHAPES:
        expected = task_vectors(name, dtype)[0] + 0.7 * update_of("mda", name, dtype)
        found = merged[name].astype(np.float64)
        bits = {"float16": 2**-10, "float32": 2**-22, "float64": 1e-9, "bfloat16": 2**-7}[np.dtype(dtype).name]
        np.testing.assert_allclose(found, expected, rtol=bits, atol=bits / 4)
        # Rounded once: nearly everywhere the very value that the reference rounds to.
        if name.endswith(("up.weight", "down.weight")) and dtype is not np.float64:
            assert np.mean(merged[name] == expected.astype(dtype)) > 0.999
    found = whole_matrices(result.manifest)
    assert sorted(found) == sorted(name for name in SHAPES if name.endswith(("up.weight", "down.weight")))
    assert {record["route"] for record in found.values()} == {"full" if svd == "exact" else "gram"}
    assert found["model.layers.0.up.weight"]["ranks"] == [6] * 3
    assert result.manifest["device"] == HERE
    assert {record["device"] for record in found.values()} == {HERE}
    assert "torch" in result.manifest["versions"]


@pytest.mark.parametrize("name", ["mda", "tsv_m", "iso_c", "iso_cts", "dc_merge", "opcm"])
def test_nothing_about_the_run_changes_a_byte(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, merge_method=name, parameters={"svd": "gram"})
    mergepipe.run(build(folder), workers=1, reader="mmap")
    expected = hashes(folder / "merged")
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"chunk_size": "64KiB"}, {"workers": 3}),
        ({"store": "copy", "chunk_size": "1MiB"}, {"workers": 2, "memory": "4GiB"}),
        ({}, {"workers": 5, "reader": "direct"}),
    ]
    for number, (building, running) in enumerate(ways):
        mergepipe.run(build(folder, f"work-{number}", f"out-{number}", **building), **running)
        assert hashes(folder / f"out-{number}") == expected


@pytest.mark.parametrize("svd", ["full", "gram"])
@pytest.mark.parametrize("name", ["mda", "tsv_m", "iso_c"])
@pytest.mark.parametrize("sparsify", ["magnitude", "tadrop"])
def test_thinned_task_vectors(tmp_path: Path, name: str, sparsify: str, svd: str) -> None:
    options = {"method": "magnitude", "density": 0.3} if sparsify == "magnitude" else {"method": "tadrop"}
    folder = write(tmp_path, np.float32, merge_method=name, sparsify=options, parameters={"svd": svd})
    result = mergepipe.run(build(folder, chunk_size="256KiB"))
    merged = tensors(folder / "merged")
    for tensor in ("model.layers.0.down.weight", "model.layers.0.norm.weight", "model.layers.1.up.weight"):
        expected = task_vectors(tensor)[0] + update_of(name, tensor, sparsify=sparsify)
        np.testing.assert_allclose(merged[tensor], expected, rtol=1e-5, atol=1e-6)
        assert len(result.manifest["densities"][tensor]) == 3


def test_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path, sparsify={"method": "magnitude", "density": 0.5})
    mergepipe.run(build(folder))
    expected = hashes(folder / "merged")
    seen: list[str] = []
    for stop_after in range(1, 12, 2):
        work = build(folder, f"work-{stop_after}", f"out-{stop_after}")
        for attempt in range(40):
            stop, count = threading.Event(), [0]

            # Later attempts get further: steps before a kill are taken again.
            limit = stop_after + 4 * attempt

            def on_event(
                event: Any, stop: threading.Event = stop, count: list[int] = count, limit: int = limit
            ) -> None:
                if type(event).__name__ == "UnitFinished":
                    count[0] += 1
                    seen.append(event.stage)
                    if count[0] >= limit:
                        stop.set()

            try:
                result = mergepipe.run(work, stop=stop, on_event=on_event, workers=2, verify="full")
                break
            except Interrupted:
                continue
        else:
            pytest.fail("made no progress")
        assert hashes(folder / f"out-{stop_after}") == expected
        assert len(whole_matrices(result.manifest)) == 3
    assert {"factor", "solve", "apply"} <= set(seen)


def test_too_small_a_ceiling_names_the_smallest_that_does(tmp_path: Path) -> None:
    folder = write(tmp_path)
    with pytest.raises(MemoryBudgetError, match=r"'model.layers.0.(up|down).weight' .*--memory (\d+)MiB") as refused:
        build(folder, memory="500MiB")
    smallest = int(str(refused.value).partition("--memory ")[2].partition("MiB")[0])
    assert smallest * 2**20 > RESERVED_BYTES + TORCH_BYTES
    with pytest.raises(MemoryBudgetError):
        build(folder, memory=f"{smallest - 1}MiB")
    work = build(folder, memory=f"{smallest}MiB")
    result = mergepipe.run(work)
    assert whole_matrices(result.manifest)
    with pytest.raises(MemoryBudgetError):
        mergepipe.run(build(folder, "other", "other-out"), memory="500MiB")


def test_whole_matrices_may_take_half_of_the_memory(tmp_path: Path) -> None:
    folder = write(tmp_path)
    plan = mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    assert plan.allowed > 512 * 2**20
    other = write(tmp_path / "other", merge_method="task_arithmetic", parameters={"weight": 1.0})
    assert mergepipe.build(other / "recipe.yaml", work=other / "work", out=other / "m").allowed == 512 * 2**20


def test_identical_models_are_merged_with_a_note(tmp_path: Path) -> None:
    folder = write(tmp_path)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    shutil.copytree(folder / "expert-1", folder / "twin")
    recipe["models"] = [{"model": str(folder / "expert-1")}, {"model": str(folder / "twin")}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    notes: list[str] = []
    result = mergepipe.run(build(folder), on_event=lambda event: notes.append(str(getattr(event, "text", ""))))
    assert any("follow from others" in note for note in notes)
    assert all(record["directions_lost"] for record in whole_matrices(result.manifest).values())
    assert all(np.isfinite(value).all() for value in tensors(folder / "merged").values())


def test_rank_larger_than_a_matrix(tmp_path: Path) -> None:
    folder = write(tmp_path, parameters={"rank": 21, "mode": "tsv"})
    with pytest.raises(RecipeError, match=r"rank 21 is larger than 'model.layers.0.(up|down).weight'"):
        build(folder)


@pytest.mark.parametrize("rank", [0, -1, 1.5, "most", True, [1]])
def test_ranks_that_are_none(tmp_path: Path, rank: Any) -> None:
    folder = write(tmp_path, parameters={"rank": rank})
    with pytest.raises(RecipeError, match="rank"):
        build(folder)


def test_infinity_in_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "expert-2" / "model.safetensors"
    values = load_file(path)
    values["model.layers.0.down.weight"][60_000, 5] = np.inf
    save_file(values, path, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"down.weight.*expert-2.*element 1,200,005"):
        mergepipe.run(build(folder))


def test_devices(tmp_path: Path) -> None:
    folder = write(tmp_path)
    work = build(folder)
    for asked, message in (("tpu", "is no device"), ("cuda:x", "is no device"), ("cuda:63", "no device 'cuda:63'")):
        with pytest.raises(UsageError, match=message):
            mergepipe.run(work, device=asked)
    with pytest.raises(WorkspaceError, match="begun with --device cuda:0"):
        devices.choose("cpu", "cuda:0", needed=True)
    assert mergepipe.run(work, device="cpu").manifest["device"] == "cpu"


def test_device_is_in_the_journal(tmp_path: Path) -> None:
    folder = write(tmp_path)
    work = build(folder)
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        mergepipe.run(work, stop=stop)
    journal = Journal(Workspace(work).journal_file)
    assert [record["device"] for record in journal.records if record["type"] == "device"] == [HERE]
    journal.close()


def test_steps_are_nodes_of_the_graph(tmp_path: Path) -> None:
    from mergepipe.cli.plan import _picture

    plan = mergepipe.build(write(tmp_path) / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    text = _picture(plan)
    assert "factor 0" in text
    assert "factor 2" in text
    assert "solve 3" in text


def test_torch_keeps_its_threads(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        mergepipe.run(build(write(tmp_path)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
def test_calibrated_after_the_merge(tmp_path: Path, name: str) -> None:
    """`svc` takes what the method merges, thinned or not, against the task vectors as they are."""
    given = {"svc": 0.1, "weight": 0.4} | ({"density": 0.5} if name == "ties" else {})
    folder = write(tmp_path, np.float32, merge_method=name, parameters={**given, "lambda": 0.9})
    result = mergepipe.run(build(folder))
    merged = tensors(folder / "merged")
    for tensor in SHAPES:
        base, deltas = task_vectors(tensor)
        update = np.mean(deltas, 0) * 3 * 0.4
        if name == "ties":
            thinned = [reference.magnitude(delta, 0.5) for delta in deltas]
            update = reference.task_vectors(np.zeros_like(base), thinned, [0.4] * 3, "sum", True)
        if base.ndim == 2 and "embed" not in tensor and "head" not in tensor:
            update = whole.svc(update, deltas, 0.1)
        np.testing.assert_allclose(merged[tensor], base + 0.9 * update, rtol=1e-5, atol=2e-6, err_msg=tensor)
    assert sorted(whole_matrices(result.manifest)) == sorted(
        n for n in SHAPES if n.endswith(("up.weight", "down.weight"))
    )


@pytest.mark.parametrize("name", ["mda", "iso_c"])
def test_what_is_left_out_takes_the_mean_or_the_base(tmp_path: Path, name: str) -> None:
    chosen = {"include": ["down", "lm_head"], "exclude": ["lm_head"]}
    for kind in ("average", "base"):
        folder = write(tmp_path / kind, np.float32, merge_method=name, parameters={**chosen, "excluded_from": kind})
        result = mergepipe.run(build(folder))
        assert list(whole_matrices(result.manifest)) == ["model.layers.0.down.weight"]
        merged = tensors(folder / "merged")
        for tensor in SHAPES:
            base, deltas = task_vectors(tensor)
            mean = base + (np.mean(deltas, 0) if kind == "average" else 0)
            assert ("down" in tensor) != np.allclose(merged[tensor], mean, rtol=1e-6, atol=1e-7)
            assert kind == "average" or "down" in tensor or merged[tensor].tobytes() == base.astype("f4").tobytes()


def test_calibration_changes_no_byte_of_what_it_leaves_alone(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain", merge_method="task_arithmetic", parameters={"weight": 0.4})
    mergepipe.run(build(plain))
    chosen = {"weight": 0.4, "svc": 0.1, "svc_exclude": ["."]}
    left = write(tmp_path / "left", merge_method="task_arithmetic", parameters=chosen)
    mergepipe.run(build(left))
    before, after = tensors(plain / "merged"), tensors(left / "merged")
    assert all(before[name].tobytes() == after[name].tobytes() for name in SHAPES)
