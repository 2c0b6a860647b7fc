"""Every benchmark runs at its quick size and saves figures; none of them is held to a time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_quick(name: str, tmp_path: Path) -> None:
    """``python -m benchmarks.NAME --quick --json FILE``."""
    saved = tmp_path / "figures.json"
    environment = {key: value for key, value in os.environ.items() if key != "MERGEPIPE_MERGEKIT_PYTHON"}
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--json", str(saved), "--folder", str(tmp_path)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(saved.read_text())
    assert report["versions"]["mergepipe"] != "not installed"
    assert report["figures"], done.stdout
    assert all(math.isfinite(figure["value"]) for figure in report["figures"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json"], "temporary data was left behind"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help(name: str) -> None:
    """Every benchmark says what it does."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert "--quick" in done.stdout
    assert "--json" in done.stdout
