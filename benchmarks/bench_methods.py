"""CPU time of every method in whole runs: per element read, and for whole matrices per multiplication.

What `benchmarks/cost.py` computes times from. Each method merges one bf16 matrix of a base and its experts, in this
process and with one worker: first a small one, so that its kernels are compiled, then two sizes whose difference leaves
start-up out. Methods that factor whole matrices are timed once, on a matrix that takes the way of large ones (Gram
matrices): their time goes with models x smaller side squared x larger side, which is given in nanoseconds per product.

    python -m benchmarks.bench_methods --json benchmarks/measured.json
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import yaml

import mergepipe
from benchmarks.data import weight_files, write_matrices
from benchmarks.recipes import recipe_for
from benchmarks.report import Report, common_options
from mergepipe.pipeline.summary import scheduled
from mergepipe.tasks.registry import METHODS

PER_ELEMENT = "CPU per element read"
PER_PRODUCT = "CPU per product"
WIDTH = 4096


@click.command()
@click.option("--rows", default=4096, show_default=True, help="Of the larger of the matrices, 4,096 columns wide.")
@click.option("--side", default=1536, show_default=True, help="Rows of the matrix for methods that factor it.")
@click.option("--experts", default=2, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Only these methods.")
@common_options
def main(
    rows: int,
    side: int,
    experts: int,
    repeats: int,
    chosen: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time whole runs of every method that merges whole models."""
    width = WIDTH
    if quick:
        rows, side, width, chosen = 64, 32, 256, chosen or ("linear", "ties", "tsv_m")
    settings = {"rows": rows, "side": side, "width": width, "experts": experts, "repeats": repeats}
    report = Report("methods", settings)
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        small = write_matrices(here / "small", (rows // 4, width), experts)
        large = write_matrices(here / "large", (rows, width), experts)
        matrix = write_matrices(here / "matrix", (side, width), experts)
        for method in chosen or [key for key, one in METHODS.items() if one.takes == "models"]:
            count = min(METHODS[method].max_models or experts, experts)
            first = cpu_seconds(method, small, here / "work")
            if first.factored:
                times = [cpu_seconds(method, matrix, here / "work").seconds for _ in range(repeats)]
                products = count * min(side, width) ** 2 * max(side, width)
                report.add(f"{method}: {PER_PRODUCT}", [1e9 * taken / products for taken in times], "ns")
                continue
            times = []
            for _ in range(repeats):
                less, more = (cpu_seconds(method, which, here / "work").seconds for which in (small, large))
                times.append(max(0.0, more - less))
            read = (rows - rows // 4) * width * tensors_read(method, count)
            report.add(f"{method}: {PER_ELEMENT}", [1e9 * taken / read for taken in times], "ns")
    report.save(json_path)


class Taken(NamedTuple):
    """Processor time of a run, and whether it factored whole matrices."""

    seconds: float
    factored: bool


def tensors_read(method: str, models: int) -> int:
    """Input tensors of one output tensor: the models, their importances, and the base where the method takes one."""
    found = METHODS[method]
    return models * (2 if found.importance else 1) + (found.base != "ignored")


def cpu_seconds(method: str, folders: Sequence[Path], work: Path) -> Taken:
    """Run a method once with one worker."""
    work.mkdir()
    importance = magnitudes(folders[0], work / "importance") if METHODS[method].importance else None
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(method, folders, importance)))
    plan = mergepipe.build(work / "recipe.yaml", work=work / "work", out=work / "out")
    began = time.process_time()
    mergepipe.run(work / "work", workers=1)
    taken = time.process_time() - began
    shutil.rmtree(work)
    return Taken(taken, any(item.steps for item in scheduled(plan, workers=1)))


def magnitudes(model: Path, folder: Path) -> Path:
    """A copy of a model without its signs."""
    shutil.copytree(model, folder)
    (file,) = weight_files([folder])
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(raw[:start] + (np.frombuffer(raw, "<u2", offset=start) & 0x7FFF).tobytes())
    return folder


if __name__ == "__main__":
    main()
