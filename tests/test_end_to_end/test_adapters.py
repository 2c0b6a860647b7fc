"""A model with a LoRA adapter is the model that PEFT's `merge_and_unload` makes, to rounding."""

from __future__ import annotations

import json
import shutil
import warnings
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
from support.checkpoints import new_model, read_tensors

pytestmark = pytest.mark.filterwarnings("default")  # peft and transformers warn about themselves

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    import transformers

LINEAR = ["q_proj", "v_proj", "down_proj"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "use_rslora": True}),
    "patterns": ("llama", {
        "r": 4, "lora_alpha": 8, "target_modules": LINEAR,
        "rank_pattern": {"down_proj": 3, r"layers\.1\..*q_proj": 6, "layers.0.self_attn.v_proj": 1},
        "alpha_pattern": {"down_proj": 5, "q_proj": 1},
    }),
    "modules to save": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"r": 3, "lora_alpha": 5, "target_modules": ["embed_tokens", "q_proj"]}),
    "dora": ("llama", {"r": 4, "lora_alpha": 7, "target_modules": LINEAR, "use_dora": True}),
    "dora, embedding": ("llama", {"r": 3, "target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tied": ("qwen2", {"r": 3, "target_modules": ["embed_tokens", "v_proj"]}),
    "biases": ("qwen2", {"r": 3, "target_modules": ["q_proj", "v_proj"], "bias": "lora_only"}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2, dora": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
    "convolution": ("vit", {"r": 3, "target_modules": ["projection"]}),
    "dora, convolution": ("vit", {"r": 3, "target_modules": ["projection"], "use_dora": True}),
}  # fmt: skip


def make_model(kind: str) -> Any:
    if kind != "gpt2":
        return new_model(kind)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=211, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def train(model: Any) -> None:
    """Give every trainable parameter a value that matters: B starts from zero, and would hide every mistake."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)


def write(
    folder: Path, kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A base and an adapter of it under `folder`; the tensors that PEFT merges them into."""
    base = make_model(kind).to(dtype)
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(base, peft.LoraConfig(**options))
        train(tuned)
        tuned.save_pretrained(folder / "lora")
        fresh = type(base).from_pretrained(folder / "base", dtype=dtype)
        merged = peft.PeftModel.from_pretrained(fresh, folder / "lora").merge_and_unload(safe_merge=True)
        merged.save_pretrained(folder / "expected")
    return read_tensors(folder / "expected")


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
    expected = write(tmp_path, *VARIANTS[variant])
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
    expected = write(tmp_path, "llama", options, torch.bfloat16)
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
    write(tmp_path / "a", *VARIANTS["dora"])
    write(tmp_path / "b", *VARIANTS["embedding"])
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
    write(tmp_path, *VARIANTS["plain"])
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
    expected = write(tmp_path, *VARIANTS["gpt2"])
    path = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    save_file(bare, path, {"format": "pt"})
    found = merge(tmp_path, passthrough(tmp_path))
    for name, value in expected.items():
        torch.testing.assert_close(found[name.removeprefix("transformer.")], value, rtol=2e-6, atol=2e-7)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a plain adapter."""
    folder = tmp_path_factory.mktemp("plain")
    write(folder, *VARIANTS["plain"])
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
        ({"rank_pattern": {"(": 1}}, "is no pattern"),
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
