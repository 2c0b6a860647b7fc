"""OPCM from end to end, and one more model onto a finished merge: the bytes of a merge of all at once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import mergepipe
from mergepipe.errors import (
    DamageError,
    InputChangedError,
    Interrupted,
    MemoryBudgetError,
    OutputExistsError,
    RecipeError,
    UsageError,
    WorkspaceError,
)
from mergepipe.pipeline.status import status
from mergepipe.pipeline.verify import verify
from support import matrices, whole

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.up.weight": (24, 40),
    "layers.1.down.weight": (300, 700),
    "layers.1.experts.weight": (3, 6, 5),
    "model.embed_tokens.weight": (50, 8),
    "norm.weight": (31,),
    "empty": (0, 4),
}
DTYPES = {"layers.1.down.weight": "bfloat16", "norm.weight": "float16"}


def family(folder: Path, models: int = 3, dtypes: Any = DTYPES) -> tuple[whole.Model, list[whole.Model], list[Path]]:
    """Values, and the folders they are in: the base first."""
    base, experts = whole.family(7, models=models, shapes=SHAPES)
    paths = [whole.write(folder / name, model, dtypes) for name, model in zip(NAMES, [base, *experts], strict=False)]
    return base, experts, paths


NAMES = ("base", "a", "b", "c", "d")


def recipe(folder: Path, paths: Sequence[Path], **more: Any) -> Path:
    base, *models = paths
    document = {"merge_method": "opcm", "base_model": str(base), "models": [{"model": str(m)} for m in models], **more}
    target = folder / f"recipe-{len(models)}.yaml"
    target.write_text(yaml.safe_dump(document))
    return target


def merge(folder: Path, paths: Sequence[Path], name: str, how: Any = None, **more: Any) -> Path:
    """Build and run; the output."""
    options = {"chunk_size": "64KiB", "memory": "3GiB"}
    mergepipe.build(recipe(folder, paths, **more), work=folder / f"work-{name}", out=folder / name, **options)
    return mergepipe.run(folder / f"work-{name}", **{"workers": 2, **(how or {})}).output


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("dtypes", "svd"), [(DTYPES, "gram"), ("float64", "full")], ids=["mixed by gram", "float64 by full"]
)
def test_against_the_reference(tmp_path: Path, dtypes: Any, svd: str) -> None:
    base, experts, paths = family(tmp_path, dtypes=dtypes)
    out = merge(tmp_path, paths, "merged", parameters={"svd": svd, "lambda": 0.7})
    expected = matrices.opcm_model(base, experts, lam=0.7)
    found = load_file(out / "model.safetensors")
    for name, values in expected.items():
        bits = {"bfloat16": 2**-7, "float16": 2**-10, "float64": 1e-9}.get(found[name].dtype.name, 2**-20)
        np.testing.assert_allclose(found[name].astype(np.float64), values, rtol=bits, atol=bits / 4, err_msg=name)


def test_the_update_has_the_mean_norm_of_the_task_vectors(tmp_path: Path) -> None:
    base, experts, paths = family(tmp_path, dtypes="float64")
    out = merge(tmp_path, paths, "merged")
    manifest = json.loads((out / "mergepipe_manifest.json").read_text(encoding="utf-8"))
    norms = [np.linalg.norm(whole.flat(expert) - whole.flat(base)) for expert in experts]
    np.testing.assert_allclose(manifest["task_norms"], norms, rtol=1e-12)
    merged = np.linalg.norm(whole.flat(whole.read(out)) - whole.flat(base))
    assert merged == pytest.approx(np.mean(norms), rel=1e-9)
    assert manifest["tensors"]["layers.0.up.weight"]["ranks"] == [0, 24, 24]
    assert 0 < manifest["tensors"]["layers.0.up.weight"]["protected"][2] < 24


def test_one_model_comes_back(tmp_path: Path) -> None:
    _, experts, paths = family(tmp_path, dtypes="float32")
    found = whole.read(merge(tmp_path, paths[:2], "merged"))
    for name, values in experts[0].items():
        np.testing.assert_array_equal(found[name], values)


@pytest.mark.parametrize(
    "more",
    [
        {},
        pytest.param({"parameters": {"svd": "gram", "alpha": 0.2}}, marks=pytest.mark.slow),
        {"sparsify": {"method": "random", "density": 0.5}, "seed": 3},
        pytest.param(
            {"sparsify": {"method": "tadrop", "target_density": 0.5, "metric": "l1l2"}}, marks=pytest.mark.slow
        ),
        {"rules": [{"match": "norm", "merge_method": "passthrough"}], "dtype": "float32"},
    ],
    ids=["plain", "gram", "random", "tadrop", "rule"],
)
def test_adding_gives_the_bytes_of_all_at_once(tmp_path: Path, more: dict[str, Any]) -> None:
    _, _, paths = family(tmp_path)
    expected = merge(tmp_path, paths, "all", {"reader": "direct"}, **more)
    merge(tmp_path, paths[:3], "two", **more)
    for path in paths[1:3]:
        shutil.rmtree(path)
    plan = mergepipe.add_model(tmp_path / "work-two", paths[3])
    assert plan.output == str(tmp_path / "two+c")
    result = mergepipe.run(tmp_path / "work-two", workers=1)
    assert weights(result.output) == weights(expected)
    inputs = [(entry["model"], entry["role"]) for entry in result.manifest["inputs"]]
    assert inputs == [("base", "base"), ("a", "model"), ("b", "model"), ("c", "model")]
    assert (result.output / "README.md").read_text(encoding="utf-8") == (expected / "README.md").read_text(
        encoding="utf-8"
    )
    kept, direct = (load_file(out / "opcm" / "model.safetensors") for out in (result.output, expected))
    for name, values in direct.items():
        np.testing.assert_array_equal(kept[name], values)


def test_one_by_one_from_a_single_model(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path, models=4)
    expected = merge(tmp_path, paths, "all")
    merge(tmp_path, paths[:2], "one")
    for path in paths[2:]:
        mergepipe.add_model(tmp_path / "work-one", path)
        result = mergepipe.run(tmp_path / "work-one")
    assert result.output == tmp_path / "one+b+c+d"
    assert weights(result.output) == weights(expected)
    assert len(result.manifest["task_norms"]) == 4


def test_models_in_shards_and_copied_stores(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    options: dict[str, Any] = {"shard_size": "100KiB", "memory": "3GiB", "store": "copy"}
    mergepipe.build(recipe(tmp_path, paths), work=tmp_path / "w-all", out=tmp_path / "all", **options)
    expected = mergepipe.run(tmp_path / "w-all").output
    mergepipe.build(recipe(tmp_path, paths[:3]), work=tmp_path / "w", out=tmp_path / "two", **options)
    mergepipe.run(tmp_path / "w")
    mergepipe.add_model(tmp_path / "w", paths[3], out=tmp_path / "three")
    found = mergepipe.run(tmp_path / "w").output
    assert len(weights(found)) > 1
    assert weights(found) == weights(expected)
    assert not verify(found, full=True).damage
    assert not verify(tmp_path / "w", full=True).damage
    kept = sorted((found / "opcm").glob("*.safetensors"))[-1]
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    assert [damage.file for damage in verify(found, full=True).damage] == [str(kept)]


def test_order_matters(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    one = whole.read(merge(tmp_path, paths, "one"))
    other = whole.read(merge(tmp_path, [paths[0], *paths[:0:-1]], "other"))
    assert np.any(one["layers.1.down.weight"] != other["layers.1.down.weight"])


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    expected = weights(merge(tmp_path, paths, "all"))
    merge(tmp_path, paths[:3], "two")
    work = tmp_path / "work-two"
    mergepipe.add_model(work, paths[3])
    seen: set[str] = set()
    messages: list[str] = []
    for attempt in range(60):
        stop, count = threading.Event(), [0]

        def on_event(event: Any, stop: threading.Event = stop, count: list[int] = count, limit: int = attempt) -> None:
            if type(event).__name__ == "UnitFinished":
                seen.add(event.stage)
                count[0] += 1
                if count[0] > limit:
                    stop.set()

        try:
            result = mergepipe.run(work, stop=stop, on_event=on_event, workers=2, verify="full")
            break
        except Interrupted as error:
            messages.append(str(error))
            state = status(work)
            assert state.state == "interrupted"
            assert 0 <= state.done_bytes <= state.total_bytes
            mergepipe.add_model(work, paths[3])  # asked for again, it goes on
    else:
        pytest.fail("made no progress")
    assert {"project", "apply", "norms"} <= seen
    assert all(f"--work {work}`" in message for message in messages)
    assert weights(result.output) == expected
    assert status(work).state == "done"
    mergepipe.add_model(work, paths[3])
    assert mergepipe.run(work).output == result.output


VICTIM = """
import os, signal, sys, time
import mergepipe
from mergepipe.pipeline.commits import Committer
from mergepipe.storage import atomic
Committer.__init__.__kwdefaults__.update(max_bytes=1, max_seconds=0.01)
left = [int(sys.argv[3])]
def step(*_args):
    left[0] -= 1
    if left[0] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
class Listener:
    def __call__(self, event):
        step()
import mergepipe.storage.workspace as workspace
for name in ("write_plan", "forget_progress", "forget_stores"):
    def wrapped(self, *args, _real=getattr(workspace.Workspace, name)):
        step()
        result = _real(self, *args)
        step()
        return result
    setattr(workspace.Workspace, name, wrapped)
mergepipe.add_model(sys.argv[1], sys.argv[2])
mergepipe.run(sys.argv[1], workers=2, on_event=Listener())
"""


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path) -> None:
    """Also while the plan is being replaced: then the old one is still there, or the new one already."""
    _, _, paths = family(tmp_path)
    expected = weights(merge(tmp_path, paths, "all"))
    merge(tmp_path, paths[:3], "two")
    rng, deaths = random.Random(2), 0
    schedule = [1, 2, 3, 4, 5, 6, *(rng.randrange(7, 40) for _ in range(12)), 1000]
    for after in schedule:
        args = [sys.executable, "-c", VICTIM, str(tmp_path / "work-two"), str(paths[3]), str(after)]
        end = subprocess.run(args, check=False, capture_output=True, text=True)
        assert end.returncode in (0, -signal.SIGKILL), end.stderr
        if end.returncode == 0:
            break
        deaths += 1
    assert deaths > 5
    assert weights(tmp_path / "two+c") == expected


def test_what_can_not_be_added_to(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path, models=4)
    merge(
        tmp_path, paths[:4], "three", rules=[{"match": "norm", "merge_method": "linear", "parameters": {"weight": 1.0}}]
    )
    with pytest.raises(UsageError, match=r"'norm.weight' is merged by linear.*build again"):
        mergepipe.add_model(tmp_path / "work-three", paths[4])
    merge(tmp_path, paths[:3], "sums", merge_method="task_arithmetic", parameters={"weight": 1.0})
    with pytest.raises(UsageError, match=r"by task_arithmetic, which needs all of its models.*--add goes with opcm"):
        mergepipe.add_model(tmp_path / "work-sums", paths[3])
    shared = {"sparsify": {"method": "tadrop", "target_density": 0.5, "calibrate_scope": "all"}}
    merge(tmp_path, paths[:3], "shared", **shared)
    with pytest.raises(UsageError, match="calibrate_scope: all"):
        mergepipe.add_model(tmp_path / "work-shared", paths[3])
    with pytest.raises(WorkspaceError, match="build"):
        mergepipe.add_model(tmp_path / "nowhere", paths[3])


def test_only_onto_a_finished_and_unchanged_merge(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path, models=4)
    work = tmp_path / "work"
    mergepipe.build(recipe(tmp_path, paths[:3]), work=work, out=tmp_path / "two", memory="3GiB")
    with pytest.raises(WorkspaceError, match="not finished"):
        mergepipe.add_model(work, paths[3])
    mergepipe.run(work)
    for path in (paths[2], paths[0]):
        with pytest.raises(UsageError, match="in this merge already"):
            mergepipe.add_model(work, path)
    for out in (tmp_path / "two", tmp_path / "two" / "three", tmp_path / "a"):
        with pytest.raises(OutputExistsError):
            mergepipe.add_model(work, paths[3], out=out)
    with pytest.raises(MemoryBudgetError, match="smallest ceiling"):
        mergepipe.add_model(work, paths[3], memory="300MiB")
    kept = tmp_path / "two" / "opcm" / "model.safetensors"
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(DamageError, match=r"opcm/model.safetensors"):
        mergepipe.add_model(work, paths[3])
    data[-1] ^= 1
    kept.write_bytes(data)
    mergepipe.add_model(work, paths[3])
    with pytest.raises(WorkspaceError, match=r"adds this model to '.*two\+c' already"):
        mergepipe.add_model(work, paths[3], out=tmp_path / "elsewhere")
    with pytest.raises(WorkspaceError, match="not finished"):
        mergepipe.add_model(work, paths[4])
    kept.write_bytes(data)
    with pytest.raises(InputChangedError, match="opcm"):
        mergepipe.run(work)


def test_a_base_that_changed_or_a_state_that_is_gone(tmp_path: Path) -> None:
    base, _, paths = family(tmp_path)
    merge(tmp_path, paths[:3], "two")
    whole.write(tmp_path / "base", base, DTYPES)
    with pytest.raises(InputChangedError, match=r"base .* changed since the merge"):
        mergepipe.add_model(tmp_path / "work-two", paths[3])
    shutil.rmtree(tmp_path / "two" / "opcm")
    with pytest.raises(WorkspaceError, match="gone"):
        mergepipe.add_model(tmp_path / "work-two", paths[3])


def test_a_model_that_does_not_fit_leaves_the_merge_as_it_was(tmp_path: Path) -> None:
    base, _, paths = family(tmp_path)
    merge(tmp_path, paths[:3], "two")
    del base["norm.weight"]
    other = whole.write(tmp_path / "other", base)
    before = (tmp_path / "work-two" / "plan.json").read_bytes()
    with pytest.raises(mergepipe.errors.TensorMismatchError, match=r"norm.weight"):
        mergepipe.add_model(tmp_path / "work-two", other)
    assert (tmp_path / "work-two" / "plan.json").read_bytes() == before
    assert not (tmp_path / "two+other").exists()
    mergepipe.add_model(tmp_path / "work-two", paths[3])
    mergepipe.run(tmp_path / "work-two")


def test_first_stage_is_made_again_where_it_is_gone(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    out = merge(tmp_path, paths, "merged")
    expected = weights(out)
    shutil.rmtree(out / "opcm")
    (out / "model.safetensors").unlink()
    assert weights(mergepipe.run(tmp_path / "work-merged").output) == expected
    assert (out / "opcm" / "model.safetensors").is_file()
    (out / "model.safetensors").unlink()
    assert weights(mergepipe.run(tmp_path / "work-merged", restart=True).output) == expected


def test_alpha_out_of_bounds(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    for alpha in (-0.1, 1.0, 2):
        with pytest.raises(RecipeError, match="alpha"):
            mergepipe.build(recipe(tmp_path, paths, parameters={"alpha": alpha}), work=tmp_path / "w")


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mergepipe.cli.main import main

    _, _, paths = family(tmp_path)
    expected = weights(merge(tmp_path, paths, "all"))
    merge(tmp_path, paths[:3], "two")
    arguments = ["run", "-w", str(tmp_path / "work-two"), "--add", str(paths[3]), "--out", str(tmp_path / "three")]
    assert main([*arguments, "--quiet"]) == 0
    assert str(tmp_path / "three") in capsys.readouterr().out
    assert weights(tmp_path / "three") == expected


def test_one_of_several_documents_and_with_diagnostics(tmp_path: Path) -> None:
    """A merge of two stages may be read by another one, and be compared with its base; nothing is added to a chain."""
    base, experts, paths = family(tmp_path, dtypes="float32")
    models = [{"model": str(path)} for path in paths[1:3]]
    one = {"name": "first", "merge_method": "opcm", "base_model": str(paths[0]), "models": models}
    two = {
        "merge_method": "opcm",
        "base_model": str(paths[0]),
        "models": [{"model": "first"}, {"model": str(paths[3])}],
    }
    (tmp_path / "chain.yaml").write_text(yaml.safe_dump_all([one, two]))
    mergepipe.build(tmp_path / "chain.yaml", work=tmp_path / "w", out=tmp_path / "out", memory="3GiB")
    result = mergepipe.run(tmp_path / "w", diagnostics=True)
    inner = matrices.opcm_model(base, experts[:2])
    expected = matrices.opcm_model(base, [inner, experts[2]])
    for name, values in whole.read(result.output).items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    found = result.manifest["tensors"]["layers.0.up.weight"]
    assert found["route"] == "full"
    assert found["change"]["norm"] > 0
    assert verify(tmp_path / "w", full=True).damage == []
    with pytest.raises(UsageError, match="several documents"):
        mergepipe.add_model(tmp_path / "w", paths[2])


def test_output_of_two_stages_can_be_moved_before_work_begins(tmp_path: Path) -> None:
    _, _, paths = family(tmp_path)
    expected = weights(merge(tmp_path, paths, "all"))
    mergepipe.build(recipe(tmp_path, paths), work=tmp_path / "w", out=tmp_path / "first", memory="3GiB")
    result = mergepipe.run(tmp_path / "w", out=tmp_path / "moved")
    assert result.output == tmp_path / "moved"
    assert weights(result.output) == expected
    assert (tmp_path / "moved" / "opcm" / "model.safetensors").is_file()
    assert not (tmp_path / "first").exists()
