"""A GPU against the CPU of the same machine and against the way there: SVD units and row scoring of large matrices.

The matrices are those of a 70B Llama, in bfloat16: a base and some models. An SVD unit is what `mda` does with one of
them, decoding and sending included; scoring is the sweep of SCF-RKL that measures rows and counts scores. The CPU
works with all its processors. The transfer limit is the copy of the same bfloat16 bytes to the GPU from pinned memory:
nothing that reads them once can be faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np

from benchmarks.bench_kernels import random_streams
from benchmarks.bench_rkl import Fusion
from benchmarks.report import Report, common_options
from mergepipe.tasks import convert
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.method import Accumulator, Array, Job, Tile, can_offload, stored_sweep
from mergepipe.tasks.registry import METHODS
from mergepipe.tasks.rows_torch import Scorer, lane_bytes
from mergepipe.tasks.subspace.panels import Made, Sources, Span, panel_floats

SHAPES = ((1024, 8192), (8192, 8192), (8192, 28672))
QUICK = ((48, 64), (64, 300))


@click.command()
@click.option("--models", default=2, show_default=True, help="Models beside the base.")
@click.option("--only", type=click.Choice(["svd", "scoring"]), help="Leave the other one out.")
@click.option("--no-cpu", is_flag=True, help="Leave the CPU's SVD units out: the largest takes minutes.")
@click.option("--device", default="cuda:0", show_default=True, help="As torch names it.")
@common_options
def main(
    models: int,
    only: str | None,
    no_cpu: bool,
    device: str,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time SVD units and row scoring on a GPU; --quick makes do with a CPU, --folder is accepted and not needed."""
    import torch

    if not torch.cuda.is_available():
        if not quick:
            raise click.ClickException("there is no CUDA device here: this benchmark compares one with the CPU")
        device = "cpu:0"
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "a CPU in its place"
    report = Report("gpu", {"models": models, "device": device, "device_name": name, "threads": threads})
    click.echo(f"{name}, {threads} processors", err=True)
    for shape in QUICK if quick else SHAPES:
        streams = random_streams(shape[0] * shape[1], models)
        what = f"{shape[0]} x {shape[1]}"
        limit = report.add(f"{what}: transfer limit", transfer_seconds(streams, device), "s")
        if only != "scoring":
            report_svd(report, what, streams, shape, device, limit, with_cpu=not no_cpu)
        if only != "svd":
            report_scoring(report, what, streams, shape, device, limit, threads)
    report.save(json_path)


def seconds(work: Callable[[], object], device: str, repeats: int = 3) -> list[float]:
    """Times of `work`, after one call that is not timed; all that was asked of the device is done."""
    import torch

    found = []
    for number in range(repeats + 1):
        began = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        if number:
            found.append(time.perf_counter() - began)
    return found


def transfer_seconds(streams: list[Array], device: str) -> list[float]:
    """The copy of all stored bytes to the device, a tensor at a time, into memory that is there."""
    import torch

    pinned = [torch.from_numpy(stream.view(np.int16).copy()) for stream in streams]
    if device.startswith("cuda"):
        pinned = [values.pin_memory() for values in pinned]
    there = torch.empty_like(pinned[0], device=device)

    def copy() -> None:
        for values in pinned:
            there.copy_(values, non_blocking=True)

    return seconds(copy, device)


def report_svd(
    report: Report,
    what: str,
    streams: list[Array],
    shape: tuple[int, int],
    device: str,
    limit: float,
    *,
    with_cpu: bool,
) -> None:
    """All steps of `mda` on one matrix, and the rows of its update."""
    # The first call of a large unit is the only one: it takes long enough to tell.
    there = report.add(f"{what}: mda on the device", _mda_seconds(streams, shape, device), "s")
    report.add(f"{what}: mda on the device / transfer limit", there / limit, "x")
    if with_cpu:
        here = report.add(f"{what}: mda on the CPU", _mda_seconds(streams, shape, "cpu"), "s")
        report.add(f"{what}: mda, CPU / device", here / there, "x")


def _mda_seconds(streams: list[Array], shape: tuple[int, int], device: str) -> float:
    import torch

    method, models = METHODS["mda"], len(streams) - 1
    params = {p.name: p.default for p in method.parameters if not p.per_model}
    own = {p.name: p.default for p in method.parameters if p.per_model}
    job = Job("w", shape, models, np.dtype(np.float32), params, (own,) * models)
    assert method.matrix is not None
    kind = torch.float64 if device == "cpu" else torch.float32
    torch.zeros(1, device=device)  # the device is made ready before the clock runs

    def panel(stream: Array, span: Span) -> torch.Tensor:
        rows = torch.empty((span[1] - span[0]) * shape[1], dtype=torch.float32)
        part = slice(span[0] * shape[1], span[1] * shape[1])
        base = np.empty(rows.numel(), np.float32)
        convert.decode(streams[0][part], "BF16", base)
        convert.decode_delta(stream[part], "BF16", base, rows.numpy())
        return rows.to(kind).reshape(-1, shape[1]).to(device).to(torch.float64)

    def panels(stream: Array) -> Made:
        return Made(shape, lambda span: panel(stream, span))

    began = time.perf_counter()
    task_vectors = tuple(panels(stream) for stream in streams[1:])
    solver = method.matrix.start(job, Sources(task_vectors, task_vectors), device)
    for number in range(len(method.matrix.steps(job))):
        solver.step(number)
    step = max(1, panel_floats(shape) // shape[1])
    for first in range(0, shape[0], step):
        last = min(first + step, shape[0])
        solver.add_update((first, last), np.zeros((last - first, shape[1])))
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def report_scoring(
    report: Report, what: str, streams: list[Array], shape: tuple[int, int], device: str, limit: float, threads: int
) -> None:
    """The row divergences and the first count, by both kinds of score."""
    for importance in ("delta_kl", "pointwise"):
        here = report.add(
            f"{what}: {importance} on the CPU", seconds(_scoring(streams, shape, importance, threads, None), "cpu"), "s"
        )
        scorer = Scorer(device, lane_bytes(len(streams), block_elements(shape), 4))
        work = _scoring(streams, shape, importance, threads, scorer)
        there = report.add(f"{what}: {importance} on the device", seconds(work, device), "s")
        report.add(f"{what}: {importance}, CPU / device", here / there, "x")
        report.add(f"{what}: {importance} on the device / transfer limit", there / limit, "x")


def _scoring(
    streams: list[Array], shape: tuple[int, int], importance: str, threads: int, scorer: Scorer | None
) -> Callable[[], None]:
    """The sweep, its blocks shared out over threads."""
    fusions = [Fusion(streams, shape, importance) for _ in range(threads)]
    job = fusions[0].job
    reduction = fusions[0].method.reductions(job)[0]
    counts, row = reduction.shapes(job)
    assert counts is not None
    assert row is not None
    assert can_offload(reduction)
    blocks, stored = np.zeros((job.blocks, *row)), stored_sweep(reduction, job, {})
    bounds = [job.blocks * share // threads for share in range(threads + 1)]

    def tiles(share: int) -> Iterator[Tile]:
        return (fusions[share].tile(index) for index in range(bounds[share], bounds[share + 1]))

    def work(share: int) -> None:
        mine = Accumulator(np.zeros(counts, np.int64), blocks)
        if scorer is not None:
            reduction.offload(job, {}, mine, tiles(share), scorer)
        elif stored is None:
            for tile in tiles(share):
                reduction.update(job, {}, mine, tile)
        elif bounds[share] < bounds[share + 1]:
            unit = bounds[share], bounds[share + 1]
            assert stored(fusions[share].bits(unit), mine, unit)

    def everything() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))

    return everything


if __name__ == "__main__":
    main()
