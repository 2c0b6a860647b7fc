"""Merged vocabularies against mergekit's, token by token: the same rows for the same tokens, whatever their ids are.

The order of a union's new tokens is arbitrary there, so rows are compared by token; rows of padding by position.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml

import mergepipe
from oracle.expected import ulp
from oracle.rival import run_mergekit
from support.checkpoints import read_tensors
from support.vocabularies import Model, byte_tokenizer, expected_rows, write_llama

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.filterwarnings("default")]

WEIGHTS = (0.5, 0.3, 0.45)
Named = dict[str, Model]


@dataclass(frozen=True)
class Case:
    """One recipe: which models, which of them is the base, and what it says of tokenizers.

    With `layers`, the layers that each slice takes of each model in turn; a slice of one model stacks its layers.
    """

    models: tuple[str, ...]
    base: str | None
    keys: Callable[[Named], dict[str, Any]]
    method: str = "linear"
    layers: tuple[dict[str, tuple[int, int]], ...] = ()


def _source(name: str) -> Callable[[Named], dict[str, Any]]:
    return lambda models: {"tokenizer_source": str(models[name].folder) if name in models else name}


def _tokens(models: Named) -> dict[str, Any]:
    chat, more = (str(models[name].folder) for name in ("chat", "more"))
    tokens = {
        "<tool>": {"source": chat},
        "<|im_start|>": {"source": more, "force": True},
        "<x>": {"source": {"kind": "model_token", "model": chat, "token_id": 5}},
        "</s>": {"source": {"kind": "zero"}, "force": True},
        "<new>": {"source": {"kind": "model_token", "model": more, "token": "ab"}},
    }
    return {"tokenizer": {"source": "union", "tokens": tokens}}


def _padded(models: Named) -> dict[str, Any]:
    return {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}}


def _template(asked: str) -> Callable[[Named], dict[str, Any]]:
    return lambda models: {"tokenizer_source": "union", "chat_template": asked}


THREE = ("base", "chat", "more")
BY_LAYER = tuple(dict.fromkeys(THREE, (n, n + 1)) for n in range(2))
CASES = {
    "union": Case(THREE, "base", _source("union")),
    "union-of-others": Case(("chat", "more", "other"), "chat", _source("union")),
    "union-without-base": Case(("more", "chat", "other"), None, _source("union")),
    "base": Case(("chat", "more", "other"), "chat", _source("base")),
    "model": Case(("chat", "base", "other"), "chat", _source("other")),
    "model-outside": Case(("base", "chat"), "base", _source("other")),
    "tokens": Case(THREE, "base", _tokens),
    "padding": Case(THREE, "base", _padded),
    "padded-rows": Case(("wide", "chat", "more"), "wide", _source("union")),
    "task-arithmetic": Case(THREE, "base", _source("union"), "task_arithmetic"),
    "slerp": Case(("base", "chat"), "base", _source("union"), "slerp"),
    "slices": Case(THREE, "base", _source("union"), layers=BY_LAYER),
    "slices-base": Case(THREE, "base", _source("base"), layers=BY_LAYER),
    "slices-tokens": Case(THREE, "base", _tokens, layers=BY_LAYER),
    "slices-padding": Case(THREE, None, _padded, layers=BY_LAYER),
    "slices-task-arithmetic": Case(THREE, "base", _source("union"), "task_arithmetic", layers=BY_LAYER),
    "stack": Case(("base", "chat"), None, _source("union"), "passthrough", ({"base": (0, 2)}, {"chat": (0, 2)})),
    "stack-model": Case(("base", "chat"), None, _source("chat"), "passthrough", ({"base": (0, 2)}, {"chat": (0, 2)})),
    "template-auto": Case(THREE, "base", _template("auto")),
    "template-chatml": Case(THREE, "base", _template("chatml")),
}


def _recipe(case: Case, models: Named) -> dict[str, Any]:
    listed: list[dict[str, Any]] = [{"model": str(models[name].folder)} for name in case.models]
    recipe: dict[str, Any] = {"merge_method": case.method, "dtype": "float32", "models": listed}
    if case.method == "slerp":
        recipe["parameters"] = {"t": 0.4}
    elif case.method != "passthrough":
        for entry, weight in zip(listed, WEIGHTS, strict=False):
            entry["parameters"] = {"weight": weight}
    if case.method == "task_arithmetic":
        del listed[0]["parameters"]
    if case.layers:
        own_entry = dict(zip(case.models, listed, strict=True))
        del recipe["models"]
        recipe["slices"] = [
            {"sources": [own_entry[name] | {"layer_range": list(taken)} for name, taken in one.items()]}
            for one in case.layers
        ]
    own = {} if case.base is None else {"base_model": str(models[case.base].folder)}
    return recipe | own | case.keys(models)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Named:
    folder = tmp_path_factory.mktemp("vocabularies")
    plain = ["ab", "cd", "abc"]
    chat = {"<|im_start|>": True, "<tool>": False}
    more = {"<tool>": False, "<|im_start|>": True, "<x>": True}
    return {
        "base": write_llama(folder / "base", byte_tokenizer(plain), 0, template="A{{ messages[0]['content'] }}"),
        "chat": write_llama(folder / "chat", byte_tokenizer(plain, chat), 1, template="B{{ messages[0]['content'] }}"),
        "more": write_llama(folder / "more", byte_tokenizer(plain, more), 2, template="B{{ messages[0]['content'] }}"),
        "other": write_llama(folder / "other", byte_tokenizer(["op", "ab", "Ġa"]), 3),
        "wide": write_llama(folder / "wide", byte_tokenizer(plain), 4, rows=64),
    }


@pytest.fixture(scope="module")
def theirs(models: Named, mergekit_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    recipes = {name: _recipe(case, models) for name, case in CASES.items()}
    return run_mergekit(mergekit_python, recipes, tmp_path_factory.mktemp("mergekit"))


def _ids(folder: Path) -> dict[str, int]:
    import transformers

    found: dict[str, int] = transformers.AutoTokenizer.from_pretrained(folder).get_vocab()
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_same_rows_for_the_same_tokens(name: str, models: Named, theirs: dict[str, Path], tmp_path: Path) -> None:
    case = CASES[name]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(_recipe(case, models)))
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    mergepipe.run(tmp_path / "work")
    folders = (tmp_path / "merged", theirs[name] / "merged")
    assert folders[1].is_dir(), (theirs[name] / "error.txt").read_text(encoding="utf-8")
    (own, other), ids = [_tensors(path) for path in folders], [_ids(path) for path in folders]
    assert set(ids[0]) == set(ids[1])
    sizes = [json.loads((path / "config.json").read_text(encoding="utf-8"))["vocab_size"] for path in folders]
    assert sizes[0] == sizes[1]
    assert set(own) == set(other)
    if "chat_template" in case.keys(models):
        assert _rendered(folders[0]) == _rendered(folders[1])
    order = sorted(ids[0])
    for key in own:
        if key not in ("model.embed_tokens.weight", "lm_head.weight"):
            _check(own[key], other[key], np.maximum(np.abs(own[key]), 0.05), 4)
            continue
        assert len(own[key]) == len(other[key]) == sizes[0]
        ours, rival = (
            found[key][[vocabulary[token] for token in order]]
            for found, vocabulary in zip((own, other), ids, strict=True)
        )
        largest = _largest([models[one] for one in case.models], key, ids[0], order, case)
        for token in case.keys(models).get("tokenizer", {}).get("tokens", {}):
            largest[order.index(token)] = largest.max()  # from wherever the recipe says
        known = _known(case, models, key)
        if known is not None:
            has = np.array([token in known for token in order])
            # Theirs are rows of zeros; ours those of the model that has the token.
            assert not rival[~has].any()
            assert ours[~has].any(axis=1).all()
            ours, rival, largest = ours[has], rival[has], largest[has]
        _check(ours, rival, largest, 4 if case.method == "slerp" else 2)
        padding = slice(len(order), None)
        # Theirs is a float32 sum of all rows: it is as far off as that.
        _check(own[key][padding], other[key][padding], np.abs(ours).max(axis=0) * len(order) ** 0.5, 2)


def _known(case: Case, models: Named, key: str) -> set[str] | None:
    """In a stack, the tokens of the models of the slice that makes a table: nobody else lends rows to mergekit."""
    if case.method != "passthrough":
        return None
    makers = case.layers[0 if key == "model.embed_tokens.weight" else -1]
    return {token for name in makers for token in models[name].vocab}


def _tensors(folder: Path) -> dict[str, npt.NDArray[np.float32]]:
    return {name: value.numpy() for name, value in read_tensors(folder).items()}


def _rendered(folder: Path) -> str:
    """What the chat template makes of a conversation."""
    import transformers

    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "ab"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_a_chain_over_vocabularies(models: Named, mergekit_python: Path, tmp_path: Path) -> None:
    """A union of a merge with another model, in two documents; rows by token."""
    plain = {"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 1}, "tokenizer_source": "union"}
    base, chat, other = (str(models[name].folder) for name in ("base", "chat", "other"))
    first = plain | {"name": "first", "base_model": base, "models": [{"model": base}, {"model": chat}]}
    last = plain | {"base_model": "first", "models": [{"model": "first"}, {"model": other}]}
    text = yaml.safe_dump_all([first, last])
    (tmp_path / "recipe.yaml").write_text(text)
    command = [str(mergekit_python.parent / "mergekit-multi"), str(tmp_path / "recipe.yaml"), "--no-copy-tokenizer"]
    command += ["-I", str(tmp_path / "between"), "--out-path", str(tmp_path / "theirs"), "--no-write-model-card"]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    mergepipe.run(tmp_path / "work")
    folders = (tmp_path / "merged", tmp_path / "theirs")
    (own, rival), ids = [_tensors(path) for path in folders], [_ids(path) for path in folders]
    assert set(ids[0]) == set(ids[1])
    assert own.keys() == rival.keys()
    order = sorted(ids[0])
    for key, value in own.items():
        table = key in ("model.embed_tokens.weight", "lm_head.weight")
        mine, theirs = (
            (each[key][[vocabulary[token] for token in order]] if table else each[key])
            for each, vocabulary in zip((own, rival), ids, strict=True)
        )
        _check(mine, theirs, np.maximum(np.abs(value).max(), np.abs(mine)), 4)


def _largest(
    models: list[Model], key: str, ids: dict[str, int], order: list[str], case: Case
) -> npt.NDArray[np.float64]:
    """The largest term of each element's sum, by token."""
    rows = [ids[token] for token in order]
    base = None if case.base is None else 0
    terms = [np.abs(expected_rows(ids, models, key, number, base=base)) for number in range(len(models))]
    found: npt.NDArray[np.float64] = np.max(terms, axis=0)[rows]
    return np.maximum(found, 1e-3 * found.max())


def _check(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], largest: npt.NDArray[Any], units: float) -> None:
    if ours.size:
        apart = np.abs(ours.astype(np.float64) - theirs) / ulp(np.broadcast_to(largest, ours.shape))
        assert apart.max() <= units
