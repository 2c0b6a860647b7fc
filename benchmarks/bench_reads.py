"""How often a merge reads large matrices, cold, past the page cache: under a small ceiling, and one that holds them.

Rows have moved more and less, as those of a fine-tune have, so that a sample of some blocks says less about the rest
than chance alone would have it. Beside what was read stands what `plan` foretells.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.bench_run import METHODS, inputs_of, recipe_of, warm_up
from benchmarks.data import drop_from_cache, write_matrices
from benchmarks.process import build, run
from benchmarks.report import Report, common_options
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.summary import summarize
from mergepipe.storage.workspace import Workspace

CHOSEN = ("task_arithmetic", "slerp", "ties", "ties+tadrop", "breadcrumbs", "scf_rkl")


@click.command()
@click.option("--rows", default=8192, show_default=True)
@click.option("--columns", default=8192, show_default=True)
@click.option("--matrices", default=8, show_default=True, help="Of each model.")
@click.option("--spread", default=0.2, show_default=True, help="Of the logarithm of how far rows have moved.")
@click.option("--memory", default="512MiB", show_default=True, help="The ceiling of the runs.")
@click.option("--ample", default="4GiB", show_default=True, help="A ceiling under which all of a tensor's copies fit.")
@click.option("--method", "chosen", multiple=True, type=click.Choice(METHODS), default=CHOSEN, show_default=True)
@common_options
def main(
    rows: int,
    columns: int,
    matrices: int,
    spread: float,
    memory: str,
    ample: str,
    chosen: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Count the bytes that merges of a base and two experts read, and compare with the plan."""
    if quick:
        rows, columns, matrices, memory, chosen = 1024, 4096, 2, "300MiB", ("ties",)
    settings: dict[str, Any] = {"rows": rows, "columns": columns, "matrices": matrices, "spread": spread}
    settings |= {"memory": memory, "ample": ample}
    report = Report("reads", settings)
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        if not quick:
            warm_up(here / "warm-up", chosen, (2,))
        folders = write_matrices(here / "models", (rows, columns), 2, count=matrices, spread=spread)
        for method in chosen:
            report_method(report, method, folders, here / "merge", memory)
        for method in chosen:
            report_method(report, method, folders, here / "merge", ample, f", under {ample}")
    report.save(json_path)


def report_method(report: Report, method: str, folders: list[Path], here: Path, memory: str, under: str = "") -> None:
    """Merge by one method, and add its figures."""
    recipe = recipe_of(method, folders, 0.2)
    build(recipe, here, "--memory", memory)
    foretold = summarize(Plan.from_json(Workspace(here / "work").read_plan()))["read_bytes"]
    files = inputs_of(recipe)
    drop_from_cache(files)
    used = run(here, "--reader", "direct")
    found = json.loads((here / "merged" / "mergepipe_manifest.json").read_text())
    shutil.rmtree(here)
    inputs = sum(file.stat().st_size for file in files)
    report.add(f"{method}{under}: bytes read / input bytes", found["disk_bytes_read"] / inputs, "x")
    report.add(f"{method}{under}: bytes read / as `plan` foretells", found["disk_bytes_read"] / foretold, "x")
    report.add(f"{method}{under}: run", used.wall_s, "s")
    report.add(f"{method}{under}: peak anonymous memory", found["peak_anonymous_bytes"] / 2**20, "MiB")


if __name__ == "__main__":
    main()
