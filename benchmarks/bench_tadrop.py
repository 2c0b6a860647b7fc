"""TADrop on one thread and in memory: bytes per second of each of its sweeps and of the kernel after it.

A bfloat16 tensor of a base and its fine-tunes is thinned and merged as a run does it: by the kernels that work on
stored bits where there are any, else tile by tile. The yardstick, in the same run, is memcpy, in bytes read and written
per second on both sides. What counts is a sweep's time per element and model: each sweep is one read of the inputs.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks.bench_kernels import Merge, nanoseconds, random_streams
from benchmarks.report import Report, common_options
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, stored_sweep
from mergepipe.tasks.registry import SPARSIFIERS

METRICS = ("quantile_ratio", "l1l2")


class Thinned(Merge):
    """One bf16 tensor of a base and K models in memory, thinned by TADrop and merged by `host`."""

    def __init__(self, host: str, streams: list[Array], metric: str, *, guessed: bool) -> None:
        super().__init__(host, streams, 1.0)
        models = len(streams) - 1
        own = {p.name: p.default for p in SPARSIFIERS["tadrop"].parameters} | {"metric": metric}
        params, model_params = self.job.params, self.job.model_params
        shape, work = streams[0].shape, np.dtype(np.float32)
        each = (own,) * models
        self.job = Job("w", shape, models, work, params, model_params, "tadrop", each, halves=guessed)

    def sweep(self, reduction: Reduction) -> None:
        """One sweep, whatever the state says."""
        counts, row = reduction.shapes(self.job)
        collected = Accumulator(
            None if counts is None else np.zeros(counts, np.int64),
            None if row is None else np.zeros((self.job.blocks, *row)),
        )
        stored = stored_sweep(reduction, self.job, self.state)
        if stored is None or not self.by_units(stored, collected):
            for index in range(self.job.blocks):
                reduction.update(self.job, self.state, collected, self._tile(index))
        self.found = reduction.combine(self.job, self.state, collected)

    def merge(self) -> None:
        """The kernel, from bits to bits if it can."""
        stored = self.method.stored(self.job, self.state)
        if stored is None or not self.by_units(stored, self.out):
            self.apply_tiles()


@click.command()
@click.option("--blocks", default=128, show_default=True, help="Tensor size in blocks of 65,536 elements.")
@click.option("--models", default=3, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@common_options
def main(blocks: int, models: int, repeats: int, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time the sweeps of TADrop and the kernels of its hosts; --folder is accepted and not needed."""
    blocks, repeats = (4, 1) if quick else (blocks, repeats)
    report = Report("tadrop", {"blocks": blocks, "models": models, "repeats": repeats})
    streams = random_streams(blocks * 65_536, models)
    memcpy = report.memcpy(streams[0], repeats)
    for host in ("task_arithmetic", "ties"):
        for metric in METRICS:
            merge = Thinned(host, streams, metric, guessed=True)
            report_merge(report, merge, f"{host}, {metric}", memcpy, repeats)
    sure = Thinned("ties", streams, METRICS[0], guessed=False)
    report_merge(report, sure, f"ties, {METRICS[0]}, without a guess", memcpy, repeats)
    report.save(json_path)


def report_merge(report: Report, thinned: Thinned, what: str, memcpy: float, repeats: int) -> None:
    """Every sweep that runs, and the kernel."""
    size, read = thinned.out.size, 2 * len(thinned.streams)
    for reduction in thinned.method.reductions(thinned.job):
        if not reduction.needed(thinned.job, thinned.state):
            continue
        times = nanoseconds(partial(thinned.sweep, reduction), size, repeats)
        report.add_rate(f"{what}: {reduction.name}", times, read, memcpy)
        report.add(f"{what}: {reduction.name}, each model", [time / thinned.job.models for time in times], "ns")
        thinned.state = thinned.state | thinned.found
    report.add_rate(f"{what}: kernel", nanoseconds(thinned.merge, size, repeats), read + 2, memcpy)


if __name__ == "__main__":
    main()
