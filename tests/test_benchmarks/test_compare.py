"""Two results of a benchmark side by side: what has changed, what only wavers, what one of them lacks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench_growth import exponent
from benchmarks.compare import compare, other_conditions
from benchmarks.report import Report

ROOT = Path(__file__).resolve().parents[2]


def result(path: Path, figures: dict[str, list[float]], benchmark: str = "run", **settings: Any) -> Path:
    report = Report(benchmark, settings)
    for name, values in figures.items():
        report.keep(name, values, "s")
    report.save(path)
    return path


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ([1.0, 1.1, 1.2], [2.0, 2.1, 2.2], "differs"),
        ([2.0, 2.1, 2.2], [1.0, 1.1, 1.2], "differs"),
        ([1.0, 1.1, 1.2], [1.15, 1.2, 1.3], "within spread"),
        ([1.0, 1.5, 2.0], [2.1, 2.2, 2.3], "within spread"),
        ([1.0], [2.0], "no spread known"),
        ([1.0], [1.0], "same"),
    ],
)
def test_verdicts(before: list[float], after: list[float], verdict: str, tmp_path: Path) -> None:
    old, new = result(tmp_path / "old", {"wall": before}), result(tmp_path / "new", {"wall": after})
    (found,) = compare(json.loads(old.read_text(encoding="utf-8")), json.loads(new.read_text(encoding="utf-8")))
    assert found.verdict == verdict
    assert found.ratio == sorted(after)[len(after) // 2] / sorted(before)[len(before) // 2]


def test_the_command(tmp_path: Path) -> None:
    old = result(tmp_path / "old", {"wall": [1, 1.01], "gone": [3]}, repeats=1)
    new = result(tmp_path / "new", {"wall": [2, 2.01], "CPU": [4]}, repeats=2)
    command = [sys.executable, "-m", "benchmarks.compare", str(old), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "settings: repeats was 1, is 2"
    assert "wall 1.005 2.005 1.995 s differs" in lines
    assert "CPU - 4 - s only new" in lines
    assert "gone 3 - - s only old" in lines
    assert lines[-1] == "1 of 3 figures differ beyond their spread"


def test_folders(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "notes.txt").write_text("no result", encoding="utf-8")
    result(old / "run.json", {"wall": [1, 1.01], "CPU": [3]}, repeats=1)
    result(new / "run.json", {"wall": [2, 2.01], "CPU": [3]}, repeats=2)
    result(old / "plan.json", {"build": [1, 1.01], "tensors": [5]}, "plan")
    result(new / "plan.json", {"build": [2, 2.01], "tensors": [5], "chunks": [7]}, "plan")
    result(old / "gone.json", {"wall": [1]})
    result(new / "come.json", {"wall": [1]})
    result(new / "more.json", {"wall": [1]})
    command = [sys.executable, "-m", "benchmarks.compare", str(old), str(new)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "== plan (plan.json)",
        "figure old new new/old",
        "build 1.005 2.005 1.995 s differs",
        "tensors 5 5 1.000 s same",
        "chunks - 7 - s only new",
        "1 of 3 figures differ beyond their spread",
        "",
        "== run (run.json)",
        "settings: repeats was 1, is 2",
        "figure old new new/old",
        "wall 1.005 2.005 1.995 s differs",
        "CPU 3 3 1.000 s same",
        "1 of 2 figures differ beyond their spread",
        "",
        "only old: gone.json",
        "only new: come.json, more.json",
        "in all, 2 of 5 figures of 2 results differ beyond their spread",
    ]


def test_folders_without_a_common_result(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    command = [sys.executable, "-m", "benchmarks.compare", str(tmp_path / "old"), str(tmp_path / "new")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "in all, 0 of 0 figures of 0 results differ beyond their spread\n"


@pytest.mark.parametrize(("old", "new"), [("a folder", "a file"), ("a file", "a folder")])
def test_a_file_is_not_compared_with_a_folder(old: str, new: str, tmp_path: Path) -> None:
    paths = {"a folder": tmp_path, "a file": result(tmp_path / "run.json", {"wall": [1]})}
    command = [sys.executable, "-m", "benchmarks.compare", str(paths[old]), str(paths[new])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"OLD is {old} and NEW is {new}: compare two files or two folders" in done.stderr


def test_two_benchmarks_are_not_compared(tmp_path: Path) -> None:
    paths = [result(tmp_path / name, {"wall": [1]}, benchmark=name) for name in ("run", "plan")]
    command = [sys.executable, "-m", "benchmarks.compare", *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "results of 'run' and of 'plan'" in done.stderr


def test_other_versions_are_told(tmp_path: Path) -> None:
    old = json.loads(result(tmp_path / "old", {}).read_text(encoding="utf-8"))
    new = {**old, "versions": {**old["versions"], "numba": "99"}}
    assert list(other_conditions(old, old)) == []
    assert list(other_conditions(old, new)) == [f"versions: numba was {old['versions']['numba']}, is 99"]


def test_another_commit_is_told(tmp_path: Path) -> None:
    saved = json.loads(result(tmp_path / "saved", {}).read_text(encoding="utf-8"))
    old, new = ({**saved, "versions": {**saved["versions"], "commit": name}} for name in ("1a2b3c4", "5d6e7f8-dirty"))
    assert list(other_conditions(old, new)) == ["versions: commit was 1a2b3c4, is 5d6e7f8-dirty"]


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power: float) -> None:
    sizes = [1e8, 3e8, 1e9, 2e9]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)
