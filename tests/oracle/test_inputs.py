"""Inputs of other kinds, through both tools: models with an adapter, and bare files.

mergekit has PEFT make the merged model first and saves it. Here the adapter is applied as the model is read: with
float32 weights each element is within 4 units in the last place of the largest number that its sum goes through (a sum
of as many products as the rank is, rounded at each), both from mergekit's and from what PEFT makes in float64.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from oracle.expected import Array, ulp
from oracle.rival import run_mergekit
from oracle.test_mergekit import as_numpy
from support.adapters import VARIANTS, peft, write_adapter
from support.checkpoints import read_tensors

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]

ADAPTERS = ("plain", "rslora", "patterns", "modules to save", "embedding", "dora", "tied", "biases")


@dataclass(frozen=True)
class Exact:
    """By name of a tensor: what PEFT makes of it in float64, and the largest number that each element goes through."""

    value: dict[str, Array]
    largest: dict[str, Array]


def merged_in_float64(folder: Path) -> Exact:
    """Base and adapter merged by PEFT, all its arithmetic in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float64)
        largest = {name: value.abs().numpy() for name, value in base.state_dict().items()}
        model = peft.PeftModel.from_pretrained(base, folder / "lora").double()
        for name, size in sizes_of_updates(model).items():
            largest[name] = np.maximum(largest[name], size)
        value = {name: value.numpy() for name, value in model.merge_and_unload(safe_merge=True).state_dict().items()}
    return Exact(value, {name: np.maximum(largest[name], np.abs(value[name])) for name in value})


def sizes_of_updates(model: Any) -> dict[str, Array]:
    """The sums of the factors' products, each with its size alone."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "get_delta_weight"):
            copied = copy.deepcopy(layer)
            with torch.no_grad():
                for part, value in copied.named_parameters():
                    value.copy_(value.abs() if "lora_" in part else value)
                found[f"{name}.weight"] = copied.get_delta_weight("default").numpy()
    return found


def adapter_recipe(folder: Path, method: str) -> dict[str, Any]:
    base, lora = folder / "base", folder / "lora"
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32", "models": [{"model": f"{base}+{lora}"}]}
    if method == "linear":
        recipe["models"] = [
            {"model": f"{base}+{lora}", "parameters": {"weight": 0.7}},
            {"model": str(base), "parameters": {"weight": 0.2}},
        ]
    return recipe


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and an adapter of each kind."""
    root = tmp_path_factory.mktemp("adapters")
    folders = {name: root / name.replace(" ", "-") for name in ADAPTERS}
    for name, folder in folders.items():
        write_adapter(folder, *VARIANTS[name])
    return folders


@pytest.fixture(scope="module")
def theirs(
    adapters: dict[str, Path], mergekit_python: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What mergekit makes of each, by name and method."""
    root = tmp_path_factory.mktemp("mergekit")
    recipes = {
        f"{name}-{method}": adapter_recipe(folder, method)
        for name, folder in adapters.items()
        for method in ("passthrough", "linear")
    }
    return run_mergekit(mergekit_python, recipes, root, "--lora-merge-cache", str(root / "cache"))


def merge(recipe: dict[str, Any], folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged", **options)
    return read_tensors(Path(mergepipe.run(folder / "work").output))


@pytest.mark.parametrize("method", ["passthrough", "linear"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_adapter(
    name: str, method: str, adapters: dict[str, Path], theirs: dict[str, Path], tmp_path: Path
) -> None:
    rival = theirs[f"{name}-{method}"]
    assert (rival / "merged").is_dir(), (rival / "error.txt").read_text(encoding="utf-8")
    found = merge(adapter_recipe(adapters[name], method), tmp_path)
    other, exact = read_tensors(rival / "merged"), merged_in_float64(adapters[name])
    base = read_tensors(adapters[name] / "base")
    assert {n: (v.shape, v.dtype) for n, v in found.items()} == {n: (v.shape, v.dtype) for n, v in other.items()}
    for key in found:
        ours, rivals, start = (as_numpy(each[key]).astype(np.float64) for each in (found, other, base))
        wanted = exact.value[key] if method == "passthrough" else (0.7 * exact.value[key] + 0.2 * start) / 0.9
        # Theirs has the lengths of a DoRA's rows in float32, ours in float64.
        for another, units in ((wanted, 4), (rivals, 8 if "dora" in name else 4)):
            apart = np.abs(ours - another) / ulp(exact.largest[key])
            assert apart.max() <= units, (key, apart.max())


# -- bare files


SHAPES: dict[str, tuple[int, ...]] = {"unet.conv.weight": (8, 4, 3, 3), "unet.norm.bias": (16,), "logit_scale": ()}
OWN: dict[str, dict[str, tuple[int, ...]]] = {
    "a.safetensors": {"both": (5, 7)},
    "b.pt": {"both": (5, 7), "only_b": (6, 2)},
    "c.bin": {},
}
ALL = tuple(OWN)


@dataclass(frozen=True)
class Bare:
    """A recipe over state dicts, how tensors are chosen, and what the result has."""

    method: str
    files: tuple[str, ...]
    tensors: Literal["union", "intersection"] | None
    made: tuple[str, ...]
    base: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)

    def recipe(self, folder: Path) -> dict[str, Any]:
        listed: list[dict[str, Any]] = [{"model": str(folder / name)} for name in self.files]
        for entry, weight in zip(listed if self.method != "slerp" else (), (0.6, 0.3, 0.45), strict=False):
            entry["parameters"] = {"weight": weight}
        recipe: dict[str, Any] = {"merge_method": self.method, "dtype": "float32", "models": listed}
        recipe |= {"parameters": self.parameters} if self.parameters else {}
        return recipe | ({"base_model": str(folder / self.base)} if self.base else {})


BARE = {
    "union": Bare("linear", ALL, "union", (*SHAPES, "both", "only_b")),
    "union-summed": Bare("linear", ALL, "union", (*SHAPES, "both", "only_b"), None, {"normalize": False}),
    "intersection": Bare("linear", ALL, "intersection", tuple(SHAPES)),
    "intersection-over-base": Bare("ties", ("b.pt", "c.bin"), "intersection", tuple(SHAPES), "a.safetensors"),
    "intersection-on-an-arc": Bare("slerp", ("b.pt", "c.bin"), "intersection", tuple(SHAPES), "b.pt", {"t": 0.3}),
    "two-of-a-kind": Bare("task_arithmetic", ("c.bin",), None, tuple(SHAPES), "plain.safetensors"),
}
FLAGS = {"union": ("-u",), "intersection": ("-i",), None: ()}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """State dicts in three formats."""
    folder = tmp_path_factory.mktemp("bare")
    for seed, (name, own) in enumerate({**OWN, "plain.safetensors": {}}.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {key: torch.randn(shape, generator=generator) for key, shape in (SHAPES | own).items()}
        (save_file if name.endswith("safetensors") else torch.save)(tensors, folder / name)
    return folder


@pytest.fixture(scope="module")
def from_files(states: Path, mergekit_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What mergekit makes of them."""
    root = tmp_path_factory.mktemp("mergekit")
    found: dict[str, Path] = {}
    for tensors, flags in FLAGS.items():
        recipes = {name: case.recipe(states) for name, case in BARE.items() if case.tensors == tensors}
        found |= run_mergekit(mergekit_python, recipes, root, *flags, script="merge_raw_pytorch")
    return found


@pytest.mark.parametrize("name", BARE)
def test_the_same_state_dict(name: str, states: Path, from_files: dict[str, Path], tmp_path: Path) -> None:
    case = BARE[name]
    assert (from_files[name] / "merged").is_dir(), (from_files[name] / "error.txt").read_text(encoding="utf-8")
    found = merge(case.recipe(states), tmp_path, tensors=case.tensors)
    other = read_tensors(from_files[name] / "merged")
    assert found.keys() == other.keys() == set(case.made)
    inputs = [load_file(path) if path.suffix == ".safetensors" else torch.load(path) for path in states.iterdir()]
    for key in found:
        ours, rivals = (each[key].numpy().astype(np.float64) for each in (found, other))
        largest = np.max([np.abs(ours), *(np.abs(one[key].numpy()) for one in inputs if key in one)], axis=0)
        apart = np.abs(ours - rivals) / ulp(largest)
        assert apart.max() <= (4 if case.method == "slerp" else 2), (key, apart.max())


def test_mergekit_stops_where_the_base_lacks_a_tensor(states: Path, mergekit_python: Path, tmp_path: Path) -> None:
    """In a union; we copy it from the first that has it."""
    case = Bare("task_arithmetic", ("b.pt", "c.bin"), "union", (*SHAPES, "both", "only_b"), "a.safetensors")
    (tmp_path / "mergekit").mkdir()
    recipes = {"over-base": case.recipe(states)}
    rival = run_mergekit(mergekit_python, recipes, tmp_path / "mergekit", "-u", script="merge_raw_pytorch")["over-base"]
    assert "only_b" in (rival / "error.txt").read_text(encoding="utf-8")
    found = merge(case.recipe(states), tmp_path, tensors="union")
    assert found.keys() == set(case.made)
    assert torch.equal(found["only_b"], torch.load(states / "b.pt")["only_b"])
