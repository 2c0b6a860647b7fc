"""Adapters out of fine-tunes: PEFT loads them, and what they miss is what the spectrum says."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mergepipe import errors
from mergepipe.cli.main import main
from mergepipe.pipeline import module_names
from mergepipe.pipeline.events import Event, TensorFinished
from mergepipe.pipeline.extract import Extracted, extract_lora, projected_bytes
from mergepipe.pipeline.lora import ADAPTER_NAME, parts_of
from mergepipe.pipeline.memory import MIB, RESERVED_BYTES, TORCH_BYTES
from mergepipe.pipeline.spool import SPOOL, Wanted
from support.checkpoints import Family, new_model, read_tensors, write_family

CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "bert": transformers.BertForMaskedLM,
    "gpt2": transformers.GPT2LMHeadModel,
}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # peft and transformers


@pytest.fixture(autouse=True)
def names_are_asked_for_here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own would import transformers for seconds; of one test, whose names differ, it does."""
    if request.function is not test_modules_that_transformers_calls_otherwise_than_files_do:
        monkeypatch.setattr(module_names, "_ask", lambda question: json.loads(module_names._answer(question)))


def write_gpt2(folder: Path) -> Family:
    """Its layers store (inputs, outputs)."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=211, n_positions=64, n_inner=112)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-2)
    model.save_pretrained(folder / "expert-0")
    return Family("gpt2", folder / "base", (folder / "expert-0",))


@pytest.fixture(scope="module", params=["llama", "qwen2", "bert", "gpt2"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp(request.param)
    return write_gpt2(folder) if request.param == "gpt2" else write_family(folder, request.param, experts=1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return write_family(tmp_path_factory.mktemp("llama"), "llama", experts=1)


def applied(family: Family, adapter: Path, dtype: Any = torch.float32) -> dict[str, torch.Tensor]:
    """The base with the adapter merged in by PEFT."""
    model = CLASSES[family.kind].from_pretrained(family.base, dtype=dtype, local_files_only=True)
    loaded = peft.PeftModel.from_pretrained(model, str(adapter))
    merged: dict[str, torch.Tensor] = loaded.merge_and_unload().state_dict()
    return merged


def extract(family: Family, out: Path, rank: int, **options: Any) -> Extracted:
    how = {key: options.pop(key) for key in ("memory", "workers", "stop", "on_event") if key in options}
    return extract_lora(family.base, family.experts[0], out, Wanted(rank, **options), **how)


def test_at_full_rank_peft_gives_the_fine_tune_back(family: Family, tmp_path: Path) -> None:
    """Every parameter: pairs, embeddings, norms and biases."""
    made = extract(family, tmp_path / "adapter", 48)
    assert made.left_out == ()
    assert made.energy == pytest.approx(1, abs=1e-9)
    merged, expert = applied(family, tmp_path / "adapter"), read_tensors(family.experts[0])
    for name, value in expert.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-5, atol=2e-7)
    assert not (tmp_path / "adapter" / SPOOL).exists()
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(("rank", "svd"), [(5, "auto"), (5, "exact"), (16, "exact")])
def test_what_is_missing_is_what_the_spectrum_says(rank: int, svd: str, llama: Family, tmp_path: Path) -> None:
    """Of each matrix alone, in the model that PEFT makes: the norm of the singular values that were left out."""
    made = extract(llama, tmp_path / "adapter", rank, svd=svd)
    merged = applied(llama, tmp_path / "adapter")
    base, expert = read_tensors(llama.base), read_tensors(llama.experts[0])
    assert set(made.ranks.values()) == {rank}
    for module in made.ranks:
        name = f"{module}.weight"
        delta = (expert[name] - base[name]).double()
        values = torch.linalg.svdvals(delta)
        least = float(values[rank:].square().sum().sqrt())
        missing = float(torch.linalg.matrix_norm(merged[name].double() - expert[name].double()))
        assert least * (1 - 1e-4) <= missing <= least * (1.05 if svd == "auto" else 1 + 1e-4)
        share = float(values[:rank].square().sum() / values.square().sum())
        assert made.energies[module] == pytest.approx(share, rel=0.05 if svd == "auto" else 1e-6)


def test_a_low_rank_fine_tune_comes_back_at_its_rank(llama: Family, tmp_path: Path) -> None:
    """What a LoRA training has put into a model is taken out again, in bfloat16, the base's own type."""
    shutil.copytree(llama.base, tmp_path / "expert")
    tensors = load_file(tmp_path / "expert" / "model.safetensors")
    torch.manual_seed(1)
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"):
        rows, columns = tensors[name].shape
        tensors[name] += 0.1 * torch.randn(rows, 3) @ torch.randn(3, columns)
    save_file(tensors, tmp_path / "expert" / "model.safetensors", {"format": "pt"})
    family = Family("llama", llama.base, (tmp_path / "expert",))
    made = extract(family, tmp_path / "adapter", 8)
    assert set(made.ranks) == {"model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"}
    assert made.whole == made.left_out == ()
    assert made.energy > 0.99999
    trimmed = extract(family, tmp_path / "trimmed", 8, sv_epsilon=0.01)
    assert set(trimmed.ranks.values()) == {3}
    config = json.loads((tmp_path / "trimmed" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert config["target_modules"] == sorted(made.ranks), "not the other layers' modules of the same name"
    for name, value in applied(family, tmp_path / "trimmed").items():
        torch.testing.assert_close(value, tensors[name], rtol=1e-4, atol=1e-5)


def test_each_tensor_keeps_the_type_of_the_base(tmp_path: Path) -> None:
    family = write_family(tmp_path / "models", "qwen2", "bfloat16", experts=1)
    extract(family, tmp_path / "own", 24)
    assert {value.dtype for value in load_file(tmp_path / "own" / ADAPTER_NAME).values()} == {torch.bfloat16}
    extract(family, tmp_path / "wide", 24, dtype="float32")
    assert {value.dtype for value in load_file(tmp_path / "wide" / ADAPTER_NAME).values()} == {torch.float32}
    expert = read_tensors(family.experts[0])
    for name, value in applied(family, tmp_path / "own", torch.bfloat16).items():
        if name in expert and "embed" in name:
            assert torch.equal(value, expert[name])


def test_ranks_that_differ_stand_in_the_configuration(llama: Family, tmp_path: Path) -> None:
    """A module too small for the rank has a smaller one, and the factor of its update stays one."""
    made = extract(llama, tmp_path / "adapter", 30)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    small = {name: rank for name, rank in made.ranks.items() if rank != 30}
    assert small == {f"model.layers.{n}.self_attn.{k}_proj": 24 for n in (0, 1) for k in "kv"}
    assert config["rank_pattern"] == config["alpha_pattern"] == small
    assert applied(llama, tmp_path / "adapter")


def test_what_is_chosen(llama: Family, tmp_path: Path) -> None:
    made = extract(llama, tmp_path / "one", 4, include=("self_attn",), exclude=("q_proj",))
    assert {name.rpartition(".")[2] for name in made.ranks} == {"k_proj", "v_proj", "o_proj"}
    assert made.whole == made.left_out == ()
    made = extract(llama, tmp_path / "two", 4, embed_lora=True, save=("lm_head",), skip_undecomposable=True)
    assert "model.embed_tokens" in made.ranks
    assert "lm_head" not in made.ranks
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in made.left_out} == {
        "lm_head", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    made = extract(llama, tmp_path / "three", 4, save=("lm_head",))
    assert "lm_head.weight" in made.whole
    torch.testing.assert_close(
        applied(llama, tmp_path / "three")["lm_head.weight"], read_tensors(llama.experts[0])["lm_head.weight"]
    )


def test_the_same_bytes_however_it_is_done(llama: Family, tmp_path: Path) -> None:
    """Workers, the ceiling and an interruption do not show; an interrupted extraction goes on where it ended."""
    extract(llama, tmp_path / "one", 5, workers=1)
    extract(llama, tmp_path / "three", 5, workers=3, memory="700MiB")
    stop, finished = threading.Event(), []

    def listen(event: Event) -> None:
        if isinstance(event, TensorFinished):
            finished.append(event.name)
            if len(finished) == 7:
                stop.set()

    with pytest.raises(errors.Interrupted, match="the same command goes on"):
        extract(llama, tmp_path / "cut", 5, workers=1, stop=stop, on_event=listen)
    assert not (tmp_path / "cut" / ADAPTER_NAME).exists()
    with pytest.raises(errors.OutputExistsError, match="another extraction"):
        extract(llama, tmp_path / "cut", 6)
    extract(llama, tmp_path / "cut", 5, workers=2, on_event=listen)
    assert len(finished) == len(set(finished)), "no tensor is factored twice"
    files = [(tmp_path / name / ADAPTER_NAME).read_bytes() for name in ("one", "three", "cut")]
    assert files[0] == files[1] == files[2]
    with pytest.raises(errors.OutputExistsError, match="not empty"):
        extract(llama, tmp_path / "one", 5)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("which", ["base", "expert-0"])
def test_an_input_that_changes_while_it_is_read(which: str, restored: bool, llama: Family, tmp_path: Path) -> None:
    """It is named, nothing that was made of it is believed, and with the old file back the same command goes on."""
    copied = {one.name: shutil.copytree(one, tmp_path / one.name) for one in (llama.base, llama.experts[0])}
    models = tuple(copied.values())
    extract_lora(*models, tmp_path / "whole", Wanted(5))
    (path,) = copied[which].glob("*.safetensors")
    data, status, seen = path.read_bytes(), path.stat(), [0]

    def put(contents: bytes) -> None:
        path.write_bytes(contents)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def listen(event: Event) -> None:
        seen[0] += isinstance(event, TensorFinished)
        if seen[0] == 3:
            path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        if seen[0] == 5 and restored:
            put(data)

    with pytest.raises(errors.InputChangedError, match=str(path)) as failure:
        extract_lora(*models, tmp_path / "cut", Wanted(5), workers=1, on_event=listen)
    assert failure.value.exit_code == 6
    assert not (tmp_path / "cut" / ADAPTER_NAME).exists()
    put(data)
    extract_lora(*models, tmp_path / "cut", Wanted(5))
    assert (tmp_path / "cut" / ADAPTER_NAME).read_bytes() == (tmp_path / "whole" / ADAPTER_NAME).read_bytes()


def rewrite(folder: Path, target: Path, **tensors: torch.Tensor | None) -> Path:
    shutil.copytree(folder, target)
    known = load_file(target / "model.safetensors") | {name.replace("__", "."): v for name, v in tensors.items()}
    save_file({k: v for k, v in known.items() if v is not None}, target / "model.safetensors", {"format": "pt"})
    return target


def test_what_is_refused(llama: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its exit code, what is wrong, and what to do; nothing is left behind."""
    grown = rewrite(llama.experts[0], tmp_path / "grown", model__embed_tokens__weight=torch.zeros(215, 48))
    added = rewrite(llama.experts[0], tmp_path / "added", model__extra__weight=torch.zeros(4, 4))
    broken = torch.full((48,), math.nan)
    nan = rewrite(llama.experts[0], tmp_path / "nan", model__norm__weight=broken)
    fixed = rewrite(llama.base, tmp_path / "fixed", model__scale=torch.zeros(3))
    moved = rewrite(llama.base, tmp_path / "moved", model__scale=torch.ones(3))
    base, expert = str(llama.base), str(llama.experts[0])
    cases: list[tuple[list[str], int, str]] = [
        ([base, str(grown), "--rank", "4"], 4, "(211, 48) in the base but (215, 48)"),
        ([base, str(added), "--rank", "4"], 4, "'model.extra.weight' is not in the base"),
        ([base, str(nan), "--rank", "4"], 4, "'model.norm.weight' of"),
        ([str(fixed), str(moved), "--rank", "4"], 4, "'model.scale' changed, and an adapter can't hold"),
        ([base, base, "--rank", "4"], 4, "there is no update to extract"),
        ([base, expert, "--rank", "49"], 2, "rank 49 is larger than every matrix"),
        ([base, expert, "--rank", "0"], 2, "--rank"),
        ([base, expert, "--rank", "4", "--memory", "300MiB"], 5, "the smallest ceiling that would do is --memory"),
        ([base, expert, "--rank", "4", "-i", "nothing"], 2, "no tensor is left"),
        ([base, expert, "--rank", "4", "-e", "("], 2, "no regular expression"),
        ([base, expert, "--rank", "4", "--dtype", "int8"], 2, "'int8' is no type"),
    ]
    for number, (args, code, told) in enumerate(cases):
        out = tmp_path / f"out-{number}"
        assert main(["lora-extract", args[0], args[1], str(out), *args[2:]]) == code, args
        assert told in capsys.readouterr().err
        assert not (out / ADAPTER_NAME).exists()
    assert main(["lora-extract", base, expert, str(llama.base / "adapter"), "--rank", "4"]) == 6
    assert main(["lora-extract", base, str(grown), str(tmp_path / "ok"), "--rank", "4", "-e", "embed_tokens"]) == 0
    capsys.readouterr()
    assert main(["lora-extract", base, expert, str(tmp_path / "json"), "--rank", "4", "--json", "--quiet"]) == 0
    told_json = json.loads(capsys.readouterr().out)
    assert told_json["modules"]["model.layers.0.mlp.up_proj"]["rank"] == 4
    assert 0 < told_json["energy"] < 1


def test_convolutions_and_conv1d_have_their_shapes() -> None:
    shapes = {"patch.weight": (8, 3, 4, 4), "wide.weight": (8, 4, 3), "h.0.c_fc.weight": (4, 16), "q.weight": (6, 4)}
    parts = {part.name: part for part in parts_of(shapes, {"model_type": "gpt2"})}
    assert parts["patch.weight"].pair_shapes(2) == ((2, 3, 4, 4), (8, 2, 1, 1))
    assert parts["wide.weight"].pair_shapes(2) == ((2, 4, 3), (8, 2, 1))
    assert parts["h.0.c_fc.weight"].pair_shapes(2) == ((2, 4), (16, 2))
    assert parts["q.weight"].pair_shapes(2) == ((2, 4), (6, 2))


def test_a_convolution_comes_back(tmp_path: Path) -> None:
    """PEFT applies the pair of a convolution to the kernel that it came from."""
    torch.manual_seed(0)
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        tensors = {
            "stem.weight": torch.randn(8, 3, 4, 4),
            "stem.bias": torch.zeros(8),
            "head.weight": torch.randn(5, 8),
        }
        save_file(tensors, tmp_path / name / "model.safetensors")
    made = extract_lora(tmp_path / "base", tmp_path / "expert", tmp_path / "adapter", Wanted(8, dtype="float32"))
    assert made.ranks == {"stem": 8, "head": 5}

    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 8, 4)
            self.head = torch.nn.Linear(8, 5, bias=False)

    model = Small()
    model.load_state_dict(load_file(tmp_path / "base" / "model.safetensors"))
    merged = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "expert" / "model.safetensors").items():
        torch.testing.assert_close(merged[name], value, rtol=1e-4, atol=1e-5)


def test_modules_that_transformers_calls_otherwise_than_files_do(tmp_path: Path) -> None:
    """PEFT leaves out what it finds no module for, and says nothing: the names have to be those of the modules."""
    model = new_model("vit")
    model.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    updated = {"q_proj.weight", "fc2.weight"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(name.endswith(end) for end in updated):
                rows, columns = parameter.shape
                left, right = (torch.randn(shape, generator=generator) for shape in ((rows, 2), (2, columns)))
                parameter.add_(left @ right, alpha=0.05)
    model.save_pretrained(tmp_path / "fine")
    stored = load_file(tmp_path / "base" / "model.safetensors").keys()
    assert not any("q_proj" in name for name in stored), "transformers writes the names of its modules now"
    found = extract(Family("vit", tmp_path / "base", (tmp_path / "fine",)), tmp_path / "lora", 2)
    assert {module.rpartition(".")[2] for module in found.ranks} == {"q_proj", "fc2"}
    fresh = type(model).from_pretrained(tmp_path / "base")
    merged = peft.PeftModel.from_pretrained(fresh, str(tmp_path / "lora")).merge_and_unload()
    expected = dict(model.named_parameters())
    for name, value in merged.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


MEASURE = """
import json, sys
from support.peak import anonymous
import threading
peak, ended = 0, threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch); watcher.start()
from mergepipe.pipeline.extract import extract_lora
from mergepipe.pipeline.spool import Wanted
base, expert, out, memory = sys.argv[1:]
extract_lora(base, expert, out, Wanted(32), memory=int(memory), workers=2)
ended.set(); watcher.join()
print(peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 6144), (6144, 2048)], ids=str)
def test_the_ceiling_is_kept(shape: tuple[int, int], tmp_path: Path) -> None:
    """Two matrices of tens of millions of elements, at the smallest ceiling that the error names."""
    rng = np.random.default_rng(0)
    tensors = {f"layers.{n}.up.weight": torch.from_numpy(rng.standard_normal(shape, np.float32)) for n in (0, 1)}
    for name in ("base", "expert"):
        (tmp_path / name).mkdir()
        save_file({k: v.to(torch.bfloat16) for k, v in tensors.items()}, tmp_path / name / "model.safetensors")
        tensors = {k: v + 0.1 * torch.from_numpy(rng.standard_normal(shape, np.float32)) for k, v in tensors.items()}
    (part, _) = parts_of({name: tuple(value.shape) for name, value in tensors.items()}, {})
    least = -(-(projected_bytes(part, Wanted(32)) + RESERVED_BYTES + TORCH_BYTES) // MIB) * MIB
    with pytest.raises(errors.MemoryBudgetError, match=f"--memory {least // MIB}MiB"):
        extract_lora(tmp_path / "base", tmp_path / "expert", tmp_path / "out", Wanted(32), memory=least - MIB)
    script = tmp_path / "measure.py"
    script.write_text(MEASURE)
    command = [sys.executable, str(script), *(str(tmp_path / name) for name in ("base", "expert", "out")), str(least)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= least


def test_models_are_named_as_in_a_recipe(llama: Family, tmp_path: Path) -> None:
    """An adapter taken out of `base+adapter` is that adapter; the base may be one file of PyTorch's."""
    first = extract(llama, tmp_path / "first", 3, skip_undecomposable=True)
    torch.save(read_tensors(llama.base), tmp_path / "base.bin")
    made = extract_lora(tmp_path / "base.bin", f"{llama.base}+{first.output}", tmp_path / "second", Wanted(3))
    assert made.ranks == first.ranks
    assert made.whole == made.left_out == ()
    config = json.loads((made.output / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "base.bin")
    products = [updates(one.output, made.ranks) for one in (first, made)]
    for module, product in products[0].items():
        torch.testing.assert_close(products[1][module], product, rtol=1e-4, atol=2e-6)


def updates(adapter: Path, modules: dict[str, int]) -> dict[str, torch.Tensor]:
    tensors = load_file(adapter / ADAPTER_NAME)
    halves = {m: [tensors[f"base_model.model.{m}.lora_{side}.weight"].double() for side in "BA"] for m in modules}
    return {module: left @ right for module, (left, right) in halves.items()}


def test_another_scale_of_the_adapter_is_other_work(llama: Family, tmp_path: Path) -> None:
    """What an interrupted extraction has kept is not taken for that of an adapter that was changed since."""
    first = extract(llama, tmp_path / "first", 2)
    stop = threading.Event()
    stop.set()
    named = f"{llama.base}+{first.output}"
    with pytest.raises(errors.Interrupted):
        extract_lora(llama.base, named, tmp_path / "second", Wanted(2), stop=stop)
    config = json.loads((first.output / "adapter_config.json").read_text(encoding="utf-8"))
    (first.output / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 2 * config["lora_alpha"]}))
    with pytest.raises(errors.OutputExistsError, match="unfinished work of another extraction"):
        extract_lora(llama.base, named, tmp_path / "second", Wanted(2))
