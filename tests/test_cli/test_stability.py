"""`mergepipe stability` as it is typed: two tables, JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergepipe.cli import stability
from mergepipe.cli.main import main
from mergepipe.pipeline.stability_report import Settings, measure_stability
from support.language import make_tokenizer, write_model

# transformers imports modules that warn about themselves
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_thread")]

OPTIONS = ["--tokens", "6", "--n", "2", "--seed", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one with a token more, one with other tokens, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "merged", make_tokenizer())
    write_model(folder / "chat", make_tokenizer(["<|user|>"]), seed=1)
    write_model(folder / "other", make_tokenizer(pieces=["ab"]), seed=2)
    (folder / "prompts.txt").write_text("abc\nde\n")
    return folder


def run(folder: Path, capsys: pytest.CaptureFixture[str], *parents: str, options: list[str]) -> str:
    paths = [str(folder / name) for name in ("merged", *parents)]
    assert main(["stability", *paths, "--prompts", str(folder / "prompts.txt"), *OPTIONS, *options]) == 0
    return capsys.readouterr().out


def test_the_tables(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run(folder, capsys, "chat", "other", options=[])
    assert "after 2 prompts, up to 6 tokens each" in out
    starts = [tuple(line.split()[:3]) for line in out.splitlines()]
    for name, role in (("merged", "(merged)"), ("chat", "(parent)"), ("other", "(parent)")):
        assert [(str(folder / name), role, how) in starts for how in ("greedy", "sampling")] == [True, True]
    assert "distinct-2" in out
    assert "KL(merged || parent)  KL(parent || merged)" in out
    assert f"{folder / 'chat'}: another vocabulary; distributions are over the 11 tokens that both have" in out
    assert f"{folder / 'other'}: no divergence of outputs: prompt 1 is 3 tokens" in out
    assert out.count(" weights ") == 2


def test_the_json_is_what_is_documented_and_the_same_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = json.loads(run(folder, capsys, "chat", options=["--json"]))
    settings = Settings(tokens=6, n=2, seed=3)
    again = measure_stability(folder / "merged", [folder / "chat"], ["abc", "de"], settings).to_dict()
    assert found == json.loads(json.dumps(again))
    assert set(found) == {"prompts", "settings", "models", "divergences"}
    assert set(found["models"][0]) == {"path", "role", "greedy", "sampling"}
    assert set(found["models"][1]["sampling"]) == {
        "continuations", "tokens", "repeated", "loops", "distinct", "entropy", "token_entropy"
    }  # fmt: skip
    (pair,) = found["divergences"]
    assert set(pair) == {"parent", "shared_tokens", "refused", "texts", "weights"}
    assert set(pair["texts"][0]) == {"text", "merged_to_parent", "parent_to_merged", "positions", "left_out"}
    assert set(pair["weights"]) == {"merged_to_parent", "parent_to_merged", "rows"}


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(stability, "find_spec", lambda name: None)
    assert main(["stability", "a", "b", "--prompts", "c"]) == 2
    assert "pip install 'mergepipe[eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["merged", "--prompts", "prompts.txt"], 2, "PARENT"),
        (["merged", "chat"], 2, "--prompts"),
        (["merged", "chat", "--prompts", "none.txt"], 2, "no file of prompts"),
        (["merged", "nowhere", "--prompts", "prompts.txt"], 4, "nowhere"),
        (["merged", "chat", "--prompts", "prompts.txt", "--device", "tpu"], 2, "expected cpu, cuda"),
        (["merged", "chat", "--prompts", "prompts.txt", "--device", "cuda:99"], 2, "take cpu"),
        (["merged", "chat", "--prompts", "prompts.txt", "--tokens", "64"], 2, "64 positions"),
        (["merged", "chat", "--prompts", "prompts.txt", "--temperature", "0"], 2, "temperature"),
    ],
)
def test_what_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str], code: int, said: str
) -> None:
    monkeypatch.chdir(folder)
    assert main(["stability", *arguments]) == code
    assert said in capsys.readouterr().err
