"""Killed at any moment, a chain of merges goes on where it was and ends in the same bytes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergepipe
from support.jobs import SMALL, hashes, write_model
from support.tally import TALLY

from .conftest import Victim
from .test_kills import moments


@pytest.fixture
def chain(scratch: Path) -> Path:
    """A built chain of two merges: an average, and TIES with it as the base."""
    folder = scratch / "chain"
    shutil.rmtree(folder, ignore_errors=True)
    for number, name in enumerate(("a", "b", "c")):
        write_model(folder / name, number, SMALL, parent_seed=9)
    documents: list[dict[str, Any]] = [
        {"name": "mean", "merge_method": "linear", "parameters": {"weight": 1}},
        {"merge_method": "ties", "base_model": "mean", "parameters": {"weight": 1, "density": 0.5}},
    ]
    documents[0]["models"] = [{"model": str(folder / name)} for name in "ab"]
    documents[1]["models"] = [{"model": str(folder / name)} for name in "bc"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all(documents))
    return folder


def build(folder: Path) -> Path:
    mergepipe.build(
        folder / "recipe.yaml", work=folder / "work", out=folder / "merged", chunk_size="64KiB", memory="2GiB"
    )
    return folder / "work"


@pytest.mark.parametrize("kind", ["kill", pytest.param("power", marks=pytest.mark.slow)])
def test_dies_in_the_middle_of_a_chain(chain: Path, victim: Victim, kind: str) -> None:
    work = build(chain)
    whole = victim(work)
    assert whole["end"] == "done", whole
    expected = hashes(chain / "merged")
    for at in moments(int(whole["calls"]), 5):
        shutil.rmtree(work)
        shutil.rmtree(chain / "merged")
        build(chain)
        ends = [victim(work, kind, at), victim(work, kind, at // 2 + 1), victim(work)]
        assert all(end["end"] in ("killed", "done") for end in ends), ends
        assert ends[-1]["end"] == "done"
        assert hashes(chain / "merged") == expected
        TALLY[kind] += sum(end["end"] == "killed" for end in ends)


def test_dies_in_the_middle_of_a_chain_over_a_union(scratch: Path, victim: Victim) -> None:
    """Rows are made of an earlier merge while the run goes on: killed before, within and after that."""
    from support.vocabularies import byte_tokenizer, write_model

    folder = scratch / "union"
    shutil.rmtree(folder, ignore_errors=True)
    added: list[dict[str, bool]] = [{}, {"<a>": True, "<b>": False}, {"<b>": False, "<c>": True}]
    for number, (name, tokens) in enumerate(zip("abc", added, strict=True)):
        write_model(folder / name, byte_tokenizer(["ab", "cd"], tokens), number)
    plain = {"merge_method": "linear", "parameters": {"weight": 1}, "tokenizer_source": "union"}
    first = plain | {"name": "first", "models": [{"model": str(folder / name)} for name in "ab"]}
    last = plain | {"models": [{"model": "first"}, {"model": str(folder / "b")}, {"model": str(folder / "c")}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump_all([first, last]))
    work = build(folder)
    assert (work / "vocabulary" / "wanted").exists()
    whole = victim(work)
    assert whole["end"] == "done", whole
    expected = hashes(folder / "merged")
    killed = 0
    for at in moments(int(whole["calls"]), 4):
        shutil.rmtree(work)
        shutil.rmtree(folder / "merged")
        build(folder)
        ends = [victim(work, "kill", at)]
        if ends[0]["end"] == "killed":  # how many calls there are depends a little on how the threads run
            ends.append(victim(work))
            killed += 1
        assert ends[-1]["end"] == "done", ends
        assert hashes(folder / "merged") == expected
    assert killed >= 3
    TALLY["kill"] += killed
