"""Recipes: what is read, what is refused and in which words, and what they ask for each tensor."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError, UsageError
from mergepipe.pipeline.document import MAX_BYTES, apply_overrides, read_document
from mergepipe.pipeline.recipe import Recipe, load_recipe, parse_recipe, settings
from mergepipe.pipeline.values import Filtered, FilterEntry, Gradient
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.registry import SPARSIFIERS

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 0.5, "density": 0.2},
}
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1},
}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "base",
    "models": [{"model": "base"}, {"model": "b"}],
    "parameters": {"t": [0, 0.5, 1]},
}
LAYER = "model.layers.{}.mlp.up_proj.weight"


def parse(recipe: dict[str, Any] | str, **more: Any) -> Recipe:
    if isinstance(recipe, dict):
        recipe = {key: value for key, value in (recipe | more).items() if value is not ...}
    return parse_recipe(recipe, relative_to="/models")


def faults(recipe: dict[str, Any] | str, **more: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        parse(recipe, **more)
    assert caught.value.exit_code == 3
    return {fault.path: fault.message for fault in caught.value.faults}


# -- what is read


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer_source": "./b"}, "model:/models/b"),
        ({"tokenizer_source": "model:b"}, "model:/models/b"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer": {"source": {"model": "b"}}}, "model:/models/b"),
        (
            {"tokenizer": {"source": "base", "pad_to_multiple_of": 8, "tokens": {
                "x": {"source": "b"}, "y": {"source": {"kind": "zero"}, "force": True},
                "z": {"source": {"kind": "model_token", "model": "b", "token_id": 3}}}}},
            "base",
        ),
    ],
)  # fmt: skip
def test_tokenizers(given: dict[str, Any], source: str) -> None:
    """Both keys, mergekit's way of naming a model and ours; the recipe says the same again as it is written down."""
    recipe = parse(LINEAR, **given)
    assert recipe.tokenizer is not None
    assert recipe.tokenizer.source == source
    assert parse_recipe(recipe.to_dict()) == recipe


def test_a_full_recipe() -> None:
    recipe = parse(
        """
        merge_method: ties
        base_model: ./llama-base
        models:
          - model: ./expert-math
            parameters: {weight: 0.6}
          - model: /elsewhere/expert-code
        parameters:
          lambda: 1.0
          normalize: true
          weight:
            - filter: mlp
              value: [0.2, 0.8]
            - value: 0.5
        sparsify: tadrop
        scope: tensor
        rules:
          - match: "embed_tokens|lm_head"
            merge_method: linear
        dtype: bfloat16
        tokenizer_source: base
        chat_template: auto
        seed: 42
        heads: base
        output: ./merged
        """
    )
    assert recipe.merge_method == "ties"
    assert recipe.base_model == "/models/llama-base"
    assert [spec.model for spec in recipe.models] == ["/models/expert-math", "/elsewhere/expert-code"]
    assert recipe.models[0].parameters == {"weight": 0.6}
    assert recipe.parameters["weight"] == Filtered((FilterEntry("mlp", Gradient((0.2, 0.8))), FilterEntry(None, 0.5)))
    assert recipe.sparsify is not None
    assert recipe.sparsify.method == "tadrop"
    assert recipe.rules[0].merge_method == "linear"
    assert (recipe.output_dtype, recipe.seed, recipe.heads, recipe.output) == ("bfloat16", 42, "base", "/models/merged")
    assert recipe.sources == ("/models/llama-base", "/models/expert-math", "/elsewhere/expert-code")
    assert recipe.notes == ()


@pytest.mark.parametrize("document", [TIES, LINEAR, SLERP])
def test_a_recipe_comes_back_from_its_plain_values(document: dict[str, Any]) -> None:
    recipe = parse(document, rules=[{"match": "norm", "merge_method": "passthrough"}], name="x", seed=3)
    again = parse_recipe(recipe.to_dict())
    assert again == recipe
    assert again.to_dict() == recipe.to_dict()
    assert parse_recipe(yaml.safe_dump(recipe.to_dict())) == recipe


def test_paths_start_from_the_given_folder_or_the_current_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(LINEAR))
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert load_recipe(tmp_path / "recipe.yaml").models[0].model == str(tmp_path / "sub" / "a")
    assert load_recipe(tmp_path / "recipe.yaml", relative_to=tmp_path).models[0].model == str(tmp_path / "a")


def test_what_mergekit_declares_and_does_nothing_here_is_noted_once() -> None:
    models = [{"model": "a", "parameters": {"int8_mask": True}}, {"model": "b"}]
    recipe = parse(TIES, models=models, parameters={"weight": 1, "density": 1, "int8_mask": True})
    assert [note for note in recipe.notes if "int8_mask" in note] == list(recipe.notes)
    assert len(recipe.notes) == 1
    assert "int8_mask" not in str(recipe.to_dict())


def test_a_mapping_may_stand_for_a_model() -> None:
    recipe = parse(LINEAR, models=[{"model": {"model": {"path": "a"}, "override_architecture": "X"}}, {"model": "b"}])
    assert recipe.models[0].model == "/models/a"
    assert "override_architecture" in recipe.notes[0]
    found = faults(LINEAR, models=[{"model": {"model": {"path": "a", "revision": "v2"}, "lora": "x"}}, {"model": "b"}])
    assert set(found) == {"$.models[0].model.model.revision"}
    both = {"model": {"path": "o/a", "revision": "v2"}, "lora": "x"}
    recipe = parse(LINEAR, models=[{"model": both}, {"model": "b"}])
    assert recipe.models[0].model == "o/a@v2+/models/x"


def test_numbers_in_exponent_form_and_dates() -> None:
    recipe = parse("merge_method: linear\nname: 2024-01-01\nmodels: [{model: a}]\nparameters: {weight: 1e-3}")
    assert recipe.parameters["weight"] == 1e-3
    assert recipe.name == "2024-01-01"


# -- what is refused


def test_all_faults_come_at_once_with_their_paths() -> None:
    found = faults(
        TIES,
        models=[{"model": "a"}, {"model": "b", "parameters": {"densty": 0.5, "weight": "much"}}],
        parameters={"weight": [1, "x"], "density": [{"filter": "mlp", "value": 1.5}, {"value": 0.5}], "lamda": 1},
        out_dtyp="float32",
        dtype="fp8",
        seed=-1,
    )
    assert set(found) == {
        "$.models[1].parameters.densty",
        "$.models[1].parameters.weight",
        "$.parameters.weight[1]",
        "$.parameters.density[0].value",
        "$.parameters.lamda",
        "$.out_dtyp",
        "$.dtype",
        "$.seed",
    }
    assert "'density'" in found["$.models[1].parameters.densty"]
    assert "'lambda'" in found["$.parameters.lamda"]
    assert "'out_dtype'" in found["$.out_dtyp"]
    assert "1.5" in found["$.parameters.density[0].value"]


@pytest.mark.parametrize("key", ["outputs"])
def test_what_this_version_does_not_merge_is_named(key: str) -> None:
    assert "this version" in faults(LINEAR, **{key: []})[f"$.{key}"]


def test_a_slice_without_sources_is_one_fault() -> None:
    assert set(faults({"merge_method": "linear", "slices": [{"sources": []}]})) == {"$.slices[0].sources"}


@pytest.mark.parametrize(
    ("more", "path", "words"),
    [
        ({"merge_method": "tiess"}, "$.merge_method", "'ties'"),
        ({"merge_method": ...}, "$.merge_method", "missing"),
        ({"merge_method": ["ties"]}, "$.merge_method", "no method"),
        ({"models": ...}, "$.models", "missing"),
        ({"models": []}, "$.models", "empty"),
        ({"models": "a"}, "$.models", "list"),
        ({"models": ["a"]}, "$.models[0]", "mapping"),
        ({"models": [{"model": 3}]}, "$.models[0].model", "text"),
        ({"models": [{"model": "a\x00b"}]}, "$.models[0].model", "control"),
        ({"models": [{"model": {"path": "a+x", "lora": "y"}}]}, "$.models[0].model.lora", "one adapter"),
        ({"models": [{"model": "a"}, {"model": "./a/"}]}, "$.models[1].model", "already"),
        ({"base_model": ...}, "$.base_model", "missing"),
        ({"parameters": 3}, "$.parameters", "mapping"),
        ({"parameters": {"weight": []}}, "$.parameters.weight", "empty"),
        ({"parameters": {"weight": None}}, "$.parameters.weight", "number"),
        ({"parameters": {"weight": [1, None]}}, "$.parameters.weight[1]", "number"),
        ({"parameters": {"weight": [{"value": 1}, 2]}}, "$.parameters.weight[1]", "value"),
        ({"parameters": {"weight": [{"filter": "a"}]}}, "$.parameters.weight[0]", "value"),
        ({"parameters": {"weight": [{"filter": 1, "value": 1}]}}, "$.parameters.weight[0].filter", "part"),
        ({"parameters": {"weight": [{"fliter": "a", "value": 1}]}}, "$.parameters.weight[0].fliter", "'filter'"),
        ({"parameters": {"weight": [[1]]}}, "$.parameters.weight[0]", "number"),
        ({"parameters": {"weight": 10**400}}, "$.parameters.weight", "large"),
        ({"parameters": {"weight": float("nan")}}, "$.parameters.weight", "nan"),
        ({"parameters": {"weight": 1, "normalize": "yes"}}, "$.parameters.normalize", "true or false"),
        ({"parameters": {"density": 1}}, "$.parameters.weight", "missing"),
        ({"scope": "layer"}, "$.scope", "model"),
        ({"tokenizer_source": 3}, "$.tokenizer_source", "model:<path>"),
        ({"tokenizer_source": "base", "tokenizer": {}}, "$.tokenizer_source", "one of the two"),
        ({"tokenizer": "union"}, "$.tokenizer", "mapping"),
        ({"tokenizer": {"sauce": "base"}}, "$.tokenizer.sauce", "'source'"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "$.tokenizer.pad_to_multiple_of", "whole number"),
        ({"tokenizer": {"tokens": ["a"]}}, "$.tokenizer.tokens", "mapping"),
        ({"tokenizer": {"tokens": {3: {"source": "a"}}}}, "$.tokenizer.tokens[3]", "quotes"),
        ({"tokenizer": {"tokens": {"x": {"force": True}}}}, "$.tokenizer.tokens['x']", "source"),
        ({"tokenizer": {"tokens": {"x": {"source": "a", "force": 1}}}}, "$.tokenizer.tokens['x'].force", "true"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "one"}}}}}, "$.tokenizer.tokens['x'].source.kind", "zero"),
        (
            {"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}},
            "$.tokenizer.tokens['x'].source",
            "one of `token`",
        ),
        ({"chat_template": "chatlm"}, "$.chat_template", "'chatml'"),
        ({"heads": "mine"}, "$.heads", "separate"),
        ({"heads": "model:c"}, "$.heads", "none of the models"),
        ({"output": 3}, "$.output", "text"),
        ({"seed": True}, "$.seed", "whole number"),
        ({"dtype": "bf16"}, "$.dtype", "bfloat16"),
        ({"dtype": "int64"}, "$.dtype", "float"),
        ({"rules": [{"match": "("}]}, "$.rules[0].match", "regular expression"),
        ({"rules": [{"match": "^(([a-z.0-9_])+)+!$"}]}, "$.rules[0].match", "may take for ever"),
        ({"rules": [{"merge_method": "linear"}]}, "$.rules[0].match", "regular expression"),
        ({"rules": [{"match": "x", "merge_method": "slirp"}]}, "$.rules[0].merge_method", "'slerp'"),
        ({"rules": [{"match": "x", "parameters": {"t": 1}}]}, "$.rules[0].parameters.t", "no parameter of ties"),
        ({"rules": [{"match": "x", "merge_method": "slerp"}]}, "$.rules[0].parameters.t", "missing"),
        ({"rules": [{"match": "x", "sparsify": "tadorp"}]}, "$.rules[0].sparsify", "'tadrop'"),
        ({"rules": ["x"]}, "$.rules[0]", "mapping"),
        ({"sparsify": {"method": "tadrop", "metrc": 1}, "parameters": {"weight": 1}}, "$.sparsify.metrc", "'metric'"),
        ({"sparsify": {"metric": "l1l2"}}, "$.sparsify.method", "no sparsifier"),
        ({"sparsify": {"method": "tadrop", "metric": "l3"}, "parameters": {"weight": 1}}, "$.sparsify.metric", "l1l2"),
    ],
)
def test_each_fault_has_its_path_and_its_words(more: dict[str, Any], path: str, words: str) -> None:
    found = faults(TIES, **more)
    assert path in found
    assert words in found[path]


def test_keys_that_are_no_words() -> None:
    assert "$.5" in faults(LINEAR | {5: 1})  # type: ignore[operator, dict-item]


def test_a_setting_of_the_merge_is_refused_at_a_model() -> None:
    found = faults(TIES, models=[{"model": "a", "parameters": {"lambda": 1}}, {"model": "b"}])
    assert found == {"$.models[0].parameters.lambda": "is a setting of the whole merge: move it to $.parameters"}


def test_a_required_parameter_may_be_missing_at_one_model() -> None:
    models = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
    assert set(faults(TIES, models=models, parameters={})) == {"$.models[1].parameters.weight"}


def test_the_number_of_models() -> None:
    found = faults(SLERP, models=[{"model": "a"}, {"model": "b"}])
    assert found == {"$.models": "slerp takes exactly 1 model, the base not counted; found 2"}
    assert "exactly 1 model; found 2" in faults(LINEAR, merge_method="passthrough", parameters={})["$.models"]
    rule = {"match": "x", "merge_method": "slerp", "parameters": {"t": 1}}
    assert set(faults(TIES, rules=[rule])) == {"$.rules[0].merge_method"}


def test_faults_are_not_endless() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(LINEAR, parameters={"weight": ["x" * 10_000] * 1000})
    assert len(caught.value.faults) == 51
    assert "950 more" in str(caught.value)
    assert len(str(caught.value)) < 51 * 500


# -- sparsify and density


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
@pytest.mark.parametrize("place", ["global", "model"])
def test_a_density_without_effect_is_an_error(method: str, place: str) -> None:
    density = {"density": 0.3}
    models = [{"model": "a", "parameters": density if place == "model" else {}}, {"model": "b"}]
    parameters = {"weight": 1} | (density if place == "global" else {})
    found = faults(TIES, merge_method=method, models=models, parameters=parameters, sparsify="tadrop")
    path = "$.parameters.density" if place == "global" else "$.models[0].parameters.density"
    assert set(found) == {path}
    assert "tadrop" in found[path]


def test_a_density_may_be_the_sparsifiers() -> None:
    models = [{"model": "a", "parameters": {"density": 0.3}}, {"model": "b"}]
    recipe = parse(TIES, merge_method="task_arithmetic", models=models, sparsify="magnitude")
    found = settings(recipe, "w", 0)
    assert found.sparsify == "magnitude"
    assert [params["density"] for params in found.sparsify_params] == [0.3, 0.2]
    assert recipe.notes == ()
    twice = {"method": "magnitude", "density": 0.3}
    assert set(faults(TIES, sparsify=twice)) == {"$.parameters.density"}
    assert settings(parse(TIES, sparsify=twice, parameters={"weight": 1}), "w", 0).sparsify_params[0]["density"] == 0.3


def test_a_sparsifier_that_needs_a_parameter_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = Parameter("density", "number", "kept fraction", minimum=0, maximum=1)
    row = dataclasses.replace(SPARSIFIERS["magnitude"], parameters=(needed,))
    monkeypatch.setitem(SPARSIFIERS, "magnitude", row)
    assert set(faults(TIES, sparsify="magnitude", parameters={"weight": 1})) == {"$.sparsify.density"}
    assert parse(TIES, sparsify="magnitude").sparsify is not None
    assert parse(TIES, sparsify={"method": "magnitude", "density": 1}, parameters={"weight": 1}).sparsify is not None


def test_other_parameters_of_a_replaced_trim_are_errors_too() -> None:
    assert set(faults(TIES, sparsify="none", parameters={"weight": 1, "tie_rule": "index"})) == {
        "$.parameters.tie_rule"
    }
    assert parse(TIES, sparsify="none", parameters={"weight": 1, "normalize": False}).notes == ()


def test_a_trim_replaced_in_a_rule_only() -> None:
    rules = [{"match": "norm", "sparsify": "none"}]
    assert settings(parse(TIES, rules=rules), "w", 0).sparsify_params[0]["density"] == 0.2
    rules = [{"match": "norm", "sparsify": "none", "parameters": {"density": 1}}]
    assert set(faults(TIES, rules=rules)) == {"$.rules[0].parameters.density"}


def test_a_list_of_patterns_is_one_value() -> None:
    sparsify = {"method": "tadrop", "exclude": ["norm", "bias$"]}
    recipe = parse(TIES, sparsify=sparsify, parameters={"weight": 1})
    assert settings(recipe, "w", 0).sparsify_params[0]["exclude"] == ("norm", "bias$")
    assert parse_recipe(recipe.to_dict()) == recipe
    found = faults(TIES, sparsify={"method": "tadrop", "exclude": ["("]}, parameters={"weight": 1})
    assert set(found) == {"$.sparsify.exclude[0]"}


def test_sparsify_needs_task_vectors() -> None:
    assert "task vector" in faults(LINEAR, sparsify="tadrop")["$.sparsify"]
    assert (
        "task vector"
        in faults(TIES, rules=[{"match": "x", "merge_method": "linear", "sparsify": "tadrop"}])["$.rules[0].sparsify"]
    )


def test_the_methods_own_trim_takes_its_parameters() -> None:
    found = settings(parse(TIES), "w", 0)
    assert found.sparsify == "magnitude"
    assert [params["density"] for params in found.sparsify_params] == [0.2, 0.2]
    none = settings(parse(TIES, sparsify="none", parameters={"weight": 1}), "w", 0)
    assert (none.sparsify, none.sparsify_params) == ("none", ())


def test_values_of_a_sparsifier_may_differ_by_tensor() -> None:
    sparsify = {"method": "tadrop", "metric": [{"filter": "mlp", "value": "l1l2"}, {"value": "quantile_ratio"}]}
    recipe = parse(TIES, sparsify=sparsify, parameters={"weight": 1})
    assert settings(recipe, LAYER.format(0), 2).sparsify_params[0]["metric"] == "l1l2"
    assert settings(recipe, "lm_head.weight", 0).sparsify_params[1]["metric"] == "quantile_ratio"


# -- the base among the models


@pytest.mark.parametrize("document", [TIES, SLERP])
def test_the_base_is_no_expert(document: dict[str, Any]) -> None:
    recipe = parse(document, models=[{"model": "./base"}, {"model": "b"}])
    assert [spec.model for spec in recipe.experts] == ["/models/b"]
    assert recipe.sources == ("/models/base", "/models/b")
    found = faults(document, models=[{"model": "base", "parameters": {"weight": 1}}, {"model": "b"}])
    assert any(path.startswith("$.models[0].parameters") for path in found)


def test_the_base_is_a_model_where_no_deltas_are_taken() -> None:
    models = [{"model": "a"}, {"model": "base", "parameters": {"weight": 2}}]
    recipe = parse(LINEAR, base_model="base", models=models)
    assert [spec.model for spec in recipe.experts] == ["/models/a", "/models/base"]
    assert recipe.sources == ("/models/base", "/models/a")


def test_a_link_to_the_base_is_the_base(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    os.symlink(tmp_path / "base", tmp_path / "same")
    models = [{"model": "same"}, {"model": "b"}]
    recipe = parse_recipe(TIES | {"models": models}, relative_to=tmp_path)
    assert [spec.model for spec in recipe.experts] == [str(tmp_path / "b")]


def test_a_folder_with_a_plus_in_its_name_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "a+b").mkdir()
    recipe = parse_recipe(LINEAR | {"models": [{"model": "a+b"}]}, relative_to=tmp_path)
    assert recipe.models[0].model == str(tmp_path / "a+b")


# -- settings of a tensor


def test_a_value_comes_from_the_rule_the_model_the_recipe_or_the_default() -> None:
    recipe = parse(
        TIES,
        models=[{"model": "a", "parameters": {"weight": [{"filter": "mlp", "value": 0.7}]}}, {"model": "b"}],
        rules=[{"match": "layers\\.1\\.", "parameters": {"weight": 0.1, "lambda": 2}}, {"match": "layers"}],
    )
    outside = settings(recipe, "model.norm.weight", 0)
    assert [params["weight"] for params in outside.model_params] == [0.5, 0.5], "no filter matches: the next scope"
    assert outside.params["lambda"] == 1.0
    assert outside.params["normalize"] is True
    assert [p["weight"] for p in settings(recipe, LAYER.format(0), 2).model_params] == [0.7, 0.5]
    ruled = settings(recipe, LAYER.format(1), 2)
    assert [p["weight"] for p in ruled.model_params] == [0.1, 0.1]
    assert ruled.params["lambda"] == 2.0


def test_a_gradient_runs_over_the_layers() -> None:
    recipe = parse(SLERP)
    assert [settings(recipe, LAYER.format(i), 5).params["t"] for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert settings(recipe, "lm_head.weight", 0).params["t"] == 0.0


def test_the_first_rule_wins_and_may_change_the_method() -> None:
    recipe = parse(
        TIES,
        models=[{"model": "base"}, {"model": "a"}, {"model": "b"}],
        sparsify="tadrop",
        parameters={"weight": 1},
        rules=[
            {"match": "^lm_head", "merge_method": "passthrough"},
            {"match": "head|embed", "merge_method": "linear"},
            {"match": "norm", "sparsify": "none"},
        ],
    )
    assert settings(recipe, "lm_head.weight", 0).method == "passthrough"
    assert [spec.model for spec in recipe.experts_for("lm_head.weight")] == ["/models/base"]
    embed = settings(recipe, "embed.weight", 0)
    assert (embed.method, embed.sparsify, len(embed.model_params)) == ("linear", "none", 2)
    norm = settings(recipe, "norm.weight", 0)
    assert (norm.method, norm.sparsify) == ("ties", "none")
    assert settings(recipe, "w", 0).sparsify == "tadrop"


def test_a_value_that_no_filter_gives_is_an_error_with_the_tensor() -> None:
    recipe = parse(LINEAR, parameters={"weight": [{"filter": "mlp", "value": 1}]})
    with pytest.raises(RecipeError, match=r"weight.*'lm_head.weight'.*without a filter"):
        settings(recipe, "lm_head.weight", 0)


# -- overrides


def test_overrides_reach_everywhere_and_leave_the_document_alone(tmp_path: Path) -> None:
    before = yaml.safe_dump(TIES)
    overrides = [
        "parameters.lambda=0.5",
        "models[0].parameters.weight=[0.1, 0.9]",
        "$.sparsify={method: tadrop, metric: l1l2}",
        "parameters.density=",
        "out_dtype=float16",
    ]
    changed = apply_overrides(TIES, overrides)
    assert changed["parameters"]["lambda"] == 0.5
    assert changed["models"][0] == {"model": "a", "parameters": {"weight": [0.1, 0.9]}}
    assert changed["sparsify"] == {"method": "tadrop", "metric": "l1l2"}
    assert yaml.safe_dump(TIES) == before
    (tmp_path / "r.yaml").write_text(before)
    assert load_recipe(tmp_path / "r.yaml", ["parameters.lambda=0.25"]).parameters["lambda"] == 0.25


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("parameters.lambda", "key=value"),
        ("models[7].model=a", "2 entries"),
        ("models.model=a", "expected a mapping"),
        ("parameters[0]=a", "expected a list"),
        ("merge_method.x=1", "expected a mapping"),
        ("=3", "no path"),
        ("a..b=3", "no path"),
        ("seed=[1", "not valid YAML"),
        ("seed=!!python/name:os.system", "tag"),
    ],
)
def test_an_override_that_does_not_fit(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=r"^--set ") as caught:
        apply_overrides(TIES, [override])
    assert words in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_override_is_checked_like_the_recipe() -> None:
    with pytest.raises(RecipeError, match="'lambda'"):
        parse(apply_overrides(TIES, ["parameters.lamda=1"]))


# -- texts that nobody vouches for


def billion_laughs() -> str:
    lines, previous = ["a: &a [x, x, x, x, x, x, x, x, x]"], "a"
    for word in "bcdefghij":
        lines.append(f"{word}: &{word} [{', '.join([f'*{previous}'] * 9)}]")
        previous = word
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("# nothing", "empty"),
        ("- a", "list"),
        ("just words", "just words"),
        ("a: [1", "not valid YAML"),
        ("a: !!python/object/apply:os.system [ls]", "tag"),
        ("a: !env HOME", "tag"),
        ("a: 1\na: 2", "twice, on lines 1 and 2"),
        ("a: {b: 1, b: 2}", "$.a.b"),
        ("a: 1\n---\na: 2", "second document"),
        ("&a [*a]", "inside what it refers to"),
        ("a: *b", "not valid YAML"),
        (billion_laughs(), "more than a recipe may hold"),
        ("a: &a 1\nb: [" + "*a, " * 300 + "]", "more than a recipe may hold"),
        ("[" * 100_000, "more than a recipe may hold"),
        ("{a: " * 10_000, "more than a recipe may hold"),
        ("a: " + "9" * 10_000, "can't be read"),
        ("1: 2", "keys are words"),
        ("? [a]\n: 1", "keys are words"),
        ("a: \x07", "not valid YAML"),
        ("a: \ud800", "can't be read"),
        ("x" * (MAX_BYTES + 1), "longer than"),
    ],
)
def test_hostile_texts_are_refused(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_document(text, "recipe")
    assert words in str(caught.value)


@given(st.text(max_size=60))
def test_any_text_is_a_mapping_or_a_recipe_error(text: str) -> None:
    try:
        parse_recipe(text)
    except RecipeError as error:
        assert error.faults  # noqa: PT017


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from([*TIES, "sparsify", "rules", "heads", "dtype", "seed", "output", "name", "scope"]), plain)
def test_any_value_anywhere_is_a_recipe_or_a_recipe_error(key: str, value: Any) -> None:
    try:
        parse(TIES, **{key: value})
    except RecipeError as error:
        assert error.faults  # noqa: PT017


def test_aliases_and_merge_keys_work_as_in_yaml() -> None:
    document = read_document("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a", "recipe")
    assert document == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="mergepipe init"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="no regular file"):
        load_recipe(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RecipeError, match="no regular file"):
        load_recipe(tmp_path / "fifo")
    (tmp_path / "long").write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="longer than"):
        load_recipe(tmp_path / "long")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="UTF-8"):
        load_recipe(tmp_path / "binary")
    with pytest.raises(RecipeError, match="can't be read"):
        load_recipe("a\x00b")
    (tmp_path / "marked").write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(LINEAR).encode())
    assert load_recipe(tmp_path / "marked").merge_method == "linear"


def test_a_misspelt_model_is_told_with_the_nearest_key() -> None:
    found = faults(LINEAR, models=[{"modl": "./a"}, {"model": "./b"}])
    assert "did you mean 'model'" in found["$.models[0].modl"]
