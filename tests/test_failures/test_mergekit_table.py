"""What goes wrong with mergekit 0.1.5, row by row of what was observed, and what happens here.

Most rows are found in headers or on the disk: `build` refuses them before any work and leaves nothing behind, and
`check` says the same. The rest is found at the tensor that holds it: the run ends with the contract's exit code, keeps
what is done, and another run goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe import errors
from mergepipe.cli.main import main
from support.checkpoints import Family, read_tensors, write_family

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("failures"), "llama", shard_size="60KB")


@pytest.fixture
def here(family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `base`, `expert-0` and `expert-1` to be broken."""
    for folder in family.folders:
        shutil.copytree(folder, tmp_path / folder.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(here: Path, **keys: Any) -> None:
    recipe: dict[str, Any] = {
        "merge_method": "ties",
        "base_model": "./base",
        "models": [{"model": "./expert-0"}, {"model": "./expert-1"}],
        "parameters": {"weight": 0.5, "density": 0.6},
    }
    text = yaml.safe_dump({key: value for key, value in (recipe | keys).items() if value is not None})
    (here / "mergepipe.yaml").write_text(text)


Change = Callable[[dict[str, torch.Tensor]], None]


def change(model: Path, edit: Change) -> None:
    """Rewrite a model's weights, as one file."""
    tensors = read_tensors(model)
    edit(tensors)
    for path in (*model.glob("*.safetensors"), model / "model.safetensors.index.json"):
        path.unlink(missing_ok=True)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def configure(model: Path, **values: Any) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | values))


def everywhere(here: Path, edit: Change) -> None:
    for name in ("base", "expert-0", "expert-1"):
        change(here / name, edit)


# -- what happens


def cut_shard(here: Path) -> None:
    shard = sorted((here / "expert-1").glob("model-*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


def cut_header(here: Path) -> None:
    os.truncate(sorted((here / "expert-1").glob("model-*.safetensors"))[0], 50)


def lose_shard(here: Path) -> None:
    sorted((here / "expert-1").glob("model-*.safetensors"))[1].unlink()


def reshape(here: Path) -> None:
    change(here / "expert-1", lambda tensors: tensors.update({UP: torch.zeros(64, 48)}))


def grow_vocabulary(here: Path) -> None:
    words = {name: torch.zeros(215, 48) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    change(here / "expert-1", lambda tensors: tensors.update(words))


def lose(name: str) -> Callable[[Path], None]:
    return lambda here: change(here / "expert-1", lambda tensors: tensors.__delitem__(name))


def behead(here: Path) -> None:
    everywhere(here, lambda tensors: tensors.__delitem__("lm_head.weight"))


def add(here: Path) -> None:
    change(here / "expert-1", lambda tensors: tensors.update({"model.vision.weight": torch.zeros(3, 3)}))


def add_layer(here: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        known = list(tensors.items())
        tensors.update({n.replace(".1.", ".2."): v.clone() for n, v in known if n.startswith("model.layers.1.")})

    change(here / "expert-1", edit)
    configure(here / "expert-1", num_hidden_layers=3)


def to_fp8(here: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)

    everywhere(here, edit)


def to_int8(here: Path) -> None:
    change(here / "expert-1", lambda tensors: tensors.update({UP: torch.zeros(112, 48, dtype=torch.int8)}))


def to_gptq(here: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        weight = tensors.pop(UP)
        stem = UP.removesuffix("weight")
        tensors[f"{stem}qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
        tensors[f"{stem}scales"] = torch.zeros(1, weight.shape[0])

    change(here / "expert-1", edit)


def full_folder(here: Path) -> None:
    (here / "merged").mkdir()
    (here / "merged" / "model.safetensors").write_bytes(b"another model")


def nothing(here: Path) -> None:
    pass


@dataclass(frozen=True)
class Row:
    """One failure.

    Attributes
    ----------
    mergekit : str
        What it does.
    cause : callable
        Brings it about, in a folder of three models.
    code : int
        Our exit code.
    told : tuple of str
        What the message has to name: model, tensor, file; and the remedy.
    recipe : dict
        Keys of the recipe that differ.
    """

    mergekit: str
    cause: Callable[[Path], None]
    code: int
    told: tuple[str, ...]
    recipe: dict[str, Any] = field(default_factory=dict)


BY_HEADERS = {
    "truncated shard": Row(
        "names neither file nor model", cut_shard, 4, ("expert-1/model-00002", "truncated")
    ),
    "truncated header": Row("names neither file nor model", cut_header, 4, ("expert-1/model-00001",)),
    "missing shard": Row("fails in the run", lose_shard, 4, ("expert-1/model-00002", "does not exist")),
    "shape mismatch": Row(
        "fails at that tensor, models not named", reshape, 4,
        (UP, "(112, 48)", "(64, 48)", "/base", "/expert-1", "drop the model, or add a rule"),
    ),
    "vocabularies differ": Row(
        "fails in the run", grow_vocabulary, 4,
        ("model.embed_tokens.weight", "(211, 48)", "(215, 48)", "/expert-1", "Remedy: ", "tokenizer"),
    ),
    "missing tensor": Row("fails in the run", lose(UP), 4, (UP, "is missing in", "/expert-1", "Remedy: ")),
    "no head at all": Row(
        "leaves lm_head out, exit 0", behead, 4, ("lm_head", "/base", "tie_word_embeddings"),
    ),
    "extra tensor": Row(
        "drops it, exit 0", add, 4, ("model.vision.weight", "/expert-1", "not in", "/base", "Remedy: ")
    ),
    "more layers": Row(
        "fails without naming them", add_layer, 4, ("model.layers.2.", "/expert-1", "not in", "/base", "Remedy: ")
    ),
    "fp8 codes alone": Row(
        "averages the codes, exit 0", to_fp8, 4, (UP, "F8_E4M3", "/expert-1", "scale", "dequantise"),
        {"dtype": "bfloat16"},
    ),
    "fp8 codes alone, no dtype": Row(
        "fails in the run", to_fp8, 4, (UP, "F8_E4M3", "/expert-1", "scale", "dequantise")
    ),
    "int8 in one model": Row(
        "merges integers as floats, exit 0", to_int8, 4, (UP, "/expert-1", "Remedy: ", "quantised"),
        {"dtype": "bfloat16"},
    ),
    "GPTQ": Row("misses a tensor, in the run", to_gptq, 4, ("qweight", "/expert-1", "dequantise")),
    "typo in a key": Row(
        "exit 0, a wrong model", nothing, 3, ("$.out_dtyp", "did you mean 'out_dtype'?"), {"out_dtyp": "float32"}
    ),
    "typo in a parameter": Row(
        "exit 0, a wrong model", nothing, 3,
        ("$.parameters.densty", "did you mean 'density'?", "$.parameters.lamda", "$.parameters.normalise"),
        {"parameters": {"weight": 1.0, "densty": 0.5, "lamda": 2.0, "normalise": True}},
    ),
    "output is an input": Row(
        "overwrites the input, exit 0", nothing, 6, ("/base", "choose another folder with --out"), {"output": "./base"}
    ),
    "output over a model": Row(
        "leaves two models in one folder, exit 0", full_folder, 6,
        ("merged' is not empty", "model.safetensors", "--out"),
    ),
    "no such model": Row(
        "speaks of a repo id", nothing, 4, ("/expert-7' does not exist",), {"models": [{"model": "./expert-7"}]}
    ),
    "same model twice": Row(
        "duplicate inputs, exit 1", nothing, 3, ("expert-0", "listed already", "leave one of the two out"),
        {"models": [{"model": "./expert-0"}, {"model": "./expert-0"}]},
    ),
    "layers past the end": Row(
        "fails in the run, tensor not named by model", nothing, 4,
        ("$.slices[0]", "/expert-0", "which has 0 to 1", "layer_range"),
        {
            "merge_method": "passthrough", "base_model": None, "models": None, "parameters": None,
            "slices": [{"sources": [{"model": "./expert-0", "layer_range": [0, 9]}]}],
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HEADERS)
def test_found_before_any_work(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`build` and `check` refuse it with the same code, naming everything, and nothing is written."""
    row = BY_HEADERS[name]
    row.cause(here)
    write_recipe(here, **row.recipe)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    for command in ("build", "check"):
        assert main([command]) == row.code
        captured = capsys.readouterr()
        text = (captured.err if command == "build" else captured.out).replace("\n       ", " ")
        absent = [word for word in row.told if word not in text and word != "Remedy: "]
        assert not absent, text
    assert {path: path.stat().st_mtime_ns for path in here.rglob("*")} == before


FP8_RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"base_model": None, "parameters": {"weight": 0.5}},
    "ties": {"parameters": {"weight": 0.5, "density": 0.6}},
    "slerp": {"parameters": {"t": 0.3}, "models": [{"model": "./expert-0"}]},
    "passthrough": {"base_model": None, "parameters": None, "models": [{"model": "./expert-0"}]},
}


@pytest.mark.parametrize("dtype", ["bfloat16", None])
@pytest.mark.parametrize("method", FP8_RECIPES)
def test_fp8_with_scales_is_what_it_stands_for(method: str, dtype: str | None, here: Path) -> None:
    """mergekit averages the codes and drops the scales, exit 0; without a dtype it stops in the run."""
    scale = torch.tensor([[0.5]])

    def encode(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = (tensors[UP] * 2).to(torch.float8_e4m3fn)
        tensors[f"{UP}_scale_inv"] = scale

    def stand_for(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP] = tensors[UP].float().mul(scale).bfloat16()
        del tensors[f"{UP}_scale_inv"]

    found = []
    for edit in (encode, stand_for):
        everywhere(here, edit)
        write_recipe(here, merge_method=method, dtype=dtype, **FP8_RECIPES[method])
        assert main(["build"]) == 0
        assert main(["run", "--quiet"]) == 0
        found.append(read_tensors(here / "merged"))
        shutil.rmtree(here / "merged")
        shutil.rmtree(here / ".mergepipe")
    assert found[0].keys() == found[1].keys()
    for name, value in found[1].items():
        assert torch.equal(found[0][name], value), name
    assert found[0][UP].dtype == torch.bfloat16


def test_a_full_disk_is_seen_before_work(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """mergekit has no preflight, and with --async-write fails only after the whole merge."""
    write_recipe(here)
    usage = shutil.disk_usage(here)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10_000))
    assert main(["build"]) == 5
    told = capsys.readouterr().err
    assert "10,000 are free" in told
    assert "make room" in told
    assert not (here / ".mergepipe").exists()


# -- what only the values show


def poison(value: float, at: int = 77) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP].view(-1)[at] = value

    return lambda here: change(here / "expert-1", edit)


def flip(here: Path) -> None:
    """One damaged byte, in the exponents of two numbers."""
    change(here / "expert-1", lambda tensors: None)
    path = here / "expert-1" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[UP]["data_offsets"][0]
    raw[start + 4 * 77 + 2 : start + 4 * 77 + 4] = b"\xff\x7f"
    path.write_bytes(raw)


def go_beyond_float16(here: Path) -> None:
    everywhere(here, lambda tensors: tensors[UP].view(-1).__setitem__(77, 70_000.0))


BY_VALUES = {
    "NaN": Row("the element or the whole tensor is NaN, exit 0", poison(float("nan")), 4, ("a NaN or an infinity",)),
    "infinity": Row("as NaN, exit 0", poison(float("-inf")), 4, ("a NaN or an infinity",)),
    "flipped bytes": Row("merged silently, exit 0", flip, 4, ("a NaN or an infinity",)),
}


def run_again_is_a_resume(capsys: pytest.CaptureFixture[str]) -> None:
    """A second run fails in the same way, but goes on from what the first has kept."""
    assert main(["run", "--workers", "1"]) == 4
    assert "going on with an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("NaN", method) for method in ("ties", "slerp", "dare_ties", "della", "model_stock", "karcher", "sce")),
        *((name, "ties") for name in ("infinity", "flipped bytes")),
    ],
)
def test_found_at_that_tensor(name: str, method: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With each method for which mergekit turns a whole tensor into NaN."""
    row = BY_VALUES[name]
    row.cause(here)
    if method == "slerp":
        write_recipe(here, merge_method=method, parameters={"t": 0.5}, models=[{"model": "./expert-1"}])
    else:
        params = {"weight": 0.5, "density": 0.5} if method in ("ties", "dare_ties", "della") else None
        write_recipe(here, merge_method=method, parameters=params)
    assert main(["build"]) == 0
    assert main(["run", "--workers", "1"]) == row.code
    told = capsys.readouterr().err
    assert all(word in told for word in (*row.told, UP, "/expert-1", "element 77", "a rule (`match`"))
    assert not (here / "merged" / "model.safetensors").exists()
    if name == "NaN" and method == "ties":
        run_again_is_a_resume(capsys)
        rules = [{"match": "up_proj", "merge_method": "passthrough"}]  # the remedy that the message names
        write_recipe(here, rules=rules)
        assert main(["build", "--force"]) == 0
        assert main(["run"]) == 0
        assert torch.equal(read_tensors(here / "merged")[UP], read_tensors(here / "base")[UP])


def test_float16_overflow(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """mergekit writes inf, exit 0."""
    go_beyond_float16(here)
    write_recipe(here, dtype="float16")
    assert main(["build"]) == 0
    assert main(["run", "--workers", "1"]) == 4
    told = capsys.readouterr().err
    assert all(word in told for word in (UP, "overflows float16", "element 77", "dtype: bfloat16"))
    run_again_is_a_resume(capsys)


def test_mixed_types_give_the_type_that_the_configuration_says(here: Path) -> None:
    """mergekit writes float32 under a configuration that says bfloat16."""

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value.bfloat16() for name, value in tensors.items()})

    change(here / "base", edit)
    configure(here / "base", dtype="bfloat16")
    write_recipe(here)
    assert main(["build"]) == main(["run"]) == 0
    assert {value.dtype for value in read_tensors(here / "merged").values()} == {torch.bfloat16}
    assert json.loads((here / "merged" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


# -- interruptions, and running again

VICTIM = """
import os, signal, sys
import mergepipe
from mergepipe.pipeline.events import TensorFinished, UnitFinished
from mergepipe.storage.writer import ShardWriter
how = sys.argv[1]
if how == "in a write":
    whole = ShardWriter.write
    calls = []
    def write(self, offset, data):
        calls.append(offset)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(self, offset, data)
    ShardWriter.write = write
def listen(event):
    if how == "between" and isinstance(event, TensorFinished) and event.name.startswith("model.layers.1"):
        os.kill(os.getpid(), signal.SIGKILL)
mergepipe.run(workers=1, on_event=listen)
"""


def merged_bytes(here: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((here / "merged").glob("*.safetensors*"))}


@pytest.fixture
def expected(here: Path) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    write_recipe(here)
    assert main(["build"]) == main(["run"]) == 0
    found = merged_bytes(here)
    shutil.rmtree(here / "merged")
    shutil.rmtree(here / ".mergepipe")
    assert main(["build"]) == 0
    return found


@pytest.mark.parametrize("how", ["between", "in a write"])
def test_kill_9_leaves_nothing_that_looks_like_a_model(how: str, expected: dict[str, bytes], here: Path) -> None:
    """mergekit leaves shards, hidden temporary files, and starts from zero."""
    killed = subprocess.run([sys.executable, "-c", VICTIM, how], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    left = {path.name for path in (here / "merged").iterdir()}
    assert "model.safetensors.index.json" not in left
    assert any(name.endswith(".part") for name in left)
    assert main(["status"]) == 0
    assert main(["run"]) == 0
    assert merged_bytes(here) == expected
    assert not [path for path in (here / "merged").iterdir() if path.name.startswith(".") or path.suffix == ".part"]


def test_ctrl_c_is_130_and_goes_on(expected: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit: exit 1, "Aborted!", and the work is lost."""
    from mergepipe.storage.writer import ShardWriter

    whole, calls = ShardWriter.write, []

    def write(self: ShardWriter, offset: int, data: Any) -> None:
        calls.append(offset)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        whole(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", write)
        assert main(["run", "--workers", "1"]) == 130
    assert len(calls) < len(read_tensors(here / "base"))
    assert main(["run"]) == 0
    assert merged_bytes(here) == expected


def test_a_disk_that_fills_up_is_5_and_goes_on(
    expected: dict[str, bytes], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergepipe.storage.writer import ShardWriter

    whole, calls = ShardWriter.write, []

    def write(self: ShardWriter, offset: int, data: Any) -> None:
        calls.append(offset)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        whole(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", write)
        assert main(["run", "--workers", "1"]) == 5
    assert "No space left on device" in capsys.readouterr().err
    assert main(["run"]) == 0
    assert merged_bytes(here) == expected


def test_running_again_over_a_finished_model(
    expected: dict[str, bytes], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """mergekit starts from zero, or leaves two models in one folder. The same recipe has nothing to do; any other, or
    another division into files, is refused."""
    assert main(["run"]) == 0
    assert main(["build"]) == main(["run"]) == 0
    assert "complete already" in capsys.readouterr().err
    assert main(["build", "--shard-size", "1GB"]) == 6
    assert "choose another with --out" in capsys.readouterr().err
    write_recipe(here, merge_method="task_arithmetic", parameters={"weight": 0.5})
    assert main(["build"]) == 6
    assert merged_bytes(here) == expected


def test_an_input_that_changes_under_way(expected: dict[str, bytes], here: Path) -> None:
    """Nothing of the kind is looked at by mergekit."""
    path = sorted((here / "expert-0").glob("model-*.safetensors"))[0]
    tensors = load_file(path)
    save_file({name: value + 1 for name, value in tensors.items()}, path, {"format": "pt"})
    with pytest.raises(errors.InputChangedError, match="expert-0"):
        mergepipe.run()
    assert np.all([not name.endswith(".safetensors") for name in merged_bytes(here)])
