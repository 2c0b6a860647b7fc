"""The commands on a small merge, as a user types them."""

from __future__ import annotations

import json
import os
import re
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import mergepipe
from mergepipe.cli.init import recipe_text
from mergepipe.cli.main import main
from mergepipe.cli.run import stop_on_signal
from mergepipe.pipeline.recipe import load_recipe
from mergepipe.tasks.registry import METHODS, SPARSIFIERS

Output = pytest.CaptureFixture[str]


def test_build_and_run_need_no_argument(models: Path, capsys: Output) -> None:
    assert main(["build"]) == 0
    out = capsys.readouterr().out
    assert "base      base" in out
    assert "virtual zarr, 0 bytes" in out
    assert "2 merged, 1 copied; 21 parameters" in out
    assert not (models / "merged").exists(), "build merges nothing"
    assert main(["run"]) == 0
    out, err = capsys.readouterr()
    assert str(models / "merged") in out
    assert "merging 3 tensors" in err
    merged = load_file(models / "merged" / "model.safetensors")
    np.testing.assert_array_equal(merged["layers.0.weight"], 2 + 0.5 * np.eye(4, 3, dtype=np.float32))
    np.testing.assert_array_equal(merged["norm.weight"], np.full(4, 1.5, np.float32))
    np.testing.assert_array_equal(merged["position_ids"], np.arange(5))


def test_options_reach_the_pipeline(models: Path, capsys: Output) -> None:
    options = ["--out", "other", "--store", "copy", "--memory", "1GiB", "--chunk-size", "1MiB", "--shard-size", "60"]
    assert main(["build", "mergepipe.yaml", "-w", "w", *options, "--set", "parameters.lambda=2.0", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["allowed_bytes"] == 1 << 30
    assert summary["shards"] > 1
    assert {model["store"] for model in summary["models"]} == {"copy"}
    assert main(["run", "-w", "w", "--workers", "1", "--sha256", "no", "--quiet", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["output"] == str(models / "other")
    assert {shard["sha256"] for shard in result["manifest"]["shards"]} == {None}
    index = json.loads((models / "other" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    merged = load_file(models / "other" / index["weight_map"]["norm.weight"])
    np.testing.assert_array_equal(merged["norm.weight"], np.full(4, 3.0, np.float32))


def test_diagnostics_of_a_run(models: Path, capsys: Output) -> None:
    assert main(["build"]) == 0
    assert main(["run", "--diagnostics", "--memory", "1GiB", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "comparing 2 tensors" in err
    record = json.loads(out[out.index("{") :])["manifest"]["tensors"]["layers.0.weight"]["change"]
    assert set(record) == {"norm", "relative_norm", "row_kl", "entropy", "rotation"}
    merged, base = (load_file(models / where / "model.safetensors") for where in ("merged", "base"))
    expected = np.linalg.norm(merged["layers.0.weight"] - base["layers.0.weight"])
    assert record["norm"] == pytest.approx(expected)
    assert main(["run", "--diagnostics", "--on-shard", "true {path}"]) == 2


def test_first_signal_asks_to_stop_and_the_second_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    with stop_on_signal() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        assert not codes
        os.kill(os.getpid(), signal.SIGTERM)
        assert codes == [130]
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == before


def test_a_signal_is_heard_when_nobody_reads_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", broken)
    with stop_on_signal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()


def test_plan_shows_every_tensor_and_draws(models: Path, capsys: Output) -> None:
    assert main(["build"]) == 0
    capsys.readouterr()
    assert main(["plan", "--graph", "bundle.svg"]) == 0
    out = capsys.readouterr().out
    for name in ("layers.0.weight", "norm.weight", "position_ids"):
        assert name in out
    assert ElementTree.parse(models / "bundle.svg").getroot().tag.endswith("svg")
    assert main(["plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["action"] for row in plan["per_tensor"]} == {
        "layers.0.weight": "merge",
        "norm.weight": "merge",
        "position_ids": "copy",
    }


def test_materialize_without_heads_says_so(models: Path, capsys: Output) -> None:
    assert main(["build"]) == main(["run"]) == 0
    assert main(["materialize", "merged", "--task", "expert-1"]) == 4
    assert "heads: separate" in capsys.readouterr().err


def test_readme_in_five_lines(models: Path, capsys: Output) -> None:
    """Its recipe merges models of those names, and the store that it opens is there then."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for old, new in (("base", "llama-base"), ("expert-1", "expert-math"), ("expert-2", "expert-code")):
        (models / old).rename(models / new)
    (models / "mergepipe.yaml").write_text(text.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    for command in ("build", "plan", "run"):
        assert main([command]) == 0, capsys.readouterr().err
    found = re.findall(r'mergepipe\.open_store\("([^"]+)"\)', text)
    assert found
    for path in found:
        assert sorted(dict(mergepipe.open_store(path).arrays())) == ["layers.0.weight", "norm.weight", "position_ids"]


@pytest.mark.parametrize("name", METHODS)
def test_init_writes_a_recipe_that_loads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "--method", name]) == 0
    recipe = load_recipe("mergepipe.yaml")
    assert recipe.merge_method == name
    text = (tmp_path / "mergepipe.yaml").read_text(encoding="utf-8")
    for parameter in METHODS[name].parameters:
        assert parameter.without_effect or f"{parameter.name}: " in text
    assert main(["init"]) == 6, "a recipe that is there is not overwritten"


@pytest.mark.parametrize("name", METHODS)
def test_commented_values_of_init_are_sound(name: str, tmp_path: Path) -> None:
    text = recipe_text(METHODS[name]).partition("# A value may be")[0]
    lines = text.splitlines()[2:]
    uncommented = [
        re.sub("# ", "", line, count=1) if "# parameters" in line or "#   " in line else line for line in lines
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join(uncommented))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    given = {*recipe.parameters, *recipe.models[0].parameters}
    assert given == {parameter.name for parameter in METHODS[name].parameters if not parameter.without_effect}


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.space == "deltas"])
def test_sparsify_line_of_init_is_sound(name: str, tmp_path: Path) -> None:
    text = recipe_text(METHODS[name]).replace("# sparsify:", "sparsify:").replace("# base_model:", "base_model:")
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.sparsify is not None
    assert recipe.sparsify.method == "tadrop"


def test_methods_lists_all(capsys: Output) -> None:
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in (*METHODS, *SPARSIFIERS):
        assert f"  {name} " in out
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in listed["methods"]] == list(METHODS)
    assert [entry["name"] for entry in listed["sparsifiers"]] == list(SPARSIFIERS)


@pytest.mark.parametrize("name", [*METHODS, *SPARSIFIERS])
def test_methods_tells_all_about_one(name: str, capsys: Output) -> None:
    declared = METHODS.get(name) or SPARSIFIERS[name]
    assert main(["methods", name]) == 0
    out = capsys.readouterr().out
    assert declared.summary in out
    assert declared.specification in out
    for line in (*declared.known, *declared.chosen):
        assert line in out
    for parameter in declared.parameters:
        assert f"  {parameter.name} (" in out
        assert parameter.expected in out
    assert main(["methods", name, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sweeps"][-1] == "apply"
    assert (told["known"], told["chosen"]) == (list(declared.known), list(declared.chosen))
