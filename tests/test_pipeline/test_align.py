"""Tensors across models, lined up from headers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, TensorMismatchError
from mergepipe.pipeline.align import AlignedTensor, Alignment, align, head_of
from mergepipe.pipeline.recipe import parse_recipe
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry
from mergepipe.storage.dtypes import DTYPES

Header = dict[str, tuple[str, tuple[int, ...]]]

BODY: Header = {
    "model.embed_tokens.weight": ("BF16", (32, 8)),
    "model.layers.0.mlp.weight": ("BF16", (16, 8)),
    "model.norm.weight": ("F32", (8,)),
}
CLASSIFIER: Header = {"classifier.weight": ("F32", (3, 8)), "classifier.bias": ("F32", (3,))}
TASKS: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "parameters": {"weight": 1}}


def checkpoint(header: Header, config: dict[str, Any] | None = None) -> Checkpoint:
    tensors = {
        name: TensorEntry(name, dtype, shape, 0, 0, math.prod(shape) * DTYPES[dtype].itemsize)
        for name, (dtype, shape) in header.items()
    }
    return Checkpoint(Path("/m"), (), tensors, config or {})


def line_up(*headers: Header | Checkpoint, **recipe: Any) -> Alignment:
    """Align a base and models m1, m2, …; without a base if `base_model` is None."""
    given = TASKS | recipe
    first = 1 if given["base_model"] is not None else 0
    given["models"] = recipe.get("models") or [{"model": f"m{index}"} for index in range(first, len(headers))]
    document = {key: value for key, value in given.items() if value is not None}
    checkpoints = [header if isinstance(header, Checkpoint) else checkpoint(header) for header in headers]
    return align(parse_recipe(document, relative_to="/models"), checkpoints)


def problems(*headers: Header | Checkpoint, kind: type[CheckpointError] = TensorMismatchError, **recipe: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        line_up(*headers, **recipe)
    assert type(caught.value) is kind
    return str(caught.value)


def actions(alignment: Alignment) -> dict[str, tuple[str, int]]:
    return {tensor.name: (tensor.action, tensor.source) for tensor in alignment.tensors}


def without(header: Header, name: str) -> Header:
    return {key: value for key, value in header.items() if key != name}


# -- what fits


def test_models_that_agree() -> None:
    found = line_up(BODY, dict(reversed(BODY.items())), BODY)
    assert found.tensors[0] == AlignedTensor("model.embed_tokens.weight", (32, 8), "BF16", "merge", 0, (1, 2), 0)
    assert [tensor.name for tensor in found.tensors] == list(BODY), "in the order of the base"
    assert (found.merged, found.copied, found.left_out) == (3, 0, 0)
    assert (found.side, found.notes) == ({}, ())


def test_without_a_base_the_first_model_lends_shape_and_type() -> None:
    found = line_up(BODY, BODY, merge_method="linear", base_model=None)
    assert found.tensors[2] == AlignedTensor("model.norm.weight", (8,), "F32", "merge", 0, (0, 1), None)


def test_the_base_may_be_one_of_the_models() -> None:
    models = [{"model": "m1"}, {"model": "base"}]
    assert line_up(BODY, BODY, models=models).tensors[0].models == (1,)
    linear = line_up(BODY, BODY, models=models, merge_method="linear").tensors[0]
    assert (linear.models, linear.base) == ((1, 0), None)


def test_models_may_be_stored_in_different_floats() -> None:
    other = BODY | {"model.norm.weight": ("F16", (8,))}
    assert line_up(BODY, other).tensors[2].dtype == "F32"


def test_integers_and_flags_are_copied_from_the_base() -> None:
    more: Header = {"steps": ("I64", ()), "seen": ("BOOL", (4,))}
    found = line_up(BODY | more, BODY | more)
    assert actions(found)["steps"] == actions(found)["seen"] == ("copy", 0)
    assert (found.merged, found.copied) == (3, 2)
    assert found.tensors[3].models == ()


def test_passthrough_copies_its_one_model_unless_scaled() -> None:
    plain = {"merge_method": "passthrough", "parameters": {}}
    assert set(actions(line_up(BODY, BODY, **plain)).values()) == {("copy", 1)}
    scaled = line_up(BODY, BODY, merge_method="passthrough", parameters={"scale": 0.5})
    assert scaled.tensors[0].action == "merge"
    assert scaled.tensors[0].models == (1,)


def test_rules_choose_who_takes_part() -> None:
    rules = [{"match": "norm", "merge_method": "linear"}]
    norm = line_up(BODY, BODY, rules=rules).tensors[2]
    assert (norm.action, norm.models, norm.base) == ("merge", (1,), None)


# -- what does not


def test_a_tensor_that_models_lack_is_an_error() -> None:
    text = problems(BODY, without(BODY, "model.norm.weight"), without(BODY, "model.norm.weight"))
    assert "'model.norm.weight' is missing in '/models/m1', '/models/m2'" in text
    assert "passthrough" in text


def test_a_tensor_that_the_base_lacks_is_an_error() -> None:
    text = problems(without(BODY, "model.norm.weight"), BODY, without(BODY, "model.norm.weight"))
    assert "'model.norm.weight' is in '/models/m1' but not in '/models/base'" in text


def test_other_shapes_are_an_error() -> None:
    text = problems(BODY, BODY | {"model.norm.weight": ("F32", (9,))}, BODY | {"model.norm.weight": ("F32", (7,))})
    assert "is (8,) in '/models/base' but (9,) in '/models/m1', (7,) in '/models/m2'" in text


def test_other_vocabularies_get_their_own_remedy() -> None:
    text = problems(BODY, BODY | {"model.embed_tokens.weight": ("BF16", (33, 8))})
    assert "Remedy: for vocabularies that differ, say `tokenizer_source: union` or `base`." in text
    assert "vocabularies" not in problems(BODY, BODY | {"model.embed_tokens.weight": ("BF16", (32, 9))})


def test_integers_do_not_merge_with_floats() -> None:
    text = problems(BODY, BODY | {"model.norm.weight": ("I8", (8,))})
    assert "'model.norm.weight' is F32 in '/models/base' but I8 in '/models/m1'" in text
    assert "quantised" in text


def test_a_tensor_may_be_wrong_in_two_ways() -> None:
    text = problems(BODY, BODY | {"model.norm.weight": ("F32", (9,))}, without(BODY, "model.norm.weight"))
    assert "'model.norm.weight' is missing in '/models/m2'" in text
    assert "(9,) in '/models/m1'" in text


def test_all_problems_come_at_once_and_not_endlessly() -> None:
    more: Header = {f"model.layers.{index}.w": ("F32", (2,)) for index in range(30)}
    text = problems(BODY | more, BODY | {"model.norm.weight": ("F32", (9,))})
    assert "'model.norm.weight' is (8,)" in text
    assert "and 11 more" in text
    assert text.count("is missing in") == 19


def test_a_model_of_another_architecture_is_one_problem() -> None:
    text = problems(BODY, {"x.weight": ("F32", (2,))}, without(BODY, "model.norm.weight"))
    assert "'/models/m1' has no tensor in common with '/models/base'" in text
    assert "x.weight" not in text
    assert "'model.norm.weight' is missing in '/models/m2'" in text


def test_a_rule_passes_a_tensor_through() -> None:
    rules = [{"match": "norm|extra", "merge_method": "passthrough"}]
    other = BODY | {"model.norm.weight": ("F32", (9,)), "extra": ("F32", (1,))}
    found = line_up(BODY, other, rules=rules)
    assert actions(found)["model.norm.weight"] == ("copy", 0)
    assert "extra" not in actions(found)
    assert found.left_out == 1
    assert "extra" in found.notes[0]
    assert actions(line_up(BODY, without(BODY, "model.norm.weight"), rules=rules))["model.norm.weight"] == ("copy", 0)


def test_a_rule_may_scale_what_it_passes_through() -> None:
    rules = [{"match": "norm", "merge_method": "passthrough", "parameters": {"scale": 2}}]
    norm = line_up(BODY, BODY, rules=rules).tensors[2]
    assert (norm.action, norm.models, norm.base) == ("merge", (0,), None)


# -- quantised checkpoints


def test_codes_of_eight_bits_are_refused() -> None:
    eight: Header = BODY | {"model.norm.weight": ("F8_E4M3", (8,))}
    assert "can't be averaged" in problems(eight, eight, kind=CheckpointError)
    assert "can't be averaged" in problems(BODY, eight, kind=CheckpointError)


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.mlp.qweight": ("I32", (2, 8))},
        {"model.layers.0.mlp.weight_scale_inv": ("F32", (1, 1))},
        {"model.layers.0.mlp.SCB": ("F32", (16,))},
        {"a.weight": ("U32", (2, 2)), "a.scales": ("F16", (2,))},
        {"model.layers.0.mlp.up_proj.weight": ("I8", (16, 8))},
        {"model.layers.0.mlp.up_proj.weight": ("U8", (16, 8))},
    ],
)
def test_quantised_weights_are_refused_as_a_whole(more: Header) -> None:
    text = problems(BODY, BODY | more, kind=CheckpointError)
    assert "'/models/m1'" in text
    assert "dequantise" in text
    assert "missing" not in text


def test_a_quantised_configuration_is_refused() -> None:
    config = {"quantization_config": {"quant_method": "gptq"}}
    text = problems(checkpoint(BODY, config), checkpoint(BODY, config), kind=CheckpointError)
    assert "(gptq)" in text
    assert "'/models/base'" in text
    assert "'/models/m1'" in text


def test_scales_of_floats_are_ordinary_tensors() -> None:
    more: Header = {"norm.weight": ("F32", (2,)), "norm.scales": ("F32", (2,))}
    assert line_up(BODY | more, BODY | more).merged == 5


# -- heads

FOUR: Header = {"classifier.weight": ("F32", (4, 8)), "classifier.bias": ("F32", (4,))}


def test_heads_that_differ_are_an_error_that_names_the_key() -> None:
    assert "`heads: base`" in problems(BODY | CLASSIFIER, BODY | FOUR)
    assert "`heads: base`" in problems(BODY | CLASSIFIER, BODY)
    assert "`heads: base`" not in problems(BODY, without(BODY, "model.norm.weight"))


def test_heads_of_the_base() -> None:
    found = line_up(BODY | CLASSIFIER, BODY | FOUR, BODY, heads="base")
    assert actions(found)["classifier.weight"] == ("copy", 0)
    assert found.tensors[-1].shape == (3,)
    assert found.side == {}
    assert any("classifier" in note for note in found.notes)
    none = line_up(BODY, BODY | FOUR, heads="base")
    assert set(actions(none)) == set(BODY)
    assert none.left_out == 2


def test_separate_heads() -> None:
    found = line_up(BODY | CLASSIFIER, BODY | FOUR, BODY | CLASSIFIER, BODY, heads="separate")
    assert actions(found)["classifier.bias"] == ("copy", 0)
    assert found.side == {1: tuple(FOUR), 2: tuple(CLASSIFIER)}
    assert found.left_out == 0
    none = line_up(BODY, BODY | FOUR, heads="separate")
    assert set(actions(none)) == set(BODY)
    assert none.side == {1: tuple(FOUR)}


def test_separate_heads_without_a_base() -> None:
    found = line_up(BODY | CLASSIFIER, BODY | FOUR, heads="separate", merge_method="linear", base_model=None)
    assert actions(found)["classifier.bias"] == ("copy", 0)
    assert found.side == {0: tuple(CLASSIFIER), 1: tuple(FOUR)}


def test_the_head_of_one_model() -> None:
    found = line_up(BODY | CLASSIFIER, BODY | FOUR, heads="model:m1")
    assert actions(found)["classifier.weight"] == ("copy", 1)
    assert found.tensors[-1].shape == (4,)
    only = line_up(BODY, BODY | FOUR, BODY, heads="model:m1")
    assert [tensor.name for tensor in only.tensors] == [*BODY, *FOUR]
    none = line_up(BODY | CLASSIFIER, BODY | FOUR, BODY, heads="model:m2")
    assert set(actions(none)) == set(BODY)
    assert none.left_out == 2


def test_heads_that_agree_are_merged() -> None:
    for heads in (None, "base", "separate", "model:m1"):
        found = line_up(BODY | CLASSIFIER, BODY | CLASSIFIER, heads=heads)
        assert (found.merged, found.side) == (5, {})


def test_a_head_stays_whole() -> None:
    dense: Header = {"classifier.dense.weight": ("F32", (8, 8))}
    found = line_up(BODY | dense | CLASSIFIER, BODY | dense | FOUR, heads="separate")
    assert actions(found)["classifier.dense.weight"] == ("copy", 0)
    assert found.side == {1: (*dense, *FOUR)}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("lm_head.weight", "lm_head"),
        ("bert.qa_outputs.bias", "bert.qa_outputs"),
        ("classifier.0.weight", "classifier"),
        ("model.layers.3.score.weight", None),
        ("embeddings.cls_token", None),
    ],
)
def test_which_names_are_heads(name: str, head: str | None) -> None:
    assert head_of(name) == head


# -- tied embeddings and buffers

HEAD: Header = {"lm_head.weight": ("BF16", (32, 8))}


def test_a_stored_twin_of_a_tied_embedding_is_left_out() -> None:
    tied = {"tie_word_embeddings": True}
    for base, model in (({}, tied), (tied, {}), (tied, tied), ({"text_config": tied}, {})):
        found = line_up(checkpoint(BODY, base), checkpoint(BODY | HEAD, model))
        assert set(actions(found)) == set(BODY)
        assert found.left_out == 1
        assert "lm_head.weight" in found.notes[0]
    stored = line_up(checkpoint(BODY | HEAD, tied), checkpoint(BODY, tied))
    assert set(actions(stored)) == set(BODY)


def test_a_head_of_its_own_is_never_left_out() -> None:
    tied, untied = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
    for base, model in (({}, {}), (untied, {}), (untied, tied), (tied, untied), ({}, untied)):
        assert "lm_head" in problems(checkpoint(BODY, base), checkpoint(BODY | HEAD, model))
    assert "lm_head" in problems(checkpoint(BODY | HEAD, {}), checkpoint(BODY, tied))
    assert "lm_head.weight" in actions(line_up(checkpoint(BODY | HEAD, tied), checkpoint(BODY | HEAD, tied)))


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,)),
        ("model.rotary_emb.inv_freq", "F32", (4,)),
        ("h.0.attn.masked_bias", "F32", ()),
        ("h.0.attn.bias", "U8", (1, 1, 8, 8)),
        ("h.0.attn.bias", "F32", (1, 1, 8, 8)),
        ("gpt_neox.layers.0.attention.bias", "BOOL", (1, 1, 8, 8)),
    ],
)
def test_buffers_are_left_out_wherever_they_are(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    buffer: Header = {name: (dtype, shape)}
    for headers in ((BODY | buffer, BODY), (BODY, BODY | buffer), (BODY | buffer, BODY | buffer)):
        found = line_up(*headers)
        assert set(actions(found)) == set(BODY)
        assert found.left_out == 1
        assert name in found.notes[0]


def test_a_bias_of_attention_is_no_buffer() -> None:
    bias: Header = {"h.0.attn.bias": ("F32", (8,))}
    assert line_up(BODY | bias, BODY | bias).merged == 4


def test_position_ids_are_copied_or_left_out() -> None:
    positions: Header = {"embeddings.position_ids": ("I64", (1, 8))}
    assert actions(line_up(BODY | positions, BODY))["embeddings.position_ids"] == ("copy", 0)
    assert line_up(BODY | positions, BODY).notes != ()
    assert line_up(BODY | positions, BODY | positions).notes == ()
    assert line_up(BODY, BODY | positions).left_out == 1


# -- properties

entries = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=2).map(tuple))
headers = st.dictionaries(
    st.sampled_from(["a", "b.weight", "layers.0.w", "classifier.weight", "lm_head.weight", "x.position_ids"]),
    entries,
    max_size=6,
)


@given(st.lists(headers, min_size=2, max_size=4), st.sampled_from([None, "base", "separate", "model:m1"]))
def test_every_name_is_placed_or_a_problem(found: list[Header], heads: str | None) -> None:
    try:
        alignment = line_up(*found, heads=heads)
    except CheckpointError as error:
        assert "Remedy" in str(error)  # noqa: PT017
        return
    names = {name for header in found for name in header}
    placed = {tensor.name for tensor in alignment.tensors}
    side = {name for kept in alignment.side.values() for name in kept}
    assert len(placed) == len(alignment.tensors)
    assert len(names - placed - side) == alignment.left_out
    for tensor in alignment.tensors:
        assert found[tensor.source][tensor.name] == (tensor.dtype, tensor.shape)
        if tensor.action == "merge":
            assert all(found[index][tensor.name][1] == tensor.shape for index in tensor.models)
            assert all(DTYPES[found[index][tensor.name][0]].role == "merged" for index in (0, *tensor.models))


def test_one_checkpoint_per_source() -> None:
    recipe = parse_recipe(TASKS | {"models": [{"model": "m1"}]})
    with pytest.raises(ValueError, match="2 checkpoints"):
        align(recipe, [checkpoint(BODY)])
