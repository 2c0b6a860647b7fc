"""Whole merges over a base and experts, cold, against the disk alone, torch in memory and mergekit.

The limit is the time to read every input byte and write every output byte past the page cache and compute nothing (or
through it, where the file system knows no other way), with as many reads and writes at once as a run has. It is
measured anew with each merge, before one and after the next, since machines are noisy and whoever comes second may find
in a cache of the machine below what the first one has read: each ratio is of neighbours. Before all that every input
is read once, for the same reason. The rivals take part in the methods that they have: torch, with all models in memory,
and mergekit, where ``MERGEPIPE_MERGEKIT_PYTHON`` names a Python that has it or ``make test-mergekit`` has set one up.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click

from benchmarks.data import LAYOUTS, drop_from_cache, size_option, weight_files, write_checkpoints
from benchmarks.disk import io_alone
from benchmarks.process import Usage, build, run, run_mergekit, run_torch
from benchmarks.recipes import recipe_for
from benchmarks.report import Report, common_options

TADROP = "ties+tadrop"
METHODS = (
    "linear",
    "task_arithmetic",
    "slerp",
    "ties",
    TADROP,
    "dare_linear",
    "dare_ties",
    "breadcrumbs",
    "breadcrumbs_ties",
    "scf_rkl",
)
"""Those that are to be as fast as the disk."""

OURS_ALONE = (TADROP, "scf_rkl")
"""What mergekit has not."""

BY_HAND = ("linear", "task_arithmetic", "slerp", "ties")
"""What :mod:`benchmarks.torch_merge` has; it is not imported for that, as it takes torch in."""

MERGEKIT = Path(__file__).parents[1] / ".venv-mergekit" / "bin" / "python"
"""Where ``make test-mergekit`` puts it."""


Rival = Callable[[dict[str, Any], Path], Usage]
"""Merges by a recipe, into a new folder."""


@dataclass(frozen=True)
class Merge:
    """One merge.

    Attributes
    ----------
    build, run : Usage
    manifest : dict
        Of the output: bytes as the kernel counts them are in it.
    start_s : float
        From the start of `mergepipe run` until it begins to read tensors.
    """

    build: Usage
    run: Usage
    manifest: dict[str, Any]
    start_s: float


@click.command()
@size_option("0.5B")
@click.option("--experts", default=3, show_default=True)
@click.option("--density", default=0.2, show_default=True)
@click.option(
    "--method", "methods", type=click.Choice([*METHODS, "all"]), multiple=True, default=["ties"], show_default=True
)
@click.option(
    "--reader",
    "readers",
    type=click.Choice(["auto", "direct", "mmap"]),
    multiple=True,
    default=["direct", "mmap"],
    show_default=True,
)
@click.option("--repeats", default=3, show_default=True)
@click.option("--rival/--no-rival", default=True, help="Time torch in memory, and mergekit where it is.")
@common_options
def main(
    size: str,
    experts: int,
    density: float,
    methods: tuple[str, ...],
    readers: tuple[str, ...],
    repeats: int,
    rival: bool,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time whole merges, cold, against the disk alone, torch in memory and mergekit."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    chosen = list(METHODS) if "all" in methods else list(dict.fromkeys(methods))
    settings = {"size": size, "experts": experts, "density": density, "repeats": repeats}
    report = Report("run", {**settings, "parameters": LAYOUTS[size].parameters})
    python = mergekit_python() if rival and not quick else None
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        folders = write_checkpoints(here / "models", LAYOUTS[size], experts)
        warm_up(here / "warm-up", chosen, [experts])
        output = sum(file.stat().st_size for file in weight_files(folders[:1]))
        io_alone(weight_files(folders), here / "io", output)
        for method in chosen:
            recipe = recipe_of(method, folders, density)
            for reader in readers:
                merges, alone = measure_in_turn(recipe, here, reader, output, repeats)
                report_merges(report, f"{method}, {reader}", recipe, merges, alone, output)
            if rival and method in BY_HAND:
                report_rival(report, method, "torch", merges[-1], recipe, here, run_torch)
            if python and method not in OURS_ALONE:
                theirs = partial(run_mergekit, python)
                report_rival(report, method, "mergekit", merges[-1], recipe, here, theirs)
    if not python:
        click.echo("mergekit: not timed (it is not there, or it was not wanted)")
    report.save(json_path)


def mergekit_python() -> str | None:
    """The Python that has mergekit, if there is one."""
    return os.environ.get("MERGEPIPE_MERGEKIT_PYTHON") or (str(MERGEKIT) if MERGEKIT.exists() else None)


def measure_in_turn(
    recipe: dict[str, Any], here: Path, reader: str, output: int, repeats: int
) -> tuple[list[Merge], list[float]]:
    """Merges, and seconds of the disk alone beside each: before the first, after the second, and so on."""
    merges, alone = [], []
    for number in range(repeats):
        if number % 2:
            merges.append(merge_cold(recipe, here / "ours", reader))
        alone.append(io_alone(inputs_of(recipe), here / "io", output))
        if not number % 2:
            merges.append(merge_cold(recipe, here / "ours", reader))
    return merges, alone


def recipe_of(method: str, folders: list[Path], density: float) -> dict[str, Any]:
    """The recipe of one of :data:`METHODS`, the base first among the folders."""
    recipe = recipe_for(method.partition("+")[0], folders)
    if method == TADROP:
        recipe["sparsify"] = "tadrop"
        del recipe["parameters"]["density"]
    elif "density" in recipe["parameters"]:
        recipe["parameters"]["density"] = density
    return recipe


def inputs_of(recipe: dict[str, Any]) -> list[Path]:
    """The weight files that a recipe reads."""
    base = [recipe["base_model"]] if "base_model" in recipe else []
    return weight_files([Path(name) for name in (*base, *(model["model"] for model in recipe["models"]))])


def warm_up(folder: Path, methods: Sequence[str] = ("ties",), experts: Sequence[int] = (3,)) -> None:
    """Let the kernels for so many experts be compiled into their cache, so that no measured run does it."""
    # Large enough for tensors of every kind: thresholds of more than a million elements are guessed first.
    folders = write_checkpoints(folder / "models", LAYOUTS["10M"], max(experts))
    for method in methods:
        for count in experts:
            build(recipe_of(method, folders[: count + 1], 0.2), folder / f"{method}-{count}")
            run(folder / f"{method}-{count}")
    shutil.rmtree(folder)


def merge_cold(recipe: dict[str, Any], folder: Path, reader: str = "auto") -> Merge:
    """Build and run with nothing of the inputs in the page cache, and remove what came out."""
    files = inputs_of(recipe)
    drop_from_cache(files)
    built = build(recipe, folder)
    drop_from_cache(files)
    began = time.time()
    used = run(folder, "--reader", reader, watch=True)
    events = [json.loads(line) for line in (folder / "work" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    at = next(event["at"] for event in events if event["event"] == "RunStarted")
    manifest = json.loads((folder / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return Merge(built, used, manifest, at - began)


def report_merges(
    report: Report, title: str, recipe: dict[str, Any], merges: list[Merge], alone: list[float], output: int
) -> None:
    """Print what some merges by one recipe took, and of what the disk `alone` took before each."""
    read = sum(file.stat().st_size for file in inputs_of(recipe))

    def add(what: str, values: list[float], unit: str) -> None:
        report.add(f"{title}: {what}", values, unit)

    add("inputs read and output written once", [(read + output) / 1e9], "GB")
    add("I/O alone", alone, "s")
    add("build", [merge.build.wall_s for merge in merges], "s")
    add("run", [merge.run.wall_s for merge in merges], "s")
    add("run until it begins to read", [merge.start_s for merge in merges], "s")
    add("run, CPU", [merge.run.cpu_s for merge in merges], "s")
    add("run, CPU per GB of input", [merge.run.cpu_s * 1e9 / read for merge in merges], "s/GB")
    add("run, peak anonymous memory", [merge.run.peak_anonymous / 2**20 for merge in merges], "MiB")
    add("bytes read / input bytes", [merge.manifest["disk_bytes_read"] / read for merge in merges], "x")
    add("bytes written / output bytes", [merge.manifest["disk_bytes_written"] / output for merge in merges], "x")
    add("run / I/O alone", [merge.run.wall_s / io_s for merge, io_s in zip(merges, alone, strict=True)], "x")


def report_rival(
    report: Report, method: str, name: str, ours: Merge, recipe: dict[str, Any], here: Path, rival: Rival
) -> None:
    """Time a rival once on the same recipe, cold, and print the ratios to a merge of ours just before."""
    drop_from_cache(inputs_of(recipe))
    used = rival(recipe, here / "rival")
    shutil.rmtree(here / "rival")
    wall, cpu = ours.build.wall_s + ours.run.wall_s, ours.build.cpu_s + ours.run.cpu_s
    report.add(f"{method}: {name}", used.wall_s, "s")
    report.add(f"{method}: {name}, CPU", used.cpu_s, "s")
    report.add(f"{method}: {name}, peak anonymous memory", used.peak_anonymous / 2**20, "MiB")
    report.add(f"{method}: {name}, peak resident memory", used.peak_rss / 2**20, "MiB")
    report.add(f"{method}: {name} / mergepipe build and run, wall", used.wall_s / wall, "x")
    report.add(f"{method}: {name} / mergepipe build and run, CPU", used.cpu_s / cpu, "x")


if __name__ == "__main__":
    main()
