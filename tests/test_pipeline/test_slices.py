"""Recipes of slices and modules: what is read, what is refused, and which tensor of which model goes where."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mergepipe.errors import CheckpointError, RecipeError
from mergepipe.pipeline.align import Alignment, align
from mergepipe.pipeline.parts import parts_of
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.pipeline.planning import make_plan
from mergepipe.pipeline.recipe import Recipe, parse_recipe
from mergepipe.pipeline.towers import count_places, main_stacks, side_of, tower_of
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry
from mergepipe.storage.dtypes import DTYPES

Header = dict[str, tuple[int, ...]]


def model(layers: int = 4, width: int = 8, stack: str = "model.layers", extra: Header | None = None) -> Header:
    """A decoder: an embedding, layers of two tensors, a norm, a head."""
    outside = {"model.embed_tokens.weight": (32, width), "model.norm.weight": (width,), "lm_head.weight": (32, width)}
    inside = {f"{stack}.{n}.{kind}": (width, width) for n in range(layers) for kind in ("attn.weight", "mlp.weight")}
    return outside | inside | (extra or {})


def checkpoint(header: Header, config: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: TensorEntry(name, "F32", shape, 0, 0, math.prod(shape) * DTYPES["F32"].itemsize)
        for name, shape in header.items()
    }
    return Checkpoint(Path("/m"), (), tensors, {"num_hidden_layers": 4} if config is None else config)


def source(path: str, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": path, "layer_range": [first, end]} | ({"parameters": parameters} if parameters else {})


def one(*sources: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"sources": list(sources)} | more


def parse(*slices: dict[str, Any], **more: Any) -> Recipe:
    given = {"merge_method": "passthrough", "slices": list(slices)} | more
    return parse_recipe({key: value for key, value in given.items() if value is not ...}, relative_to="/models")


def faults(*slices: dict[str, Any], **more: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        parse(*slices, **more)
    return {fault.path: fault.message for fault in caught.value.faults}


def line_up(recipe: Recipe, *found: Checkpoint) -> Alignment:
    """Align the recipe with as many checkpoints as it has sources; all alike if none are given."""
    return align(recipe, found or [checkpoint(model())] * len(recipe.sources))


def problems(recipe: Recipe, *found: Checkpoint) -> str:
    with pytest.raises(CheckpointError) as caught:
        line_up(recipe, *found)
    assert caught.value.exit_code == 4
    return str(caught.value)


def plan(recipe: Recipe, *found: Checkpoint) -> Plan:
    opened = found or tuple([checkpoint(model())] * len(recipe.sources))
    alignment = align(recipe, opened)
    sizes = {"allowed": 1 << 29, "chunk_bytes": 1 << 23, "shard_bytes": None}
    return make_plan(recipe, opened, alignment, store="virtual", output=Path("/out"), **sizes)  # type: ignore[arg-type]


def tensors(recipe: Recipe, *found: Checkpoint) -> dict[str, PlannedTensor]:
    return {tensor.name: tensor for tensor in plan(recipe, *found).tensors}


SLERP = {"merge_method": "slerp", "base_model": "a"}
FRANKEN = (one(source("a", 0, 3)), one(source("b", 1, 4)))


# -- what is read


def test_slices_come_back_as_they_were_read() -> None:
    recipe = parse(
        one(source("a", 0, 2), source("b", 2, 4), parameters={"t": [0, 1]}),
        one(source("b", 1, 2, weight=1), source("a", 1, 2, weight=2), base_model="b", merge_method="linear"),
        **SLERP,
    )
    assert recipe.sources == ("/models/a", "/models/b")
    assert parse_recipe(recipe.to_dict()) == recipe


def test_modules_come_back_as_they_were_read() -> None:
    modules = {
        "text_decoder": {"slices": list(FRANKEN), "merge_method": "passthrough"},
        "vision_tower": {"models": [{"model": "a"}, {"model": "c"}], "parameters": {"weight": 0.5}},
    }
    recipe = parse(merge_method="linear", slices=..., modules=modules)
    assert recipe.sources == ("/models/a", "/models/b", "/models/c")
    assert parse_recipe(recipe.to_dict()) == recipe


def test_a_key_without_effect_is_noted_once() -> None:
    recipe = parse(one(source("a", 0, 1), residual_weight=0.5), one(source("a", 0, 1), residual_weight=0.5))
    assert len(recipe.notes) == 1
    assert "residual_weight" in recipe.notes[0]


def test_the_parts_of_a_recipe() -> None:
    parts = parts_of(
        parse(
            one(source("a", 0, 2), source("b", 1, 3)),
            one(source("b", 0, 1), source("a", 0, 1)),
            **SLERP,
            parameters={"t": 1},
        )
    )
    assert [(part.first_layer, part.layers, part.first, part.last) for part in parts] == [
        (0, 2, True, False),
        (2, 1, False, True),
    ]
    assert parts[0].recipe.base_model == "/models/a"


# -- what is refused

WRONG = [
    (one(), "$.slices[0].sources", "missing or empty"),
    (one({"model": "a"}), "$.slices[0].sources[0].layer_range", "is missing"),
    (one(source("a", 2, 1)), "$.slices[0].sources[0].layer_range", "[2, 1]"),
    (one(source("a", -1, 1)), "$.slices[0].sources[0].layer_range", "from 0"),
    (one(source("a", 0, 10**9)), "$.slices[0].sources[0].layer_range", "whole numbers"),
    (one({"model": "a", "layer_range": "0-4"}), "$.slices[0].sources[0].layer_range", "'0-4'"),
    (one({"model": "a", "layer_range": [0, True]}), "$.slices[0].sources[0].layer_range", "True"),
    (one(source("a", 2, 2)), "$.slices", "without a layer"),
    (one(source("a", 0, 2), source("b", 0, 3)), "$.slices[0].sources", "2 of /models/a, 3 of /models/b"),
    (one(source("a", 0, 2), source("a", 2, 4)), "$.slices[0].sources[1].model", "already"),
    (one(source("a", 0, 2), layer_rage=1), "$.slices[0].layer_rage", "no key"),
    (one(source("a", 0, 2) | {"layer_rnge": 1}), "$.slices[0].sources[0].layer_rnge", "'layer_range'"),
    (one(source("a", 0, 2), merge_method="lineaer"), "$.slices[0].merge_method", "'linear'"),
    (one(source("a", 0, 2, scales=1)), "$.slices[0].sources[0].parameters.scales", "'scale'"),
    (one(source("a", 0, 2), parameters={"t": 1}), "$.slices[0].parameters.t", "passthrough"),
    (one(source("a", 0, 2), source("b", 0, 2)), "$.slices[0].sources", "exactly 1"),
    ("a", "$.slices[0]", "expected a mapping"),
]


@pytest.mark.parametrize(("entry", "path", "words"), WRONG)
def test_what_is_wrong_with_a_slice_is_told_with_its_path(entry: Any, path: str, words: str) -> None:
    assert words in faults(entry)[path]


def test_a_base_that_is_no_source_has_no_layers() -> None:
    found = faults(one(source("b", 0, 2), source("c", 0, 2)), **SLERP, parameters={"t": 0.5})
    assert "no source" in found["$.slices[0].sources"]
    parse(*FRANKEN, base_model="c")
    assert "missing" in faults(one(source("b", 0, 2), source("c", 0, 2)), **SLERP | {"base_model": ...})["$.base_model"]


def test_what_every_slice_lacks_is_missing_once() -> None:
    pair = one(source("a", 0, 2), source("b", 0, 2))
    assert set(faults(pair, pair, **SLERP)) == {"$.parameters.t"}
    assert set(faults(pair, pair | {"parameters": {"t": 1}}, **SLERP)) == {"$.slices[0].parameters.t"}


def test_only_one_of_models_slices_and_modules() -> None:
    assert "models" in faults(one(source("a", 0, 1)), models=[{"model": "a"}])["$.slices"]
    assert "slices" in faults(one(source("a", 0, 1)), modules={"x": {"models": [{"model": "a"}]}})["$.modules"]
    assert "empty" in faults()["$.slices"]
    assert "empty" in faults(slices=..., modules={})["$.modules"]


def test_faults_inside_modules_have_their_paths() -> None:
    tower = {"slices": [one(source("a", 0, 2), source("b", 0, 1))], "merge_methd": 1, "models": [{"model": "a"}]}
    found = faults(slices=..., merge_method="linear", parameters={"weight": 1}, modules={"text": tower, "vision": {}})
    assert set(found) == {
        "$.modules.text.merge_methd",
        "$.modules.text.slices",
        "$.modules.text.slices[0].sources",
        "$.modules.vision.models",
    }


def test_a_sparsifier_that_no_part_can_use() -> None:
    pair = one(source("a", 0, 2), source("b", 0, 2), merge_method="linear", parameters={"weight": 1})
    found = faults(pair, merge_method="ties", base_model="a", sparsify={"method": "random", "density": 0.5})
    assert "no effect" in found["$.sparsify"]


# -- where tensors go


def test_layers_are_numbered_anew() -> None:
    made = tensors(parse(*FRANKEN))
    names = {n: (t.sources[0].model, t.sources[0].name) for n, t in made.items() if "mlp" in n}
    layer = "model.layers.{}.mlp.weight".format
    assert names == {layer(n): (n // 3, layer(n if n < 3 else n - 2)) for n in range(6)}
    assert len(made) == 3 + 2 * 6


def test_the_first_slice_has_the_embedding_and_the_last_the_head() -> None:
    made = tensors(parse(*FRANKEN))
    assert made["model.embed_tokens.weight"].sources[0].model == 0
    assert made["model.norm.weight"].sources[0].model == 1
    assert made["lm_head.weight"].sources[0].model == 1


def test_one_layer_many_times() -> None:
    made = tensors(parse(*[one(source("a", 1, 2))] * 3))
    assert [made[f"model.layers.{n}.mlp.weight"].sources[0].name for n in range(3)] == ["model.layers.1.mlp.weight"] * 3


def test_gradients_run_over_each_slice() -> None:
    pair = source("a", 0, 3), source("b", 1, 4)
    recipe = parse(one(*pair), one(source("a", 3, 4), source("b", 3, 4)), **SLERP, parameters={"t": [0, 1]})
    made = tensors(recipe)
    values = [(made[f"model.layers.{n}.mlp.weight"].params or {})["t"] for n in range(4)]
    assert values == [0, 0.5, 1, 1], "the only layer of a slice takes the last value"
    outside = {name: tensor.params["t"] for name, tensor in made.items() if "layers" not in name and tensor.params}
    assert set(outside.values()) == {0}
    assert len(outside) == 3


def test_the_source_comes_before_the_slice_before_the_module_before_the_recipe() -> None:
    weight = [{"filter": "attn", "value": 2}]
    inner = one(
        source("a", 0, 1, weight=[{"filter": "embed", "value": 1}]), source("b", 0, 1), parameters={"weight": weight}
    )
    module = {"slices": [inner], "parameters": {"weight": [{"filter": "mlp", "value": 3}]}}
    recipe = parse(slices=..., merge_method="linear", parameters={"weight": 4}, modules={"default": module})
    made = tensors(recipe)
    first = {name: tensor.model_params[0]["weight"] for name, tensor in made.items()}
    assert first == {
        "model.embed_tokens.weight": 1,
        "model.layers.0.attn.weight": 2,
        "model.layers.0.mlp.weight": 3,
        "model.norm.weight": 4,
        "lm_head.weight": 4,
    }
    assert made["model.embed_tokens.weight"].model_params[1]["weight"] == 4


def test_filters_of_a_models_values_look_at_its_own_names() -> None:
    by_layer = [{"filter": f"layers.{n}.", "value": n} for n in range(4)] + [{"value": 9}]
    pair = source("a", 1, 2), source("b", 2, 3)
    made = tensors(parse(one(*pair), merge_method="linear", parameters={"weight": by_layer}))[
        "model.layers.0.mlp.weight"
    ]
    assert [params["weight"] for params in made.model_params] == [1, 2]
    made = tensors(parse(one(*pair), **SLERP, parameters={"t": by_layer}))["model.layers.0.mlp.weight"]
    assert made.params is not None
    assert made.params["t"] == 0, "what all models share goes by the name in the output"


def test_a_slice_may_have_a_method_and_a_base_of_its_own() -> None:
    pair = source("a", 0, 2), source("b", 0, 2)
    recipe = parse(
        one(*pair, parameters={"t": 0.5}),
        one(*pair, base_model="b", parameters={"t": 0.5}),
        one(*pair, merge_method="linear", parameters={"weight": 1}),
        **SLERP,
    )
    made = [tensors(recipe)[f"model.layers.{n}.mlp.weight"] for n in (0, 2, 4)]
    assert [tensor.method for tensor in made] == ["slerp", "slerp", "linear"]
    assert [tensor.base and tensor.base.model for tensor in made] == [0, 1, None]


def test_rules_reach_into_slices() -> None:
    pair = source("a", 0, 1), source("b", 0, 1)
    rule = {"match": "norm", "merge_method": "linear", "parameters": {"weight": 1}}
    made = tensors(parse(one(*pair), one(*pair), **SLERP, parameters={"t": 1}, rules=[rule]))
    assert (made["model.norm.weight"].method, made["lm_head.weight"].method) == ("linear", "slerp")
    rule = {"match": "norm", "merge_method": "slerp", "parameters": {"t": 1}}
    with pytest.raises(RecipeError, match=r"base_model: for 'model.norm.weight': is missing"):
        tensors(parse(*FRANKEN, rules=[rule]))


# -- what does not fit


def test_layers_that_a_model_lacks() -> None:
    text = problems(parse(one(source("a", 0, 9)), one(source("b", 3, 5))))
    assert "$.slices[0].sources: layers up to 8 are asked of '/models/a', which has 0 to 3" in text
    assert "layers up to 4 are asked of '/models/b'" in text


def test_layers_of_another_width_do_not_fit_above_each_other() -> None:
    text = problems(parse(*FRANKEN), checkpoint(model(width=8)), checkpoint(model(width=16)))
    assert "(16, 16), in '/models/a' it is (8, 8)" in text


def test_models_of_different_architecture_are_not_stacked() -> None:
    other = checkpoint({name.replace("model.layers", "h"): shape for name, shape in model().items()})
    assert "different names" in problems(parse(*FRANKEN), checkpoint(model()), other)
    bare = checkpoint({name: shape for name, shape in model().items() if "layers" not in name})
    assert "no numbered layers" in problems(parse(*FRANKEN), bare, bare)


def test_a_tensor_whose_name_tells_no_place_is_refused_by_name_unless_ruled() -> None:
    odd = checkpoint(model(extra={"model.gates": (8,)}))
    assert "'model.gates' in '/models/a'" in problems(parse(*FRANKEN), odd, odd)
    assert "model.gates" in {t.name for t in line_up(parse(one(source("a", 0, 4))), odd).tensors}
    rules = [{"match": "gates", "merge_method": "passthrough"}]
    assert tensors(parse(*FRANKEN, rules=rules), odd, odd)["model.gates"].sources[0].model == 0


def test_what_the_kept_configuration_describes_has_to_be_there() -> None:
    headless = {name: shape for name, shape in model().items() if name != "lm_head.weight"}
    assert "'lm_head.weight' is in '/models/a' but in no slice" in problems(
        parse(*FRANKEN), checkpoint(model()), checkpoint(headless)
    )
    assert "the slices make 'lm_head.weight'" in problems(parse(*FRANKEN), checkpoint(headless), checkpoint(model()))


def test_a_tied_twin_is_left_out_of_a_stack() -> None:
    tied = checkpoint(model(), {"num_hidden_layers": 4, "tie_word_embeddings": True})
    found = line_up(parse(*FRANKEN), tied, tied)
    assert "lm_head.weight" not in {tensor.name for tensor in found.tensors}
    assert any("ties it" in note for note in found.notes)


def test_several_towers_need_modules() -> None:
    both = checkpoint(model() | {f"vision.blocks.{n}.{k}": (2,) for n in range(4) for k in "ab"})
    assert "modules" in problems(parse(*FRANKEN), both, both)


def test_what_the_first_layer_has_alone_stays_there() -> None:
    biased = checkpoint(model(extra={"model.layers.0.bias": (3,)}))
    found = line_up(parse(one(source("a", 0, 2)), one(source("b", 0, 2))), biased, biased)
    assert [t.name for t in found.tensors if "bias" in t.name] == ["model.layers.0.bias"]
    assert any("layer 0 only" in note for note in found.notes)
    assert "'model.layers.0.bias'" in problems(parse(one(source("a", 1, 3))), biased)


# -- modules

TOWERS = {
    **{f"language_model.{name}": shape for name, shape in model().items()},
    **{f"visual.blocks.{n}.{kind}.weight": (4, 4) for n in range(3) for kind in ("attn", "mlp")},
    "visual.patch_embed.weight": (4, 4),
    "visual.merger.0.weight": (8, 4),
    "logit_scale": (),
}
NESTED = {"text_config": {"num_hidden_layers": 4, "layer_types": ["x"] * 4}, "vision_config": {"depth": 3}}


def test_a_tower_of_a_model_of_several() -> None:
    modules = {
        "text_decoder": {"slices": [one(source("a", 0, 3)), one(source("b", 2, 4))]},
        "vision_tower": {"models": [{"model": "b"}]},
    }
    recipe = parse(slices=..., modules=modules)
    towers = checkpoint(TOWERS, NESTED)
    found = line_up(recipe, towers, towers)
    assert found.config == {"text_config": {"num_hidden_layers": 5, "layer_types": ["x"] * 5}}
    made = {tensor.name: tensor for tensor in found.tensors}
    assert set(made) >= set(TOWERS)
    assert made["visual.blocks.0.attn.weight"].source == 1
    assert made["language_model.model.layers.4.mlp.weight"].name_in(1) == "language_model.model.layers.3.mlp.weight"
    assert made["visual.merger.0.weight"].source == 0
    assert any("none of the modules" in note and "merger" in note for note in found.notes)


def test_a_module_that_the_models_have_not() -> None:
    recipe = parse(slices=..., modules={"audio_tower": {"models": [{"model": "a"}]}})
    with pytest.raises(RecipeError, match=r"\$\.modules\.audio_tower: is no tower"):
        line_up(recipe, checkpoint(TOWERS, NESTED))


LAYERS = "model.vision_tower.encoder.layers"


@pytest.mark.parametrize(
    ("name", "modules", "tower"),
    [
        ("language_model.model.layers.0.w", ("text_decoder", "vision_tower"), "text_decoder"),
        ("lm_head.weight", ("text_decoder", "vision_tower"), "text_decoder"),
        ("visual.merger.mlp.0.weight", ("vision_tower", "multi_modal_projector"), "multi_modal_projector"),
        ("visual.merger.mlp.0.weight", ("text_decoder", "vision_tower"), None),
        ("model.vision_tower.encoder.layers.1.w", ("encoder", "vision_tower"), "vision_tower"),
        ("vision_tower.encoder.layers.1.w", (LAYERS, "default"), LAYERS),
        ("vision_tower.patch.weight", (LAYERS, "default"), "default"),
        ("decoder.block.0.w", ("encoder", "decoder", "shared"), "decoder"),
        ("shared.weight", ("encoder", "decoder", "shared"), "shared"),
        ("shared.weight", ("encoder", "decoder"), None),
        ("visual.blocks.0.w", ("visual",), "visual"),
    ],
)
def test_towers_are_told_by_names(name: str, modules: tuple[str, ...], tower: str | None) -> None:
    kinds = {"vision", "projector"} if "shared" not in modules else {"encoder", "decoder"}
    assert tower_of(name, modules, kinds) == tower


BEFORE = (
    *("transformer.wpe.weight", "bert.embeddings.LayerNorm.bias", "vit.embeddings.cls_token", "shared.weight"),
    *("vision_tower.ln_pre.weight", "model.rotary_emb.inv_freq", "encoder.conv1.bias"),
)
AFTER = (
    *("model.norm.weight", "transformer.ln_f.bias", "embed_out.weight", "bert.pooler.dense.bias", "output.weight"),
    *("cls.predictions.transform.LayerNorm.weight", "vit.layernorm.weight", "score.weight", "lm_head.layer_norm.bias"),
    *("decoder.bias", "model.final_logits_bias", "proj_out.weight"),
)


@pytest.mark.parametrize(
    ("side", "names"), [("before", BEFORE), ("after", AFTER), (None, ("model.gates", "embed_tokens_per_layer.weight"))]
)
def test_sides_are_told_by_names(side: str | None, names: tuple[str, ...]) -> None:
    assert {name: side_of(name) for name in names} == dict.fromkeys(names, side)


def test_stacks_are_not_every_number_in_a_name() -> None:
    names = [*model(6), "classifier.0.weight", "classifier.2.weight"]
    assert main_stacks(names, {}) == ["model.layers"]


# -- the configuration


def test_what_is_listed_for_layers_follows_them() -> None:
    types = ["sliding_attention", "full_attention"] * 2
    listed = {"num_hidden_layers": 4, "layer_types": types, "mlp_only_layers": [0, 3], "architectures": ["X"] * 4}
    other = listed | {"layer_types": ["linear_attention"] * 4, "mlp_only_layers": [1]}
    found = line_up(parse(*FRANKEN), checkpoint(model(), listed), checkpoint(model(), other))
    assert found.config == {
        "num_hidden_layers": 6,
        "layer_types": [*types[:3], *["linear_attention"] * 3],
        "mlp_only_layers": [0, 3],
    }


def test_lists_are_about_layers_by_name_or_by_length() -> None:
    deep = model(layers=16)
    config = {
        "num_hidden_layers": 16,
        "num_key_value_heads_per_layer": [*range(16, 0, -1)],
        "ffn_multipliers": [1.5] * 16,
        "global_attn_layers": [1, 15],
        "eos_token_id": [*range(16)],
        "sizes": [[1, 1]] * 16,
        "no_rope_layers": [1] * 16,
    }
    recipe = parse(one(source("a", 0, 2)), one(source("a", 14, 16)))
    assert line_up(recipe, checkpoint(deep, config)).config == {
        "num_hidden_layers": 4,
        "num_key_value_heads_per_layer": [16, 15, 2, 1],
        "ffn_multipliers": [1.5] * 4,
        "global_attn_layers": [1, 3],
        "no_rope_layers": [1] * 4,
    }


def test_a_stack_that_changes_nothing_changes_no_configuration() -> None:
    assert line_up(parse(one(source("a", 0, 2)), one(source("a", 2, 4)))).config == {}


def test_settings_that_go_by_a_layers_number_are_noted() -> None:
    config = {"num_hidden_layers": 4, "sliding_window_pattern": 2, "first_k_dense_replace": 0}
    found = line_up(parse(*FRANKEN), *[checkpoint(model(), config)] * 2)
    assert [note for note in found.notes if "sliding_window_pattern" in note and "first_k" not in note]
    nowhere = line_up(parse(*FRANKEN), *[checkpoint(model(), {"model_type": "x"})] * 2)
    assert any("by hand" in note for note in nowhere.notes)


def test_counts_are_found_where_they_belong() -> None:
    whisper = {"encoder_layers": 4, "decoder_layers": 4, "num_hidden_layers": 4}
    assert count_places(whisper, "model.decoder.layers", None, 4) == [("decoder_layers",)]
    assert count_places(whisper, "model.encoder.layers", None, 4) == [("encoder_layers",)]
    assert count_places(NESTED, "visual.blocks", "vision_tower", 3) == [("vision_config", "depth")]


# -- the plan


def test_the_plan_id_knows_slices() -> None:
    ids = {
        plan(parse(*FRANKEN)).id,
        plan(parse(*reversed(FRANKEN))).id,
        plan(parse(one(source("a", 0, 3)), one(source("b", 0, 3)))).id,
        plan(parse(one(source("a", 0, 3)), one(source("b", 1, 3)))).id,
    }
    assert len(ids) == 4
    assert plan(parse(*FRANKEN)).id == plan(parse(*FRANKEN)).id
