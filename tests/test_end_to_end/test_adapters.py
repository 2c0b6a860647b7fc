"""A model with a LoRA adapter is the model that PEFT's `merge_and_unload` makes, to rounding."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import CheckpointError, MergepipeError, RecipeError, TensorMismatchError
from mergepipe.pipeline.models import open_model
from mergepipe.pipeline.recipe import parse_recipe
from support.adapters import VARIANTS, write_adapter
from support.checkpoints import read_tensors

pytestmark = pytest.mark.filterwarnings("default")  # peft and transformers warn about themselves


def merge(folder: Path, recipe: dict[str, Any], **options: Any) -> dict[str, torch.Tensor]:
    for name in ("work", "merged"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run = {key: options.pop(key) for key in ("workers", "reader") if key in options}
    mergepipe.build(folder / "recipe.yaml", folder / "work", out=folder / "merged", **options)
    mergepipe.run(folder / "work", **run)
    return read_tensors(folder / "merged")


def passthrough(folder: Path) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": f"{folder}/base+{folder}/lora"}]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_merges(variant: str, tmp_path: Path) -> None:
    """Every tensor, to a few units in the last place of float32; what the adapter leaves alone, to the bit."""
    expected = write_adapter(tmp_path, *VARIANTS[variant])
    found = merge(tmp_path, passthrough(tmp_path))
    base = read_tensors(tmp_path / "base")
    assert found.keys() == expected.keys()
    changed = [name for name in found if not torch.equal(found[name], base[name])]
    assert changed == [name for name in found if not torch.equal(expected[name], base[name])]
    assert changed
    for name in changed:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-6, atol=2e-7)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """Half a unit in the last place from float64; PEFT, which rounds the update first, is up to one away."""
    _, options = VARIANTS["plain"]
    expected = write_adapter(tmp_path, "llama", options, torch.bfloat16)
    found, base = merge(tmp_path, passthrough(tmp_path)), read_tensors(tmp_path / "base")
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name in found:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in lora:
            update = lora[f"{key}.lora_B.weight"].double() @ lora[f"{key}.lora_A.weight"].double()
            exact = base[name].double() + 7 / 4 * update
            assert (found[name].double() - exact).abs().le(exact.abs() * 2**-8 * 1.001 + 1e-30).all()
            torch.testing.assert_close(found[name], expected[name], rtol=2**-7, atol=1e-3)
            assert not torch.equal(found[name], base[name])


SLOW = [pytest.param(one, marks=pytest.mark.slow, id=str(one)) for one in ({"workers": 1}, {"store": "copy"})]


@pytest.mark.parametrize("options", [{"chunk_size": 3000}, {"reader": "direct"}, *SLOW], ids=str)
def test_the_cut_changes_no_byte(options: dict[str, Any], tmp_path: Path) -> None:
    """With thresholds over deltas, a DoRA under the base, an adapter on one model and none on another."""
    write_adapter(tmp_path / "a", *VARIANTS["dora"])
    write_adapter(tmp_path / "b", *VARIANTS["embedding"])
    models = [f"{tmp_path}/b/base+{tmp_path}/b/lora", str(tmp_path / "a" / "base")]
    recipe = {
        "merge_method": "ties",
        "base_model": f"{tmp_path}/a/base+{tmp_path}/a/lora",
        "models": [{"model": model, "parameters": {"weight": 0.5, "density": 0.5}} for model in models],
    }
    plain = merge(tmp_path, recipe)
    other = merge(tmp_path, recipe, **options)
    assert all(torch.equal(value, other[name]) for name, value in plain.items())


def test_a_whole_matrix_method_takes_adapters(tmp_path: Path) -> None:
    """As it takes the model that PEFT wrote."""
    write_adapter(tmp_path, *VARIANTS["plain"])
    recipe: dict[str, Any] = {"merge_method": "tsv_m", "base_model": str(tmp_path / "base"), "dtype": "float32"}
    names = (f"{tmp_path}/base+{tmp_path}/lora", str(tmp_path / "expected"))
    found = [merge(tmp_path, recipe | {"models": [{"model": name}]}) for name in names]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


def test_a_mapping_says_the_same(tmp_path: Path) -> None:
    models = [{"model": {"model": {"path": "base"}, "lora": {"path": "lora"}}}]
    (tmp_path / "base").mkdir()
    spec = parse_recipe({"merge_method": "passthrough", "models": models}, relative_to=tmp_path).models[0]
    assert spec.model == f"{tmp_path}/base+{tmp_path}/lora"
    text = parse_recipe({"merge_method": "passthrough", "models": [{"model": "base+lora"}]}, relative_to=tmp_path)
    assert text.models[0] == spec


def test_a_folder_with_a_plus_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    recipe = parse_recipe(
        {"merge_method": "linear", "models": [{"model": "a+b"}]} | {"parameters": {"weight": 1}}, relative_to=tmp_path
    )
    assert recipe.models[0].model == f"{tmp_path}/a+b"


def test_a_revision_of_a_folder_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    models = [{"model": {"path": "base", "revision": "main"}}]
    with pytest.raises(RecipeError, match=r"\$\.models\[0\]\.model\.revision: .*only a hub id takes one"):
        parse_recipe({"merge_method": "passthrough", "models": models}, relative_to=tmp_path)


def test_a_checkpoint_without_the_prefix_of_the_class(tmp_path: Path) -> None:
    """GPT-2's own files have no `transformer.` before their names, the adapter of the class around it has."""
    expected = write_adapter(tmp_path, *VARIANTS["gpt2"])
    path = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(bare, path, {"format": "pt"})
    found = merge(tmp_path, passthrough(tmp_path))
    for name, value in expected.items():
        torch.testing.assert_close(found[name.removeprefix("transformer.")], value, rtol=2e-6, atol=2e-7)


def rename_all(folder: Path, *pairs: tuple[str, str]) -> None:
    """Rename the tensors of an adapter."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for old, new in pairs:
        tensors = {name.replace(old, new): value for name, value in tensors.items()}
    save_file(tensors, path, {"format": "pt"})


def test_an_adapter_from_before_the_class_was_renamed(tmp_path: Path) -> None:
    """Its names are those of the files; mixed with new ones they are understood as well."""
    expected = write_adapter(tmp_path, *VARIANTS["dora, renamed"])
    old = (
        (".layers.", ".encoder.layer."),
        (".attention.v_proj.", ".attention.attention.value."),
        (".mlp.fc1", ".intermediate.dense"),
    )
    for pairs in (old[2:], old):
        shutil.copytree(tmp_path / "lora", tmp_path / "kept")
        rename_all(tmp_path / "lora", *pairs)
        found = merge(tmp_path, passthrough(tmp_path))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=2e-7)
        shutil.rmtree(tmp_path / "lora")
        (tmp_path / "kept").rename(tmp_path / "lora")


def test_renamed_modules_without_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, *VARIANTS["renamed"])
    monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    with pytest.raises(TensorMismatchError, match=r"transformers has to be installed, .* mergepipe\[eval\]"):
        open_model(f"{tmp_path}/base+{tmp_path}/lora")


def test_a_configuration_that_asks_for_a_billion_layers(tmp_path: Path) -> None:
    """Its model is not made."""
    write_adapter(tmp_path, *VARIANTS["renamed"])
    edit(tmp_path / "base" / "config.json", num_hidden_layers=10**9)
    with pytest.raises(TensorMismatchError, match="does not have"):
        open_model(f"{tmp_path}/base+{tmp_path}/lora")


def bare(folder: Path, names: list[str], target: str, shape: tuple[int, int] = (6, 4)) -> str:
    """A model of matrices by name, and an adapter of one module."""
    for name in ("base", "lora"):
        (folder / name).mkdir(parents=True)
    save_file({name: torch.zeros(6, 4) for name in names}, folder / "base" / "model.safetensors")
    factors = {f"{target}.lora_A.weight": torch.ones(2, shape[1]), f"{target}.lora_B.weight": torch.ones(shape[0], 2)}
    save_file(factors, folder / "lora" / "adapter_model.safetensors")
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return f"{folder}/base+{folder}/lora"


def test_another_beginning_of_the_names(tmp_path: Path) -> None:
    """One place that fits is taken; of two, neither; a layer of another number is never one."""
    text, image = "language_model.model.layers.0.q.weight", "vision_tower.layers.0.q.weight"
    model = open_model(bare(tmp_path / "a", [text, "x.weight"], "model.language_model.layers.0.q"))
    assert list(model.adjust) == [text]
    with pytest.raises(TensorMismatchError, match=f"may be '{text}' or '{image}'"):
        open_model(bare(tmp_path / "b", [text, image], "model.decoder.layers.0.q"))
    for number, (names, target, shape) in enumerate(
        (
            ([text], "model.layers.1.q", (6, 4)),
            ([text], "other.layers.0.q", (4, 3)),
            ([text], "other.layers.0.k", (6, 4)),
        )
    ):
        with pytest.raises(TensorMismatchError, match="does not have"):
            open_model(bare(tmp_path / str(number), names, target, shape))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a plain adapter."""
    folder = tmp_path_factory.mktemp("plain")
    write_adapter(folder, *VARIANTS["plain"])
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "'LOHA' adapter"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base itself"),
        ({"layer_replication": [[0, 2]]}, "uses layer_replication"),
        ({"use_dora": True}, "lacks its magnitude vector"),
        ({"r": 5}, r"has rank 4, the rank in adapter_config\.json is 5"),
        ({"lora_alpha": "x"}, "lora_alpha .* is 'x'"),
        ({"rank_pattern": {"(a+)+": 1}}, "may take for ever"),
        ({"rank_pattern": {"(": 1}}, "is no regular expression"),
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(
    changes: dict[str, Any], message: str, written: Path, tmp_path: Path
) -> None:
    shutil.copytree(written / "lora", tmp_path / "lora")
    edit(tmp_path / "lora" / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        open_model(f"{written}/base+{tmp_path}/lora")


def test_a_target_that_the_model_does_not_have(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written / "lora", tmp_path / "lora")
    path = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("layers.1.", "layers.9."): value for name, value in tensors.items()}, path)
    with pytest.raises(TensorMismatchError, match=r"targets 3 tensors .* 'model\.layers\.9\..*Is it an adapter"):
        open_model(f"{written}/base+{tmp_path}/lora")
    narrow = {name: value[:, :5].contiguous() if "lora_A" in name else value for name, value in tensors.items()}
    save_file(narrow, path)
    with pytest.raises(TensorMismatchError, match=r"\(4, 5\).* do not fit"):
        open_model(f"{written}/base+{tmp_path}/lora")
    with pytest.raises(MergepipeError, match=r"holds no adapter_config\.json"):
        open_model(f"{written}/base+{tmp_path}")


def test_an_adapter_that_is_not_finite(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "m")
    path = tmp_path / "m" / "lora" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name][1, 2] = float("nan")
    save_file(tensors, path)
    with pytest.raises(mergepipe.errors.NonFiniteError, match=r"lora_A.* holds a NaN"):
        merge(tmp_path, passthrough(tmp_path / "m"))


def test_the_memory_of_factors_is_projected(tmp_path: Path) -> None:
    """A rank as large as the matrix does not fit a small ceiling, and `build` says so."""
    torch.manual_seed(0)
    size = 4096
    (tmp_path / "base").mkdir()
    (tmp_path / "lora").mkdir()
    save_file({"x.weight": torch.zeros(size, size, dtype=torch.bfloat16)}, tmp_path / "base" / "model.safetensors")
    factors = {f"x.lora_{half}.weight": torch.zeros(size, size, dtype=torch.bfloat16) for half in "AB"}
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": size, "lora_alpha": 1}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(passthrough(tmp_path)))
    options: dict[str, Any] = {"out": tmp_path / "out", "workers": 2}
    with pytest.raises(mergepipe.errors.MemoryBudgetError, match=r"'x\.weight' does not fit"):
        mergepipe.build(tmp_path / "r.yaml", tmp_path / "w", memory="512MiB", **options)
    mergepipe.build(tmp_path / "r.yaml", tmp_path / "w", memory="1GiB", **options)
