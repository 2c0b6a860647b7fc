"""Where the time of a run goes: at how many moments the disk, compiled loops, or neither of them are at work.

A run is to be as long as its I/O or its arithmetic take, whichever is longer. What else it does (planning, journal,
graphs, hashing) may take its time beside them, not after them: moments at which no thread waits for the disk and no
kernel runs are what it costs, and of these the first second, in which the process starts, is told apart. The threads
are looked at by :mod:`benchmarks.watched`, which slows a run by some hundredths.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from benchmarks.bench_run import METHODS, inputs_of, recipe_of, warm_up
from benchmarks.data import LAYOUTS, drop_from_cache, size_option, write_checkpoints
from benchmarks.process import build, measure
from benchmarks.report import Report, common_options

START_S = 1.0
AT_WORK = {"disk", "kernels"}

Instants = list[dict[str, Any]]
"""As :class:`benchmarks.watched.Watch` has them."""


@click.command()
@size_option("0.5B")
@click.option("--experts", default=3, show_default=True)
@click.option("--density", default=0.2, show_default=True)
@click.option("--method", "methods", type=click.Choice(METHODS), multiple=True, default=["ties"], show_default=True)
@click.option("--repeats", default=3, show_default=True)
@common_options
def main(
    size: str,
    experts: int,
    density: float,
    methods: tuple[str, ...],
    repeats: int,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Look at the threads of whole runs, cold."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    report = Report("shares", {"size": size, "experts": experts, "density": density, "repeats": repeats})
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        folders = write_checkpoints(here / "models", LAYOUTS[size], experts)
        warm_up(here / "warm-up", methods, [experts])
        for method in methods:
            recipe, runs = recipe_of(method, folders, density), []
            for _ in range(repeats):
                build(recipe, here / "ours")
                drop_from_cache(inputs_of(recipe))
                command = ["run", "-w", str(here / "ours" / "work"), "--quiet", "--reader", "direct"]
                measure([sys.executable, "-m", "benchmarks.watched", str(here / "seen.json"), *command])
                runs.append(json.loads((here / "seen.json").read_text(encoding="utf-8")))
                shutil.rmtree(here / "ours")
            report_shares(report, method, runs)
    report.save(json_path)


def report_shares(report: Report, method: str, runs: list[Instants]) -> None:
    """Print the shares of the moments of some runs, and of the processor time that went by."""

    def add(what: str, moments: Callable[[float, set[str]], bool]) -> None:
        found = [sum(moments(one["at"], set(one["seen"])) for one in instants) / len(instants) for instants in runs]
        report.add(f"{method}: {what} / wall", found, "x")

    report.add(f"{method}: run, looked at", [instants[-1]["at"] for instants in runs], "s")
    for kind in sorted(AT_WORK):
        add(f"{kind} at work", lambda at, seen, kind=kind: kind in seen)
    add("neither, in the first second", lambda at, seen: at < START_S and not seen & AT_WORK)
    add("neither, later", lambda at, seen: at >= START_S and not seen & AT_WORK)
    for kind in ("kernels", "disk", "hashing", "dask", "waiting", "rest"):
        shares = []
        for instants in runs:
            total = sum((Counter(one["cpu_s"]) for one in instants), Counter[str]())
            shares.append(total[kind] / total.total())
        report.add(f"{method}: {kind} / CPU", shares, "x")


if __name__ == "__main__":
    main()
