"""`check` tells every fault at once, writes nothing, and says what `build` says."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.cli.main import main
from mergepipe.pipeline.check import check
from mergepipe.storage.header import encode_header


def told(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    """Exit code and report of a check."""
    code = main(["check", *args, "--json"])
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, report


def rewrite(folder: Path, **keys: Any) -> None:
    """Replace keys of the recipe."""
    recipe = yaml.safe_load((folder / "mergepipe.yaml").read_text(encoding="utf-8"))
    (folder / "mergepipe.yaml").write_text(yaml.safe_dump(recipe | keys))


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def reshape(model: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: np.zeros(shape, np.float32)}, model / "model.safetensors")


def test_a_sound_recipe_is_planned_and_nothing_is_written(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = listing(models)
    code, report = told(capsys)
    assert (code, report["ok"], report["faults"], report["unchecked"]) == (0, True, [], [])
    assert listing(models) == before
    assert report["plan"]["id"] == mergepipe.build().id
    assert main(["check"]) == 0
    assert "no faults found; nothing was written" in capsys.readouterr().out


def test_everything_at_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt key, a value out of bounds, a shape, a tensor, the ceiling, the output: one check tells them all."""
    reshape(models / "expert-1", "norm.weight", (5,))
    reshape(models / "expert-2", "stray.weight", (2, 2))
    (models / "merged").mkdir()
    (models / "merged" / "mine.txt").write_text("keep")
    rewrite(models, dtipe="bfloat16", seed=-1, merge_method="ties", parameters={"lambda": "much", "normalise": True})
    before = listing(models)
    code, report = told(capsys, "--memory", "100MiB")
    assert code == 3
    assert report["plan"] is None
    assert report["unchecked"] == []
    assert listing(models) == before
    found = [(one["kind"], one["where"]) for one in report["faults"]]
    assert found == [
        ("recipe", "$.dtipe"),
        ("recipe", "$.parameters.lambda"),
        ("recipe", "$.parameters.normalise"),
        ("recipe", "$.seed"),
        ("checkpoint", None),
        ("checkpoint", None),
        ("memory", None),
        ("output", None),
    ]
    messages = [one["message"] for one in report["faults"]]
    assert "'norm.weight' is (4,)" in messages[4]
    assert "'stray.weight' is in" in messages[5]
    assert "the smallest ceiling that would do is --memory" in messages[6]
    assert "mine.txt" in messages[7]
    assert main(["check", "--memory", "100MiB"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("8 faults found; nothing was written")
    assert all(message.splitlines()[0] in out for message in messages)


def test_broken_checkpoints_do_not_hide_each_other_nor_tensors(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two models can't be opened; the third is still compared with the base."""
    os.truncate(models / "expert-1" / "model.safetensors", 40)
    reshape(models / "expert-2", "norm.weight", (5,))
    listed = [{"model": f"./{name}", "parameters": {"weight": 1}} for name in ("expert-1", "gone", "expert-2")]
    rewrite(models, models=listed)
    code, report = told(capsys)
    assert code == 4
    texts = [one["message"] for one in report["faults"]]
    assert len(texts) == 3
    assert [word in text for word, text in zip(("expert-1/model", "gone", "norm.weight"), texts, strict=True)] == [
        True
    ] * 3
    assert report["unchecked"] == ["parameters per tensor", "memory", "disk", "workspace"]


def test_parameters_are_checked_tensor_by_tensor(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A filter that leaves tensors out, and weights that cancel where they meet."""
    weight = [{"filter": "norm", "value": 1.0}, {"filter": "layers", "value": [1.0]}]
    both = [{"model": f"./expert-{n}", "parameters": {"weight": weight}} for n in (1, 2)]
    rewrite(models, models=both)
    reshape_all = [models / name for name in ("base", "expert-1", "expert-2")]
    for folder in reshape_all:
        reshape(folder, "head.weight", (2, 2))
        reshape(folder, "other.weight", (2, 2))
    code, report = told(capsys)
    assert code == 3
    named = sorted(one["message"].split("'")[1] for one in report["faults"])
    assert named == ["head.weight", "other.weight"]
    rewrite(models, merge_method="linear", models=[{"model": "./expert-1"}, {"model": "./expert-2"}])
    rewrite(models, parameters={"weight": 0.0})
    code, report = told(capsys)
    assert {one["message"].split("'")[1] for one in report["faults"]} > {"norm.weight", "layers.0.weight"}


def test_one_mistake_is_told_once(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt `weight` is missing everywhere, too: that is no news."""
    both = [{"model": f"./expert-{n}", "parameters": {"weigth": 1}} for n in (1, 2)]
    rewrite(models, models=both)
    _, report = told(capsys)
    assert [one["where"] for one in report["faults"]] == [f"$.models[{n}].parameters.weigth" for n in (0, 1)]


def gone(folder: Path) -> None:
    (folder / "expert-2" / "model.safetensors").unlink()


def full(folder: Path) -> None:
    (folder / "merged").mkdir()
    (folder / "merged" / "mine.txt").write_text("keep")


BREAKS: dict[str, tuple[Callable[[Path], None], int]] = {
    "sound": (lambda folder: None, 0),
    "no recipe": (lambda folder: (folder / "mergepipe.yaml").unlink(), 3),
    "no yaml": (lambda folder: (folder / "mergepipe.yaml").write_bytes(b"a: [") and None, 3),
    "no method": (lambda folder: rewrite(folder, merge_method="tise"), 3),
    "no models": (lambda folder: rewrite(folder, models=[]), 3),
    "no base": (lambda folder: rewrite(folder, base_model=None), 3),
    "bad rule": (lambda folder: rewrite(folder, rules=[{"match": "(", "merge_method": "linear"}]), 3),
    "stacked": (lambda folder: rewrite(folder, slices=[{"sources": []}]), 3),
    "no weights": (gone, 4),
    "shape": (lambda folder: reshape(folder / "expert-1", "norm.weight", (5,)), 4),
    "output": (full, 6),
    "output in a model": (lambda folder: rewrite(folder, output="./base/merged"), 6),
}


@pytest.mark.parametrize("name", BREAKS)
def test_check_and_build_agree(name: str, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is wrong for one of them only, and what build says first is among what check says."""
    break_it, code = BREAKS[name]
    break_it(models)
    before = listing(models)
    checked = check()
    assert checked.exit_code == code
    assert listing(models) == before
    if code == 0:
        mergepipe.build()
        return
    with pytest.raises(errors.MergepipeError) as caught:
        mergepipe.build()
    error = caught.value
    assert error.exit_code == code
    said = [fault.message for fault in error.faults] if isinstance(error, errors.RecipeError) else [str(error)]
    everything = "\n".join(one.message for one in checked.faults)
    named = [line for text in said for line in text.splitlines() if "Remedy" not in line and "do not fit" not in line]
    assert all(line.strip() in everything for line in named)


def test_unfinished_work_of_another_recipe(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mergepipe.build()
    stop = threading.Event()
    stop.set()
    with pytest.raises(errors.Interrupted):
        mergepipe.run(stop=stop)
    assert told(capsys)[0] == 0
    rewrite(models, parameters={"lambda": 2.0})
    code, report = told(capsys)
    assert (code, [one["kind"] for one in report["faults"]]) == (6, ["workspace"])


def write_sparse(folder: Path, layers: int, hidden: int, inner: int, words: int, shards: int) -> None:
    """The headers of a Llama of any size; the weights are holes."""
    names = [("model.embed_tokens.weight", (words, hidden)), ("model.norm.weight", (hidden,))]
    for n in range(layers):
        parts = {"self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (hidden // 8, hidden)}
        parts |= {"self_attn.v_proj": (hidden // 8, hidden), "self_attn.o_proj": (hidden, hidden)}
        parts |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        parts |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}  # type: ignore[dict-item]
        names += [(f"model.layers.{n}.{part}.weight", shape) for part, shape in parts.items()]
    names.append(("lm_head.weight", (words, hidden)))
    folder.mkdir()
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        header = encode_header([(name, "BF16", shape) for name, shape in part], {"format": "pt"})
        (folder / file).write_bytes(header)
        os.truncate(folder / file, len(header) + sum(2 * math.prod(shape) for _, shape in part))
        weight_map |= {name: file for name, _ in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def test_seconds_at_70b(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four checkpoints of 70.6 B parameters, all holes: only headers can have been read in that time."""
    for name in ("large-base", "large-1", "large-2", "large-3"):
        write_sparse(models / name, 80, 8192, 28672, 128256, 30)
    each = [{"model": f"./large-{n}", "parameters": {"weight": 1, "density": 0.5}} for n in (1, 2, 3)]
    rewrite(models, merge_method="ties", base_model="./large-base", models=each)
    monkeypatch.setattr("mergepipe.pipeline.build.check_room", lambda needs: None)
    start = time.perf_counter()
    checked = check()
    assert time.perf_counter() - start < 10
    assert checked.faults == ()
    assert checked.plan is not None
    assert sum(math.prod(tensor.shape) for tensor in checked.plan.tensors) == 70_553_706_496


CHAIN = """\
name: first
merge_method: linear
models: [{model: ./expert-1}, {model: ./expert-2}]
parameters: {weight: 1.0}
---
name: second
merge_method: linear
models: [{model: ./expert-1}, {model: ./gone}]
parameters: {weight: 1.0}
---
merge_method: task_arithmetic
base_model: ./base
models: [{model: first}, {model: second}]
parameters: {weight: 0.5}
"""


def test_a_recipe_of_several_documents(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every merge that can be looked at is, and each fault is told with the name of its merge."""
    (models / "mergepipe.yaml").write_text(CHAIN)
    reshape(models / "expert-2", "norm.weight", (5,))
    before = listing(models)
    code, report = told(capsys)
    assert code == 4
    texts = [one["message"] for one in report["faults"]]
    assert len(texts) == 2
    assert "in the merge 'first': 'norm.weight' is (4,)" in texts[0]
    assert "in the merge 'second': " in texts[1]
    (models / "mergepipe.yaml").write_text(CHAIN.replace("./gone", "./base"))
    reshape(models / "expert-2", "norm.weight", (4,))
    code, report = told(capsys)
    assert (code, report["faults"]) == (0, [])
    assert set(listing(models)) == set(before), "no workspace"
    assert report["plan"]["id"] == mergepipe.build().id
