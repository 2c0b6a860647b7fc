"""How soon a command does what it was asked for: `--help`, and `run` until it begins to read the inputs' tensors.

The yardstick is the interpreter alone, in the same run; and the 0.3 s and 1.5 s that are the most we allow ourselves.
The kernels are in numba's cache, as they are from the second run of a method on. The CPU time of the smallest merge
shows what starting and ending takes.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from benchmarks.bench_run import merge_cold, warm_up
from benchmarks.data import LAYOUTS, size_option, write_checkpoints
from benchmarks.process import Usage, measure, ties_recipe
from benchmarks.report import Report, common_options

HELP_S = 0.3
RUN_S = 1.5


@click.command()
@size_option("0.1B")
@click.option("--experts", default=3, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@common_options
def main(size: str, experts: int, repeats: int, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time `mergepipe --help`, and `mergepipe run` of TIES, cold, until it begins to read."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    report = Report("start", {"size": size, "experts": experts, "repeats": repeats})
    commands = {"python -c pass": ["-c", "pass"], "mergepipe --help": ["-m", "mergepipe", "--help"]}
    used: dict[str, list[Usage]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, arguments in commands.items():
            used[name].append(measure([sys.executable, *arguments]))
    for name, times in used.items():
        report.add(name, [one.wall_s for one in times], "s")
        report.add(f"{name}, CPU", [one.cpu_s for one in times], "s")
    report.add(f"mergepipe --help / {HELP_S} s", [one.wall_s / HELP_S for one in used["mergepipe --help"]], "x")
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        if not quick:
            warm_up(here / "warm-up")
        for kind in dict.fromkeys(["1M", size]):
            recipe = ties_recipe(write_checkpoints(here / kind, LAYOUTS[kind], experts))
            merges = [merge_cold(recipe, here / "merge") for _ in range(repeats)]
            starts = [merge.start_s for merge in merges]
            until = f"run of {kind} parameters until it begins to read"
            report.add(until, starts, "s")
            report.add(f"{until} / {RUN_S} s", [start / RUN_S for start in starts], "x")
            report.add(f"the whole run of {kind} parameters", [merge.run.wall_s for merge in merges], "s")
            report.add(f"the whole run of {kind} parameters, CPU", [merge.run.cpu_s for merge in merges], "s")
    report.save(json_path)


if __name__ == "__main__":
    main()
