"""What Dask costs us: CPU per task of our bundles when the tasks do nothing, and the memory of many of them.

The yardstick, in the same run, is the thread pool alone: the same number of empty calls submitted to it and awaited.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.process import anonymous_bytes
from benchmarks.report import Report, common_options
from mergepipe.pipeline.graph import bundles, count_tasks, run_bundle, tensor_graph
from mergepipe.pipeline.workers import Workers

SWEEPS = 2


class Idle:
    """A tensor whose units do nothing; see :class:`mergepipe.pipeline.graph.Work`."""

    def __init__(self, units: int) -> None:
        self.sweeps: Sequence[Any] = range(SWEEPS)
        self.steps: Sequence[str] = ()
        self.units: Sequence[tuple[int, int]] = [(i, i + 1) for i in range(units)]
        self.sweep_units = self.units

    def reduce(self, sweep: int, unit: int, *after: object) -> None:
        """Do nothing."""

    def combine(self, sweep: int, *after: object) -> None:
        """Do nothing."""

    def apply(self, unit: int, *after: object) -> None:
        """Do nothing."""


@click.command()
@click.option("--tensors", default=800, show_default=True)
@click.option("--units", default=80, show_default=True, help="Units of each tensor.")
@click.option("--workers", default=2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@common_options
def main(
    tensors: int, units: int, workers: int, repeats: int, quick: bool, json_path: Path | None, folder: Path | None
) -> None:
    """Time empty tasks through our Dask bundles; --folder is accepted and not needed."""
    tensors, repeats = (20, 1) if quick else (tensors, repeats)
    tasks = tensors * count_tasks(SWEEPS, units)
    report = Report("dask", {"tensors": tensors, "units": units, "workers": workers, "tasks": tasks})
    report.add("tasks", tasks, "")
    with Workers(workers) as threads:
        run_tensors(2, units, threads)
        before = anonymous_bytes(os.getpid())
        ours = [cpu_per_task(lambda: run_tensors(tensors, units, threads), tasks) for _ in range(repeats)]
        grown = anonymous_bytes(os.getpid()) - before
        alone = [cpu_per_task(lambda: run_alone(tasks, threads), tasks) for _ in range(repeats)]
    bundled = report.add("CPU per task, our bundles", ours, "us")
    submitted = report.add("CPU per task, the thread pool alone", alone, "us")
    report.add("our bundles / the thread pool alone", bundled / submitted, "x")
    report.add("memory grown over all repeats", grown / 2**20, "MiB")
    report.save(json_path)


def cpu_per_task(work: Callable[[], None], tasks: int) -> float:
    """Microseconds of CPU, over all threads."""
    began = time.process_time()
    work()
    return 1e6 * (time.process_time() - began) / tasks


def run_tensors(tensors: int, units: int, workers: Workers) -> None:
    """Build and compute the graphs of so many tensors, in the bundles that a run would make."""
    for bundle in bundles([count_tasks(SWEEPS, units)] * tensors, [1] * tensors):
        run_bundle([tensor_graph(str(number), Idle(units), _done) for number in bundle], workers, bundle[0])


def run_alone(tasks: int, workers: Workers) -> None:
    """As many empty calls, 5,000 at a time."""
    pool = workers.ranked(0)
    for start in range(0, tasks, 5000):
        for future in [pool.submit(_done, None, None) for _ in range(start, min(start + 5000, tasks))]:
            future.result()


def _done(_name: object, _units: object) -> None:
    """Do nothing."""


if __name__ == "__main__":
    main()
