"""Peak anonymous memory of a run, in a process of its own: of models of several sizes, and of more and more models.

The figures that matter are that the last is no larger than the first by more than noise, and that all are under the
ceiling. Anonymous memory is what the process cannot give back: windows of mapped inputs don't count, heaps, buffers,
imports and compiled code do.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from benchmarks.bench_run import warm_up
from benchmarks.data import LAYOUTS, weight_files, write_checkpoints
from benchmarks.process import build, run, ties_recipe
from benchmarks.report import Report, common_options


@click.command()
@click.option("--sizes", default="0.1B,0.25B,0.5B", show_default=True, help="Layouts, with commas; 4 models of each.")
@click.option("--models", default="1,2,5,8", show_default=True, help="Numbers of experts, of the first size.")
@click.option("--memory", default="512MiB", show_default=True, help="The ceiling of the run.")
@click.option("--workers", default=2, show_default=True)
@common_options
def main(
    sizes: str, models: str, memory: str, workers: int, quick: bool, json_path: Path | None, folder: Path | None
) -> None:
    """Measure the peak anonymous memory of TIES over a base and experts: several sizes, several numbers."""
    names, counts = (["1M"], [1, 2]) if quick else (sizes.split(","), [int(count) for count in models.split(",")])
    report = Report("memory", {"sizes": names, "models": counts, "memory": memory, "workers": workers})
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        if not quick:
            warm_up(here / "warm-up", experts=sorted({3, *counts}))
        peaks = [report_size(report, size, 3, here, memory, workers) for size in names]
        report.add("last size / first size", peaks[-1] / peaks[0], "x")
        peaks = [report_size(report, names[0], count, here, memory, workers) for count in counts]
        report.add(f"{counts[-1]} models / {counts[0]}", peaks[-1] / peaks[0], "x")
    report.save(json_path)


def report_size(report: Report, size: str, experts: int, here: Path, memory: str, workers: int) -> float:
    """Merge checkpoints of one size and report the peak in MiB."""
    folders = write_checkpoints(here / "models", LAYOUTS[size], experts)
    title = f"{size}, {experts} models"
    gigabytes = sum(file.stat().st_size for file in weight_files(folders)) / 1e9
    build(ties_recipe(folders), here / "merge", "--memory", memory)
    used = run(here / "merge", "--workers", str(workers), watch=True)
    for path in (here / "models", here / "merge"):
        shutil.rmtree(path)
    report.add(f"{title}: inputs", gigabytes, "GB")
    report.add(f"{title}: peak resident memory, mapped inputs included", used.peak_rss / 2**20, "MiB")
    return report.add(f"{title}: peak anonymous memory", used.peak_anonymous / 2**20, "MiB")


if __name__ == "__main__":
    main()
