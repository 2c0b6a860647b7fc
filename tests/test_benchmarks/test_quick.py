"""Every benchmark runs at its quick size and saves figures; none of them is held to a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from benchmarks.cost import START_UP_S

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))
PROOFS = ("proof_7b", "proof_70b")


def quick(name: str, tmp_path: Path, *options: str) -> dict[str, Any]:
    """Run ``python -m benchmarks.NAME --quick --json FILE``; the report, which must leave nothing else behind."""
    saved = tmp_path / "figures.json"
    environment = {key: value for key, value in os.environ.items() if key != "MERGEPIPE_MERGEKIT_PYTHON"}
    places = ["--json", str(saved), "--folder", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", *places, *options],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(saved.read_text(encoding="utf-8"))
    assert report["versions"]["mergepipe"] != "not installed"
    assert report["versions"]["commit"]
    assert all(math.isfinite(figure["value"]) for figure in report["figures"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"], "temporary data was left behind"
    found: dict[str, Any] = report
    return found


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick(name: str, tmp_path: Path) -> None:
    """Every benchmark measures something."""
    assert quick(name, tmp_path)["figures"]


def test_plan_of_many_tensors(tmp_path: Path) -> None:
    """Of each plan that is timed it is said how much it is, and of two of one kind how time grows between them."""
    report = quick("bench_plan", tmp_path, "--method", "linear")
    figures = {figure["name"]: figure["value"] for figure in report["figures"]}
    for count in (86, 341):
        assert figures[f"{count} tensors: tensors"] == count
        assert figures[f"{count} tensors: chunks"] > count
    assert "exponent of build over tensors, 86 to 341" in figures


@pytest.mark.parametrize("one_graph", [True, False])
def test_dask_memory(one_graph: bool, tmp_path: Path) -> None:
    """Peaks are of our bundles and, unless it is not wanted, of one graph of all tasks."""
    report = quick("bench_dask", tmp_path, *([] if one_graph else ["--no-one-graph"]))
    peaks = {figure["name"]: figure["value"] for figure in report["figures"] if figure["name"].startswith("peak")}
    kinds = ["our bundles", "one graph"] if one_graph else ["our bundles"]
    assert list(peaks) == [f"peak memory over the pool, {kind}" for kind in kinds]
    assert min(peaks.values()) > 0


@pytest.mark.parametrize("name", PROOFS)
def test_proof(name: str, tmp_path: Path) -> None:
    """A small proof holds, kills included; a machine that lacks what it takes is named."""
    report = quick(name, tmp_path)
    if "skipped" in report["settings"]:
        pytest.skip(report["settings"]["skipped"])
    figures = {figure["name"]: figure["value"] for figure in report["figures"]}
    assert figures["kills survived"] == 2
    assert figures["processes"] == 3
    assert 0 < figures["peak anonymous memory"] <= figures["ceiling"]
    assert min(figures[f"{what} rate, measured before the run"] for what in ("read", "write")) > 0
    slower = max(figures[f"seconds of the {what}, computed"] for what in ("disk", "processors"))
    assert figures["seconds, computed (benchmarks/cost.py)"] == pytest.approx(START_UP_S + slower)
    equal = "tensors equal to those of the two-layer merge"
    if name == "proof_70b":
        assert figures[equal] == figures["tensors of each"] == 9 * 4 + 3
        assert figures["models, on the disk"] < 0.8 * figures["models, as their files say"]
        assert figures["seconds, measured with what the kills lost"] > 0
    else:
        assert figures["files equal to those of a merge without kills"] > 3
        assert figures["seconds, measured without kills"] > 0


@pytest.mark.parametrize("name", [*BENCHMARKS, *PROOFS])
def test_help(name: str) -> None:
    """Every benchmark says what it does."""
    done = CliRunner().invoke(import_module(f"benchmarks.{name}").main, ["--help"])
    assert done.exit_code == 0
    assert "--quick" in done.output
    assert "--json" in done.output
