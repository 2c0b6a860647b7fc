"""Recipes of the kinds that model cards carry, as users write them, on tiny models: built, run and loaded.

The wording is ours; forms, keys and habits (relative names, keys without effect, the base listed among the models) are
those of published `mergekit_config.yml` files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mergepipe
from support.checkpoints import read_tensors
from support.vocabularies import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("default")

Tensors = dict[str, torch.Tensor]
LAYERS = 4

FRANKENMERGE = """
slices:
  - sources:
    - model: lab/story-tiny
      layer_range: [0, 3]
  - sources:
    - model: lab/code-tiny
      layer_range: [1, 4]
merge_method: passthrough
dtype: bfloat16
"""

SELF_MERGE = """
# every repeated layer adds less to what goes by it
dtype: bfloat16
merge_method: passthrough
slices:
- sources:
  - model: lab/story-tiny
    layer_range: [0, 2]
- sources:
  - model: lab/story-tiny
    layer_range: [1, 3]
    parameters:
      scale:
        - filter: o_proj
          value: 0.0
        - filter: down_proj
          value: 0.0
        - value: 1.0
- sources:
  - model: lab/story-tiny
    layer_range: [2, 4]
"""

GRADIENT_SLERP = """
slices:
  - sources:
      - model: lab/story-tiny
        layer_range: [0, 4]
      - model: lab/code-tiny
        layer_range: [0, 4]
merge_method: slerp
base_model: lab/story-tiny
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
embed_slerp: true
dtype: bfloat16
"""

DARE_TIES_OF_THREE = """
models:
  - model: lab/base-tiny
    # no parameters necessary for the base
  - model: lab/story-tiny
    parameters:
      density: 0.53
      weight: 0.4
  - model: lab/code-tiny
    parameters:
      density: [1, 0.7, 0.4]
      weight: 0.3
  - model: lab/chat-tiny
    parameters:
      density: 0.53
      weight:
        - filter: mlp
          value: 0.3
        - value: 0.1
merge_method: dare_ties
base_model: lab/base-tiny
parameters:
  int8_mask: true
  normalize: false
tokenizer_source: base
dtype: bfloat16
random_seed: 42
"""

TIES_WITH_GRADIENTS = """
models:
  - model: lab/story-tiny
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: lab/code-tiny
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
merge_method: ties
base_model: lab/base-tiny
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

STOCK = """
models:
  - model: lab/story-tiny
  - model: lab/code-tiny
merge_method: model_stock
base_model: lab/base-tiny
parameters:
  filter_wise: false
dtype: bfloat16
"""

DELLA = """
merge_method: della_linear
base_model: lab/base-tiny
models:
  - model: lab/story-tiny
    parameters: {weight: 0.6, density: 0.7, epsilon: 0.1}
  - model: lab/code-tiny
    parameters: {weight: 0.4, density: 0.6, epsilon: 0.2}
parameters: {lambda: 1.1, normalize: true}
out_dtype: bfloat16
dtype: float32
"""

MULTI_STAGE = """
name: writers
merge_method: slerp
base_model: lab/story-tiny
models:
  - model: lab/story-tiny
  - model: lab/code-tiny
parameters: {t: 0.35}
dtype: bfloat16
---
name: tall
merge_method: passthrough
slices:
  - sources: [{model: writers, layer_range: [0, 3]}]
  - sources: [{model: writers, layer_range: [1, 4]}]
dtype: bfloat16
---
merge_method: linear
models:
  - model: tall
    parameters: {weight: 0.7}
  - model: tall+lab/style-lora
    parameters: {weight: 0.3}
dtype: bfloat16
"""

TOKENIZER_UNION = """
merge_method: linear
models:
  - model: lab/story-tiny
    parameters: {weight: 1.0}
  - model: lab/chat-tiny
    parameters: {weight: 1.0}
tokenizer:
  source: union
  tokens:
    <|im_start|>:
      source: lab/chat-tiny
      force: true
    <|im_end|>:
      source: {kind: model_token, model: lab/chat-tiny, token: </s>}
  pad_to_multiple_of: 32
chat_template: chatml
dtype: bfloat16
"""


def write(folder: Path, seed: int, parent: Tensors | None, added: dict[str, bool]) -> Tensors:
    """A Llama near `parent`, if there is one, with a tokenizer."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(["ab", "cd"], added)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer.get_vocab()), hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, value in model.state_dict().items() if parent is not None else ():
            assert parent is not None
            old = parent[name]
            value[: len(old)] = old + 0.05 * value[: len(old)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return read_tensors(folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes of it (one with tokens of its own) and an adapter, as `lab/…`."""
    folder = tmp_path_factory.mktemp("cards")
    base = write(folder / "lab" / "base-tiny", 0, None, {})
    write(folder / "lab" / "story-tiny", 1, base, {})
    write(folder / "lab" / "code-tiny", 2, base, {})
    write(folder / "lab" / "chat-tiny", 3, base, {"<|im_start|>": True, "<|im_end|>": True})
    return folder


def write_style(folder: Path) -> None:
    """A LoRA of a stack of six layers."""
    import json

    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(4)
    factors = {}
    for layer in range(6):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        factors[f"{module}.lora_A.weight"] = torch.randn(2, 32, generator=generator)
        factors[f"{module}.lora_B.weight"] = torch.randn(32, 2, generator=generator)
    folder.mkdir(exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def layer(tensors: Tensors, number: int) -> Tensors:
    prefix = f"model.layers.{number}."
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def same(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def check_frankenmerge(made: Tensors, of: Callable[[str], Tensors]) -> None:
    story, code = of("story"), of("code")
    for number, (model, old) in enumerate([(story, 0), (story, 1), (story, 2), (code, 1), (code, 2), (code, 3)]):
        assert same(layer(made, number), layer(model, old)), number
    assert torch.equal(made["model.embed_tokens.weight"], story["model.embed_tokens.weight"])
    assert torch.equal(made["lm_head.weight"], code["lm_head.weight"])


def check_self_merge(made: Tensors, of: Callable[[str], Tensors]) -> None:
    for number, old in enumerate((0, 1, 1, 2, 2, 3)):
        found, expected = layer(made, number), layer(of("story"), old)
        for name, value in found.items():
            silent = number in (2, 3) and ("o_proj" in name or "down_proj" in name)
            assert torch.equal(value, torch.zeros_like(value) if silent else expected[name]), (number, name)


def check_gradient_slerp(made: Tensors, of: Callable[[str], Tensors]) -> None:
    """Where t is 0 or 1 the models are as they were; in between each element lies near both."""
    story, code = of("story"), of("code")
    ends = {(0, "self_attn"): story, (3, "self_attn"): code, (0, "mlp"): code, (3, "mlp"): story}
    for (number, part), model in ends.items():
        mine, own = layer(made, number), layer(model, number)
        for name in (name for name in mine if part in name):
            assert torch.allclose(mine[name].float(), own[name].float(), rtol=2**-7, atol=2**-12), (number, name)
    a, b = (model["model.norm.weight"].double() for model in (story, code))
    angle = torch.acos((a @ b) / (a.norm() * b.norm()).clamp_min(1e-12))
    arc = (torch.sin(angle / 2) / torch.sin(angle)) * (a + b) if angle > 0.01 else (a + b) / 2
    assert torch.allclose(made["model.norm.weight"].double(), arc, rtol=2**-7)


def check_dare_ties(made: Tensors, of: Callable[[str], Tensors]) -> None:
    """A part of every task vector is there: something moved, no element by more than all of them together."""
    base, experts = of("base"), [of(name) for name in ("story", "code", "chat")]
    name = "model.layers.2.mlp.up_proj.weight"
    moved = made[name].double() - base[name].double()
    deltas = [expert[name].double() - base[name].double() for expert in experts]
    share = (moved != 0).double().mean()
    assert 0.5 < share < 0.98
    at_most = sum(weight / 0.4 * delta.abs() for weight, delta in zip((0.4, 0.3, 0.3), deltas, strict=True))
    assert (moved.abs() <= at_most + 2**-8 * base[name].abs() + 1e-6).all()


def check_ties(made: Tensors, of: Callable[[str], Tensors]) -> None:
    """The only layer at the first end of both gradients takes all of one model and nothing of the other."""
    name = "model.layers.0.mlp.up_proj.weight"
    assert made[name].dtype == torch.float16
    assert torch.allclose(made[name].float(), of("story")[name].float(), rtol=2**-9, atol=2**-12)


def check_stock(made: Tensors, of: Callable[[str], Tensors]) -> None:
    """Each tensor lies on the line from the base to the mean of the models."""
    name = "model.layers.1.self_attn.k_proj.weight"
    base, a, b = (of(which)[name].double() for which in ("base", "story", "code"))
    x, y = (a - base).flatten(), (b - base).flatten()
    cosine = (x @ y) / (x.norm() * y.norm())
    ratio = 2 * cosine / (1 + cosine)
    expected = ratio * (a + b) / 2 + (1 - ratio) * base
    assert torch.allclose(made[name].double(), expected, rtol=2**-7, atol=2**-12)


def check_della(made: Tensors, of: Callable[[str], Tensors]) -> None:
    name = "model.layers.1.mlp.gate_proj.weight"
    moved = (made[name].double() - of("base")[name].double()) != 0
    assert 0.5 < moved.double().mean() < 0.98


def check_multi_stage(made: Tensors, of: Callable[[str], Tensors]) -> None:
    """Six layers, the later three those of the middle merge again; the adapter counts by its weight."""
    for one, other in ((1, 3), (2, 4)):
        found, again = layer(made, one), layer(made, other)
        assert all(torch.equal(found[name], again[name]) for name in found if "q_proj" not in name)
        assert not torch.equal(found["self_attn.q_proj.weight"], again["self_attn.q_proj.weight"])


def check_union(made: Tensors, of: Callable[[str], Tensors]) -> None:
    chat, story = of("chat")["model.embed_tokens.weight"], of("story")["model.embed_tokens.weight"]
    table = made["model.embed_tokens.weight"]
    assert len(table) == 32
    assert torch.equal(table[22], chat[22])
    assert torch.allclose(table[23].float(), (chat[23].float() + chat[1].float()) / 2, rtol=2**-7, atol=2**-12)
    assert torch.allclose(table[5].float(), (chat[5].float() + story[5].float()) / 2, rtol=2**-7, atol=2**-12)


KINDS: dict[str, tuple[str, int, Callable[[Tensors, Callable[[str], Tensors]], None]]] = {
    "frankenmerge": (FRANKENMERGE, 6, check_frankenmerge),
    "self-merge": (SELF_MERGE, 6, check_self_merge),
    "gradient slerp": (GRADIENT_SLERP, LAYERS, check_gradient_slerp),
    "dare_ties of three": (DARE_TIES_OF_THREE, LAYERS, check_dare_ties),
    "ties with gradients": (TIES_WITH_GRADIENTS, LAYERS, check_ties),
    "model stock": (STOCK, LAYERS, check_stock),
    "della": (DELLA, LAYERS, check_della),
    "multi-stage": (MULTI_STAGE, 6, check_multi_stage),
    "tokenizer union": (TOKENIZER_UNION, LAYERS, check_union),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_from_a_model_card(kind: str, lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder with its models, without any change: the numbers, and a model that writes."""
    text, layers, check = KINDS[kind]
    (tmp_path / "lab").symlink_to(lab / "lab")
    monkeypatch.chdir(tmp_path)
    if "style-lora" in text:
        write_style(lab / "lab" / "style-lora")
    Path("mergekit_config.yml").write_text(text, encoding="utf-8")
    notes = mergepipe.build("mergekit_config.yml").notes
    for key in ("random_seed", "embed_slerp"):
        assert any(f"`{key}` has no effect" in note for note in notes) == (key in text)
    out = mergepipe.run().output
    assert out == tmp_path / "merged"
    check(read_tensors(out), lambda name: read_tensors(lab / "lab" / f"{name}-tiny"))
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert {key: value for key, value in info.items() if value} == {}
    assert model.config.num_hidden_layers == layers
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    written = model.generate(**tokenizer("ab cd", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert written.shape[1] > 3
    assert all(isinstance(value, str) for value in tokenizer.convert_ids_to_tokens(written[0, :3].tolist()))
    card: Any = (out / "README.md").read_text(encoding="utf-8")
    assert "mergekit" in card
    assert "story-tiny" in card
