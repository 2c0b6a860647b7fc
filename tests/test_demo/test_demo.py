"""The demo trains what it says, in the layouts it says, and its table adds up."""

from __future__ import annotations

import io
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rich.console import Console

from mergepipe.cli.demo import command, language, language_merges, language_table, text, training, vision
from mergepipe.cli.demo.language_merges import LanguageReport, LanguageRow, Proxy
from mergepipe.cli.demo.show import show
from mergepipe.cli.demo.table import Report, Row, make_table, remarks, standard_error
from mergepipe.pipeline.stability_report import Settings, Writing

needs_sklearn = pytest.mark.skipif(find_spec("sklearn") is None, reason="needs scikit-learn: pip install '.[demo]'")


def report() -> Report:
    rows = (
        Row("base", (0.5, 0.3), "base"),
        Row("expert a", (0.9, 0.2), "expert"),
        Row("slerp of two", (0.95, None), "merge"),
        *(Row(f"{m} + {s}", (a, 0.5), "merge", 1.0, density=0.6) for m in ("task_arithmetic", "ties")
          for s, a in (("tadrop", 0.6), ("uniform", 0.65))),
    )  # fmt: skip
    return Report("tiny", (("a", 2, 400), ("b", 4, 400)), rows, copy_is_same=True)


def test_the_table_names_the_control_and_admits_what_is_missing() -> None:
    out = io.StringIO()
    Console(file=out, width=100).print(make_table(report()))
    lines = out.getvalue().splitlines()
    assert [line.split() for line in lines if "slerp" in line] == [["slerp", "of", "two", "95.0", "n/a", "n/a"]]
    uniform = next(line.split() for line in lines if "uniform" in line)
    assert uniform == ["+", "uniform", "1", "65.0", "50.0", "57.5", "60.0", "%"]


def test_remarks_say_it_when_tadrop_loses() -> None:
    said = "\n".join(remarks(report()))
    assert "Highest mean of a single merged model: task_arithmetic + uniform" in said
    assert "points of mean accuracy: task_arithmetic -2.5, ties -2.5." in said
    assert "the same bytes as" in said


def test_the_standard_error_is_that_of_a_mean_of_shares() -> None:
    rng = np.random.default_rng(0)
    means = (rng.binomial(400, 0.5, (100_000, 2)) / 400).mean(axis=1)
    assert standard_error(report()) == pytest.approx(means.std(), rel=0.02)


@needs_sklearn
@pytest.mark.parametrize("kind", vision.KINDS)
def test_every_class_is_drawn_and_pictures_are_pictures(kind: str) -> None:
    draw, classes = vision.KINDS[kind]
    images, labels = draw(np.random.default_rng(0), 300)
    assert images.shape == (300, vision.SIDE, vision.SIDE)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert set(labels) == set(range(len(classes)))


def test_dots_are_as_many_as_the_label_says() -> None:
    images, labels = vision.draw_dots(np.random.default_rng(1), 50)
    assert [int((image > 0).sum()) for image in images] == [4 * (label + 1) for label in labels]


def test_the_tokenizer_gives_back_what_it_read() -> None:
    tokenizer = text.make_tokenizer()
    line = "def f(x):\n  return x**2  # ok"
    ids = tokenizer(line)["input_ids"]
    assert len(ids) == len(line)
    assert tokenizer.decode(ids) == line


def test_keyword_pieces_end_where_the_keyword_stood() -> None:
    code = "\n".join(f"x{i} = {i}\ndef f(self): return {i}\nfor i in x: import y\nif y: pass" for i in range(20))
    found, labels = text.before_keywords(np.random.default_rng(0), code, 60)
    assert len(found) == len(labels) == 60
    for piece, label in zip(found, labels, strict=True):
        assert piece + text.KEYWORDS[label] in code


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert type(result.exception).__name__ == "OutputExistsError"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@needs_sklearn
@pytest.mark.slow
def test_a_family_is_a_base_and_experts_that_transformers_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.quiet()
    monkeypatch.setattr(vision, "QUICK_STEPS", (60, 20))
    family = vision.make_family(tmp_path / "a", seed=0, quick=True)
    again = vision.make_family(tmp_path / "b", seed=0, quick=True)
    for name, folder in {"base": family.base, **family.experts}.items():
        _, info = family.model_class.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert (folder / "model.safetensors").read_bytes() == (tmp_path / "b" / name / "model.safetensors").read_bytes()
    experts = [family.model_class.from_pretrained(path) for path in family.experts.values()]
    assert [training.head_of(expert).out_features for expert in experts] == [10, 6, 8, 5]
    for one, other in zip(family.tasks, again.tasks, strict=True):
        assert np.array_equal(one.test.inputs, other.test.inputs)


@needs_sklearn
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path, seed=0, quick=True)
    out = capsys.readouterr().out
    assert out.count("the same bytes as") == 2
    for family, shards in (("vision", 1), ("text", 3)):
        for name in ("base", "merged/ties-tadrop"):
            assert len(list((tmp_path / family / name).glob("*.safetensors"))) == shards
        manifest = json.loads(
            (tmp_path / family / "merged" / "ties-tadrop" / "mergepipe_manifest.json").read_text(encoding="utf-8")
        )
        assert manifest["densities"]
    rows = [line.split() for line in out.splitlines() if line.startswith((" base", " expert"))]
    for table in (rows[:5], rows[5:]):
        assert len(table) == 5
        base, experts = [float(x) for x in table[0][1:]], [[float(x) for x in row[2:]] for row in table[1:5]]
        gains = [experts[task][task] - base[task] for task in range(4)]
        assert sum(gains) / 4 > 2, "experts are better than the base at their own tasks, whatever merging makes of it"


def language_report() -> LanguageReport:
    def row(name: str, kind: str, surprise: float, repeated: float, *, merged: bool = False) -> LanguageRow:
        writing = Writing(2, 20, repeated, 0.5, {1: 0.5}, 1.25, 2.0)
        divergences = ((0.01, 0.02), (0.03, 0.04)) if merged else None
        return LanguageRow(name, kind, (surprise, 2 * surprise), {"greedy": writing, "sampling": writing}, divergences)

    rows = (
        row("base", "base", 1.0, 0.5),
        row("expert one", "expert", 0.5, 0.1),
        row("linear", "merge", 0.9, 0.2, merged=True),
        row("ties", "merge", 0.8, 0.3, merged=True),
    )
    return LanguageReport(("one", "two"), rows, Proxy(0.5, 4, None, 2), swap_differs=True)


def test_the_language_table_and_what_it_says() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(language_table.make_table(language_report()))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert [
        "ties",
        "0.800",
        "1.600",
        "30.0",
        "50.0",
        "30.0",
        "50.0",
        "1.250",
        "0.010",
        "0.020",
        "0.030",
        "0.040",
    ] in lines
    assert ["base", "1.000", "2.000", "50.0", "50.0", "50.0", "50.0", "1.250"] in lines
    said = "\n".join(language_table.remarks(language_report()))
    assert "Least mean surprise of a merge: ties, 1.200 nats per character; the base has 1.500." in said
    assert "greedy writing: linear, 20.0 %" in said
    assert "+0.50 over 4 pairs of a merge and an expert, n/a over 2 swaps of one tensor" in said


def test_an_experts_tokens_and_template_are_its_own() -> None:
    tokenizers = {name: language.make_expert_tokenizer(name) for name in language.ADDED}
    base = len(text.make_tokenizer())
    for name, tokenizer in tokenizers.items():
        before, between = language.ADDED[name]
        assert len(tokenizer) == base + 2
        assert tokenizer(f"{before}f(x){between}Ok")["input_ids"][:2] == [base, tokenizer.convert_tokens_to_ids("f")]
        messages = [{"role": "user", "content": "f(x)"}, {"role": "assistant", "content": "Ok"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{before}f(x){between}Ok\n"


@needs_sklearn
@pytest.mark.slow
def test_a_pair_is_trained_merged_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training.quiet()
    monkeypatch.setattr(language, "STEPS", (30, 15))
    monkeypatch.setattr(language, "FUNCTIONS", 300)
    pair = language.make_pair(tmp_path, seed=0)
    assert len(pair.prompts) == language.N_PROMPTS
    for path in pair.experts.values():
        assert len(list(path.glob("*.safetensors"))) == 1
    settings = Settings(tokens=8, n=2)
    report = language_merges.merge_pair(pair, tmp_path, tell=lambda what: None, settings=settings)
    assert report.swap_differs
    rows = {row.name: row for row in report.rows}
    for number, name in enumerate(pair.experts):
        assert rows[f"expert {name}"].surprises[number] < rows["base"].surprises[number]
    primary = rows["scf_rkl on explain, 0.9"].divergences
    swapped = rows["scf_rkl on code, 0.9"].divergences
    assert primary is not None
    assert swapped is not None
    assert primary[0] < swapped[0], "a merge is nearer to its primary"
    assert report.proxy.n_merges == 2 * sum(row.kind == "merge" for row in report.rows)
    assert report.proxy.merges is not None
    assert report.proxy.tensors is not None
