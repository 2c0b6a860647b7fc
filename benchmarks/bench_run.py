"""A whole merge: TIES over a base and experts, cold, against the disk alone and against mergekit.

The limit is the time to read every input byte and write every output byte and compute nothing, measured in the same
run both through and past the page cache; the faster one counts. mergekit takes part where ``MERGEPIPE_MERGEKIT_PYTHON``
names a Python that has it.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.data import LAYOUTS, drop_from_cache, size_option, weight_files, write_checkpoints
from benchmarks.disk import fastest_io
from benchmarks.process import Usage, build, run, run_mergekit, ties_recipe
from benchmarks.report import Report, common_options


@click.command()
@size_option("0.5B")
@click.option("--experts", default=3, show_default=True)
@click.option("--density", default=0.2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--rival/--no-rival", default=True, help="Time mergekit too, if its Python is named.")
@common_options
def main(
    size: str,
    experts: int,
    density: float,
    repeats: int,
    rival: bool,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time a whole TIES merge, cold, against the disk alone and against mergekit."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    settings = {"size": size, "experts": experts, "density": density, "repeats": repeats, "parameters": 0}
    settings["parameters"] = LAYOUTS[size].parameters
    report = Report("run", settings)
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        warm_up(here / "warm-up")
        folders = write_checkpoints(here / "models", LAYOUTS[size], experts)
        recipe = ties_recipe(folders, density)
        limit = report_limit(report, folders, here, repeats)
        ours = [merge_cold(recipe, folders, here / f"ours-{i}") for i in range(repeats)]
        report_merges(report, ours, folders, limit)
        python = os.environ.get("MERGEPIPE_MERGEKIT_PYTHON") if rival else None
        if python:
            report_rival(report, ours, python, recipe, folders, here)
        else:
            click.echo("mergekit: not timed (MERGEPIPE_MERGEKIT_PYTHON is not set, or --no-rival)")
    report.save(json_path)


def warm_up(folder: Path) -> None:
    """Let the kernels be compiled into their cache, so that no measured run does it."""
    folders = write_checkpoints(folder / "models", LAYOUTS["1M"], 3)
    build(ties_recipe(folders), folder)
    run(folder)
    shutil.rmtree(folder)


def report_limit(report: Report, folders: list[Path], here: Path, repeats: int) -> float:
    """Measure the disk; seconds of the faster way."""
    files = weight_files(folders)
    nbytes = sum(file.stat().st_size for file in weight_files(folders[:1]))
    report.add("input bytes", sum(file.stat().st_size for file in files) / 1e9, "GB")
    report.add("output bytes", nbytes / 1e9, "GB")
    times = fastest_io(files, here / "io", nbytes, repeats)
    return min([report.add(f"I/O alone, {way}", seconds, "s") for way, seconds in times.items()])


def merge_cold(recipe: dict[str, Any], folders: list[Path], folder: Path) -> dict[str, Usage]:
    """Build and run once with nothing of the inputs in the page cache, and remove what came out."""
    drop_from_cache(weight_files(folders))
    built = build(recipe, folder)
    drop_from_cache(weight_files(folders))
    used = {"build": built, "run": run(folder, watch=True)}
    shutil.rmtree(folder)
    return used


def report_merges(report: Report, merges: list[dict[str, Usage]], folders: list[Path], limit: float) -> None:
    """Print what our merges took."""
    gigabytes = sum(file.stat().st_size for file in weight_files(folders)) / 1e9
    output = sum(file.stat().st_size for file in weight_files(folders[:1])) / 1e9
    report.add("mergepipe build", [used["build"].wall_s for used in merges], "s")
    wall = report.add("mergepipe run", [used["run"].wall_s for used in merges], "s")
    cpu = report.add("mergepipe run, CPU", [used["run"].cpu_s for used in merges], "s")
    report.add("mergepipe run, bytes read and written per second", (gigabytes + output) / wall, "GB/s")
    report.add("mergepipe run, CPU per GB of input", cpu / gigabytes, "s/GB")
    report.add("mergepipe run, peak anonymous memory", [used["run"].peak_anonymous / 2**20 for used in merges], "MiB")
    report.add("mergepipe run / I/O alone", [used["run"].wall_s / limit for used in merges], "x")


def report_rival(
    report: Report, ours: list[dict[str, Usage]], python: str, recipe: dict[str, Any], folders: list[Path], here: Path
) -> None:
    """Time mergekit once on the same files, cold, and print the ratios."""
    drop_from_cache(weight_files(folders))
    used = run_mergekit(python, recipe, here / "rival")
    report.add("mergekit", used.wall_s, "s")
    report.add("mergekit, CPU", used.cpu_s, "s")
    report.add("mergekit, peak anonymous memory", used.peak_anonymous / 2**20, "MiB")
    wall = statistics.median(merge["build"].wall_s + merge["run"].wall_s for merge in ours)
    cpu = statistics.median(merge["build"].cpu_s + merge["run"].cpu_s for merge in ours)
    report.add("mergekit / mergepipe build and run, wall", used.wall_s / wall, "x")
    report.add("mergekit / mergepipe build and run, CPU", used.cpu_s / cpu, "x")


if __name__ == "__main__":
    main()
