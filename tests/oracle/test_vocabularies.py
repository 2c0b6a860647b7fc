"""Merged vocabularies against mergekit's, token by token: the same rows for the same tokens, whatever their ids are.

The order of a union's new tokens is arbitrary there, so rows are compared by token; rows of padding by position.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import yaml
from safetensors.numpy import load_file

import mergepipe
from oracle.expected import ulp
from oracle.rival import run_mergekit
from support.vocabularies import Model, byte_tokenizer, expected_rows, write_llama

pytestmark = [pytest.mark.oracle, pytest.mark.slow, pytest.mark.filterwarnings("default")]

WEIGHTS = (0.5, 0.3, 0.45)
Named = dict[str, Model]


@dataclass(frozen=True)
class Case:
    """One recipe: which models, which of them is the base, and what it says of tokenizers."""

    models: tuple[str, ...]
    base: str | None
    keys: Callable[[Named], dict[str, Any]]
    method: str = "linear"


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


THREE = ("base", "chat", "more")
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
}


def _recipe(case: Case, models: Named) -> dict[str, Any]:
    listed: list[dict[str, Any]] = [{"model": str(models[name].folder)} for name in case.models]
    recipe: dict[str, Any] = {"merge_method": case.method, "dtype": "float32", "models": listed}
    if case.method == "slerp":
        recipe["parameters"] = {"t": 0.4}
    else:
        for entry, weight in zip(listed, WEIGHTS, strict=False):
            entry["parameters"] = {"weight": weight}
    if case.method == "task_arithmetic":
        del listed[0]
    own = {} if case.base is None else {"base_model": str(models[case.base].folder)}
    return recipe | own | case.keys(models)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Named:
    folder = tmp_path_factory.mktemp("vocabularies")
    plain = ["ab", "cd", "abc"]
    chat = {"<|im_start|>": True, "<tool>": False}
    more = {"<tool>": False, "<|im_start|>": True, "<x>": True}
    return {
        "base": write_llama(folder / "base", byte_tokenizer(plain), 0),
        "chat": write_llama(folder / "chat", byte_tokenizer(plain, chat), 1),
        "more": write_llama(folder / "more", byte_tokenizer(plain, more), 2),
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
    assert folders[1].is_dir(), (theirs[name] / "error.txt").read_text()
    (own, other), ids = [load_file(path / "model.safetensors") for path in folders], [_ids(path) for path in folders]
    assert set(ids[0]) == set(ids[1])
    sizes = [json.loads((path / "config.json").read_text())["vocab_size"] for path in folders]
    assert sizes[0] == sizes[1]
    assert set(own) == set(other)
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
        _check(ours, rival, largest, 4 if case.method == "slerp" else 2)
        padding = slice(len(order), None)
        # Theirs is a float32 sum of all rows: it is as far off as that.
        _check(own[key][padding], other[key][padding], np.abs(ours).max(axis=0) * len(order) ** 0.5, 2)


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
