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

from mergepipe.cli.demo import command, text, training, vision
from mergepipe.cli.demo.show import show
from mergepipe.cli.demo.table import Report, Row, make_table, remarks, standard_error

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
    assert "Highest mean of a merge: task_arithmetic + uniform" in said
    assert "(-2.5 points)" in said
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
        manifest = json.loads((tmp_path / family / "merged" / "ties-tadrop" / "mergepipe_manifest.json").read_text())
        assert manifest["densities"]
    rows = [line.split() for line in out.splitlines() if line.startswith((" base", " expert", " task_arithmetic"))]
    for table in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        base, experts = [float(x) for x in table[0][1:]], [[float(x) for x in row[2:]] for row in table[1:5]]
        gains = [experts[task][task] - base[task] for task in range(4)]
        assert sum(gains) / 4 > 2, "experts are better than the base at their own tasks, whatever merging makes of it"
