"""Whether time grows with bytes and no faster: whole TIES merges of several sizes and numbers of models, cold.

Prints wall and CPU time of each, and the exponents of a power law through them: over parameters at each K, and over
the number of models at the largest size. As start-up is much of a small merge, there is a third time: the wall time
from where tensors begin to be read. One size lies on the disk at a time, with as many experts as the largest K
asks for: 2 B parameters with eight experts take 36 GB, and 4 GB for the output.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.bench_run import merge_cold, warm_up
from benchmarks.data import LAYOUTS, write_checkpoints
from benchmarks.process import ties_recipe
from benchmarks.report import Report, common_options

SIZES = ("0.1B", "0.3B", "1B", "2B")


@click.command()
@click.option("--size", "sizes", multiple=True, type=click.Choice(list(LAYOUTS)), default=SIZES, show_default=True)
@click.option("--models", "counts", multiple=True, type=click.IntRange(1), default=(2, 3, 8), show_default=True)
@click.option("--repeats", default=1, show_default=True)
@common_options
def main(
    sizes: tuple[str, ...],
    counts: tuple[int, ...],
    repeats: int,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time merges of growing models and growing numbers of them, and fit exponents."""
    if quick:
        sizes, counts, repeats = ("1M", "4M"), (1,), 1
    report = Report("growth", {"sizes": list(sizes), "models": list(counts), "repeats": repeats})
    times: dict[tuple[str, int, str], float] = {}
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        here = Path(name)
        if not quick:
            warm_up(here / "warm-up", experts=counts)
        for size in sizes:
            folders = write_checkpoints(here / "models", LAYOUTS[size], max(counts))
            for count in counts:
                chosen = folders[: count + 1]
                merges = [merge_cold(ties_recipe(chosen), here / "merge") for _ in range(repeats)]
                title = f"{size}, {count} models"
                found = {
                    "wall": [one.run.wall_s for one in merges],
                    "wall after start-up": [one.run.wall_s - one.start_s for one in merges],
                    "CPU": [one.run.cpu_s for one in merges],
                }
                for kind, taken in found.items():
                    times[size, count, kind] = report.add(f"{title}: run, {kind}", taken, "s")
            shutil.rmtree(here / "models")
    parameters = [LAYOUTS[size].parameters for size in sizes]
    for kind in ("wall", "wall after start-up", "CPU"):
        if len(sizes) > 1:
            for count in counts:
                power = exponent(parameters, [times[size, count, kind] for size in sizes])
                report.add(f"exponent of {kind} over parameters, {count} models", power, "")
        if len(counts) > 1:
            power = exponent([count + 1 for count in counts], [times[sizes[-1], count, kind] for count in counts])
            report.add(f"exponent of {kind} over models read, {sizes[-1]}", power, "")
    report.save(json_path)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """The power of size that time goes with: the slope of a line through the logarithms, by least squares.

    Examples
    --------
    >>> exponent([1, 2, 4], [3, 12, 48])
    2.0
    """
    x, y = [math.log(size) for size in sizes], [math.log(time) for time in times]
    middle, level = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return slope / sum((a - middle) ** 2 for a in x)


if __name__ == "__main__":
    main()
