"""Every key and parameter that mergekit itself declares is accepted: it is asked for the names of its own fields.

Only names, types and defaults are looked at. Each key is put into a recipe of ours, which then has no fault; the table
here has to have every class of theirs, so that a key they add is not forgotten.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mergepipe.pipeline.recipe import parse_recipe
from mergepipe.tasks.registry import METHODS

pytestmark = pytest.mark.oracle

_ASK = """
import json, pydantic
from mergekit import common, config, merge_methods
from mergekit.tokenizer import config as tokens
classes, methods = {}, {}
for module in (config, tokens, common):
    for name, found in vars(module).items():
        if isinstance(found, type) and issubclass(found, pydantic.BaseModel) and found.__module__ == module.__name__:
            classes[name] = list(found.model_fields)
for method in merge_methods.registered_methods():
    methods[method.spec.name] = {
        one.name: (one.value_type.__name__, one.scope.name) for one in method.spec.parameters
    }
print(json.dumps([classes, methods]))
"""

Recipe = dict[str, Any]
TWO = [{"model": "./a"}, {"model": "./b"}]
WEIGHT: Recipe = {"parameters": {"weight": 0.5}}


def recipe(**keys: Any) -> Recipe:
    return {"merge_method": "linear", "models": TWO, **WEIGHT} | keys


def sliced(source: Recipe | None = None, **keys: Any) -> Recipe:
    sources = [{"model": "./a", "layer_range": [0, 2]} | (source or {}), {"model": "./b", "layer_range": [0, 2]}]
    return {"merge_method": "linear", **WEIGHT, "slices": [{"sources": sources} | keys]}


def module(**keys: Any) -> Recipe:
    return {"merge_method": "linear", **WEIGHT, "modules": {"text_decoder": {"models": TWO} | keys}}


def token(**entry: Any) -> Recipe:
    return recipe(tokenizer={"source": "union", "tokens": {"<x>": entry}})


A_TOKEN = {"kind": "model_token", "model": "./a", "token_id": 3}
SLICES = sliced()["slices"]

KEYS: dict[str, dict[str, Recipe]] = {
    "MergeConfiguration": {
        "merge_method": recipe(),
        "models": recipe(),
        "slices": sliced(),
        "modules": module(),
        "base_model": recipe(base_model="./a"),
        "dtype": recipe(dtype="bfloat16"),
        "out_dtype": recipe(out_dtype="bfloat16"),
        "tokenizer_source": recipe(tokenizer_source="union"),
        "tokenizer": recipe(tokenizer={"source": "base"}, base_model="./a"),
        "chat_template": recipe(chat_template="chatml"),
        "parameters": recipe(),
    },
    "InputModelDefinition": {
        "model": recipe(),
        "parameters": recipe(models=[{"model": "./a", **WEIGHT}, {"model": "./b", **WEIGHT}], parameters={}),
    },
    "InputSliceDefinition": {"model": sliced(), "layer_range": sliced(), "parameters": sliced(WEIGHT)},
    "OutputSliceDefinition": {
        "sources": sliced(),
        "base_model": sliced(base_model="./a"),
        "residual_weight": sliced(residual_weight=0.5),
        "parameters": sliced(**WEIGHT),
    },
    "OutputModuleDefinition": {
        "models": module(),
        "parameters": module(**WEIGHT),
        "slices": {"merge_method": "linear", **WEIGHT, "modules": {"text_decoder": {"slices": SLICES}}},
    },
    "ConditionalParameter": {
        key: recipe(parameters={"weight": [{"filter": "mlp", "value": 0.3}, {"value": 0.5}]})
        for key in ("value", "filter")
    },
    "ModelReference": {
        "model": recipe(models=[{"model": {"model": {"path": "./a"}}}, TWO[1]]),
        "lora": recipe(models=[{"model": {"model": {"path": "./a"}, "lora": {"path": "./l"}}}, TWO[1]]),
        "override_architecture": recipe(
            models=[{"model": {"model": {"path": "./a"}, "override_architecture": "LlamaForCausalLM"}}, TWO[1]]
        ),
    },
    "ModelPath": {
        "path": recipe(models=[{"model": {"path": "./a"}}, TWO[1]]),
        "revision": recipe(models=[{"model": {"path": "org/name", "revision": "v1"}}, TWO[1]]),
    },
    "TokenizerConfig": {
        "source": recipe(tokenizer={"source": "union"}),
        "tokens": token(source="./a"),
        "pad_to_multiple_of": recipe(tokenizer={"source": "union", "pad_to_multiple_of": 8}),
    },
    "TokenEmbeddingConfig": {"source": token(source="./a"), "force": token(source="./a", force=True)},
    "ModelTokenEmbedding": {
        "kind": token(source=A_TOKEN),
        "model": token(source=A_TOKEN),
        "token_id": token(source=A_TOKEN),
        "token": token(source={"kind": "model_token", "model": "./a", "token": "<y>"}),
    },
    "ZeroEmbedding": {"kind": token(source={"kind": "zero"})},
}
"""By class of mergekit's and its field, a recipe that has it."""

NOT_WRITTEN = {"ConfigReader"}
"""A class that no recipe has: it walks through one."""

VALUES = {"float": 0.25, "Optional": 0.25, "bool": True, "int": 2}


@pytest.fixture(scope="module")
def declared(mergekit_python: Path) -> tuple[dict[str, list[str]], dict[str, dict[str, list[str]]]]:
    """Fields by class; types and scopes of parameters by method."""
    done = subprocess.run([str(mergekit_python), "-c", _ASK], capture_output=True, text=True, check=True)
    classes, methods = json.loads(done.stdout)
    return classes, methods


def test_every_key(declared: Any, tmp_path: Path) -> None:
    classes, _ = declared
    assert {name: set(fields) for name, fields in classes.items() if name not in NOT_WRITTEN} == {
        name: set(fields) for name, fields in KEYS.items()
    }
    for fields in KEYS.values():
        for document in fields.values():
            parse_recipe(document, relative_to=tmp_path)


def test_every_method_and_parameter(declared: Any, tmp_path: Path) -> None:
    """All of a method's at once for the whole merge; and beside each model those that are a model's own."""
    _, methods = declared
    assert set(methods) <= set(METHODS)
    faults = []
    for name, parameters in methods.items():
        method = METHODS[name]
        keys: Recipe = {"merge_method": name, "models": TWO[: 1 if name == "passthrough" else 2]}
        if method.base != "ignored":
            keys["base_model"] = "./base"
        if name in ("slerp", "nearswap", "arcee_fusion"):
            keys["models"] = TWO[:1]
        given = {key: VALUES[kind] for key, (kind, _) in parameters.items()}
        own = {key: given[key] for key, (_, scope) in parameters.items() if scope != "SHARED"}
        shared = {key: value for key, value in given.items() if key not in own}
        beside = [{**one, "parameters": own} for one in keys["models"]]
        for document in (keys | {"parameters": given}, keys | {"models": beside, "parameters": shared}):
            try:
                parse_recipe(document, relative_to=tmp_path)
            except Exception as error:
                faults.append((name, str(error)))
    assert faults == []
