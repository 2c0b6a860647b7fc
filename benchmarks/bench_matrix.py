"""One whole matrix merged for real under a ceiling: its projected and its measured peak of anonymous memory.

By default the largest matrix of a 70B model, 8192 x 28672 in bfloat16, of a base and two experts, by MDA. The run is a
process of its own with one worker: a second one would have nothing to do.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.data import write_matrices
from benchmarks.process import build, run
from benchmarks.report import Report, common_options


@click.command()
@click.option("--rows", default=8192, show_default=True)
@click.option("--columns", default=28_672, show_default=True)
@click.option("--models", default=2, show_default=True, help="Experts; the base is not counted.")
@click.option("--method", default="mda", show_default=True, help="A method that looks at whole matrices.")
@click.option("--memory", default="7GiB", show_default=True, help="The ceiling of the run.")
@common_options
def main(
    rows: int,
    columns: int,
    models: int,
    method: str,
    memory: str,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Merge one large matrix and measure what it takes."""
    shape = (96, 160) if quick else (rows, columns)
    settings = {"shape": list(shape), "models": models, "method": method, "memory": memory}
    report = Report("matrix", settings)
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        base, *experts = write_matrices(here / "models", shape, models)
        recipe = {
            "merge_method": method,
            "base_model": str(base),
            "models": [{"model": str(path)} for path in experts],
        }
        build(recipe, here / "merge", "--memory", memory)
        report.add("projected", _projected(here / "merge" / "work"), "MiB")
        used = run(here / "merge", "--workers", "1", "--memory", memory, "--device", "cpu", watch=True)
    report.add("measured peak of anonymous memory", used.peak_anonymous / 2**20, "MiB")
    report.add("time", used.wall_s, "s")
    report.add("CPU time", used.cpu_s, "s")
    report.save(json_path)


def _projected(work: Path) -> float:
    """MiB that the plan says the process takes with one worker."""
    from mergepipe.pipeline.plan import Plan
    from mergepipe.pipeline.summary import scheduled
    from mergepipe.storage.workspace import Workspace

    plan = Plan.from_json(Workspace(work).read_plan())
    return max(item.projected for item in scheduled(plan, workers=1)) / 2**20


if __name__ == "__main__":
    main()
