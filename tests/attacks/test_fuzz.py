"""Parsers of files that others wrote, fed with anything: they answer, or refuse with the documented error.

Each test prints how many inputs it tried and how long that took; the journal's parser has the same test of its own.
"""

from __future__ import annotations

import contextlib
import json
import struct
import time
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, HeaderError, RecipeError, WorkspaceError
from mergepipe.pipeline.chain import chain_of
from mergepipe.pipeline.document import read_documents
from mergepipe.pipeline.parts import parts_of
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.recipe import parse_recipe
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.header import read_header
from mergepipe.storage.manifest import ChunkManifest

COUNTS = [60, pytest.param(3_000, marks=pytest.mark.slow)]

HUGE = st.sampled_from([0, 1, -1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**30, 1.5, True, None, "1", [], {}])
JSON = st.recursive(
    HUGE | st.text(max_size=6) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.sampled_from(["a", "a.b", "../a", "/a", "a/b", "", ".", "a\0b", "a\nb", "é", "__metadata__"]) | st.text(
    max_size=5
)
TENSOR = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "F4", "x", "", None, 3]),
        "shape": st.lists(HUGE, max_size=3) | HUGE,
        "data_offsets": st.lists(HUGE, max_size=3) | HUGE,
        "more": JSON,
    },
)
LONGEST_S = 20.0
"""No input of these sizes may take longer than this."""


class Tally:
    """Counts inputs, and how long the slowest took."""

    def __init__(self, what: str) -> None:
        self.what, self.inputs, self.slowest = what, 0, 0.0
        self.started = time.monotonic()

    def __enter__(self) -> Self:
        self.inputs += 1
        self.began = time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.slowest = max(self.slowest, time.monotonic() - self.began)

    def tell(self) -> None:
        assert self.slowest < LONGEST_S
        print(f"{self.what}: {self.inputs} inputs in {time.monotonic() - self.started:.1f} s")


@pytest.mark.parametrize("examples", COUNTS)
def test_headers(examples: int, tmp_path: Path) -> None:
    tally = Tally("header")
    path = tmp_path / "model.safetensors"

    @settings(max_examples=examples)
    @given(
        st.dictionaries(NAMES, TENSOR | JSON, max_size=4).map(json.dumps).map(str.encode) | st.binary(max_size=60),
        st.sampled_from([0, 0, 0, 1, -1, 2**63]),
        st.binary(max_size=40),
    )
    def check(header: bytes, lie: int, data: bytes) -> None:
        length = (len(header) + lie) % 2**64
        path.write_bytes(struct.pack("<Q", length) + header + data)
        with tally:
            try:
                found = read_header(path)
            except HeaderError:
                return
        assert sum(tensor.stop - tensor.start for tensor in found.tensors) == len(header) + len(data) - length

    check()
    tally.tell()


@pytest.mark.parametrize("examples", COUNTS)
def test_indexes(examples: int, tmp_path: Path) -> None:
    tally = Tally("index")
    good = b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(good)) + good + b"xy")
    files = st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", ".", "", 3, None])
    maps = st.dictionaries(NAMES, files | JSON, max_size=4)

    @settings(max_examples=examples)
    @given(
        st.fixed_dictionaries({}, optional={"weight_map": maps | JSON, "metadata": JSON})
        .map(json.dumps)
        .map(str.encode)
        | JSON.map(json.dumps).map(str.encode)
        | st.binary(max_size=60)
    )
    def check(index: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(index)
        with tally:
            try:
                found = open_checkpoint(tmp_path)
            except CheckpointError:
                return
        assert sorted(found.tensors) == ["a"]

    check()
    tally.tell()


KEYS = st.sampled_from(
    [
        *(
            "merge_method",
            "models",
            "base_model",
            "parameters",
            "model",
            "weight",
            "density",
            "rules",
            "match",
            "slices",
        ),
        *(
            "sparsify",
            "dtype",
            "heads",
            "tokenizer_source",
            "tokenizer",
            "chat_template",
            "seed",
            "scope",
            "outputs",
            "output",
            "filter",
            "value",
        ),
        "lambda",
    ]
)
RECIPES = st.recursive(
    HUGE | st.sampled_from(["ties", "linear", "none", "*", ".*", "[", "(a+)+$", "bfloat16", "nan", "base"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("examples", COUNTS)
def test_recipes(examples: int) -> None:
    tally = Tally("recipe")

    @settings(max_examples=examples)
    @given(st.dictionaries(KEYS, RECIPES, max_size=8).map(yaml.safe_dump) | st.text(max_size=80))
    def check(text: str) -> None:
        with tally, contextlib.suppress(RecipeError):
            parse_recipe(text, "fuzz.yaml")

    check()
    tally.tell()


LAYERS = st.lists(st.integers(-1, 4), max_size=3) | HUGE
SOURCES = st.lists(
    st.fixed_dictionaries({}, optional={"model": st.sampled_from(["a", "b", 3, {}]), "layer_range": LAYERS}), max_size=3
)
SLICES = st.lists(
    st.fixed_dictionaries({"sources": SOURCES | HUGE}, optional={"base_model": RECIPES, "parameters": RECIPES}) | HUGE,
    max_size=3,
)
METHODS = st.sampled_from(["linear", "slerp", "passthrough", "ties", "emr_unified", "x", None])
PARTS = st.fixed_dictionaries(
    {"merge_method": METHODS},
    optional={
        "slices": SLICES | HUGE,
        "modules": st.dictionaries(NAMES, st.fixed_dictionaries({}, optional={"slices": SLICES}) | HUGE, max_size=2)
        | HUGE,
        "base_model": st.sampled_from(["a", "b", "c"]),
        "name": st.sampled_from(["a", "b", "", "../x", 3]),
        "parameters": st.dictionaries(st.sampled_from(["weight", "t", "scale"]), RECIPES, max_size=2),
        "rules": RECIPES,
    },
)


@pytest.mark.parametrize("examples", COUNTS)
def test_recipes_of_several_parts(examples: int) -> None:
    """Slices, modules and documents that read each other."""
    tally = Tally("recipe of parts")

    @settings(max_examples=examples)
    @given(st.lists(PARTS, min_size=1, max_size=3).map(yaml.safe_dump_all))
    def check(text: str) -> None:
        with tally, contextlib.suppress(RecipeError):
            for merge in chain_of(read_documents(text, "fuzz.yaml"), Path("/w")):
                assert [part.layers >= 0 for part in parts_of(merge.recipe)]
                assert merge.output is None or Path(merge.output).parent == Path("/w/merged")

    check()
    tally.tell()


@pytest.mark.parametrize("examples", COUNTS)
def test_plans_and_manifests(examples: int, tmp_path: Path) -> None:
    """Files of the workspace: ours, but disks forget."""
    tally = Tally("plan and manifest")
    path = tmp_path / "manifest.json"

    @settings(max_examples=examples)
    @given(JSON, st.binary(max_size=60))
    def check(value: Any, raw: bytes) -> None:
        for data in (json.dumps(value).encode(), json.dumps({"format": 1, "x": value}).encode(), raw):
            with tally, pytest.raises(WorkspaceError):
                Plan.from_json(data)
            path.write_bytes(data)
            with tally, pytest.raises((WorkspaceError, CheckpointError)):
                ChunkManifest.load(path)

    check()
    tally.tell()
