"""What Dask costs us: CPU per task of our bundles when the tasks do nothing, and the memory of many of them.

The yardstick, in the same run, is the thread pool alone: the same number of empty calls submitted to it and awaited.
For memory it is one graph of all the tasks, computed at once by the same threads. Peaks are looked for after what is
timed, in runs of their own, and are counted from what was there before the first graph: the import of Dask is in them.
"""

from __future__ import annotations

import os
import threading
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
INTERVAL_S = 0.01


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
@click.option("--one-graph/--no-one-graph", default=True, help="Look at the memory of one graph of all tasks, too.")
@common_options
def main(
    tensors: int,
    units: int,
    workers: int,
    repeats: int,
    one_graph: bool,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time empty tasks through our Dask bundles; --folder is accepted and not needed."""
    tensors, repeats = (20, 1) if quick else (tensors, repeats)
    tasks = tensors * count_tasks(SWEEPS, units)
    report = Report("dask", {"tensors": tensors, "units": units, "workers": workers, "tasks": tasks})
    report.add("tasks", tasks, "")
    peaks = {}
    with Workers(workers) as threads:
        pool_alone = anonymous_bytes(os.getpid())
        run_tensors(2, units, threads)
        before = anonymous_bytes(os.getpid())
        ours = [cpu_per_task(lambda: run_tensors(tensors, units, threads), tasks) for _ in range(repeats)]
        grown = anonymous_bytes(os.getpid()) - before
        alone = [cpu_per_task(lambda: run_alone(tasks, threads), tasks) for _ in range(repeats)]
        peaks["our bundles"] = peak_bytes(lambda: run_tensors(tensors, units, threads))
        if one_graph:
            peaks["one graph"] = peak_bytes(lambda: run_as_one(range(tensors), units, threads))
    bundled = report.add("CPU per task, our bundles", ours, "us")
    submitted = report.add("CPU per task, the thread pool alone", alone, "us")
    report.add("our bundles / the thread pool alone", bundled / submitted, "x")
    report.add("memory grown over all repeats", grown / 2**20, "MiB")
    for title, peak in peaks.items():
        report.add(f"peak memory over the pool, {title}", (peak - pool_alone) / 2**20, "MiB")
    report.save(json_path)


def cpu_per_task(work: Callable[[], None], tasks: int) -> float:
    """Microseconds of CPU, over all threads."""
    began = time.process_time()
    work()
    return 1e6 * (time.process_time() - began) / tasks


def peak_bytes(work: Callable[[], None]) -> int:
    """The most anonymous memory that this process has while something is done, looked at every 10 ms."""
    most, over = anonymous_bytes(os.getpid()), threading.Event()

    def look() -> None:
        nonlocal most
        while not over.wait(INTERVAL_S):
            most = max(most, anonymous_bytes(os.getpid()))

    thread = threading.Thread(target=look, name="memory")
    thread.start()
    try:
        work()
    finally:
        over.set()
        thread.join()
    return most


def run_tensors(tensors: int, units: int, workers: Workers) -> None:
    """Build and compute the graphs of so many tensors, in the bundles that a run would make."""
    for bundle in bundles([count_tasks(SWEEPS, units)] * tensors, [1] * tensors):
        run_as_one(bundle, units, workers)


def run_as_one(numbers: range, units: int, workers: Workers) -> None:
    """Build and compute one graph of these tensors."""
    run_bundle((tensor_graph(str(number), Idle(units), _done) for number in numbers), workers, numbers[0])


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
