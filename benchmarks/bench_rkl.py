"""SCF-RKL on one thread and in memory: its row statistics, its sweeps and its kernel, in ns and bytes per second.

The yardstick, in the same run, is memcpy, in bytes read and written per second on both sides. Rows are as wide as those
of common matrices, and as a vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks.bench_kernels import nanoseconds, random_streams
from benchmarks.report import Report, common_options
from mergepipe.tasks import convert, rows, stored_rows
from mergepipe.tasks.blocks import Blocks, block_bounds
from mergepipe.tasks.listed import Listed, Room
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, Tile, stored_sweep, values_listed
from mergepipe.tasks.registry import METHODS

UNIT = 64
"""Blocks of a unit: 8 MiB of bf16."""


class Fusion:
    """A bf16 primary and its donors in memory, of one shape, fused as a run does it: from stored bits or by tiles.

    With `guessed` as a run does it where they can't be held.
    """

    def __init__(self, streams: list[Array], shape: tuple[int, ...], importance: str, *, guessed: bool = False) -> None:
        self.method, self.streams, donors = METHODS["scf_rkl"], streams, len(streams) - 1
        params = {p.name: p.default for p in self.method.parameters} | {"importance": importance}
        listed = sys.maxsize if guessed else 0
        self.job = Job("w", shape, donors, np.dtype(np.float32), params, ({},) * donors, halves=True, listed=listed)
        self.state: State = {}
        longest = block_bounds(shape, 0)[1]
        self.base = np.empty(longest, np.float32)
        self.values = np.empty((donors, longest), np.float32)
        self.scratch = np.empty((self.method.scratch_rows, longest), np.float32)
        self.merged = np.empty(longest, np.float32)
        self.out = np.empty_like(streams[0])

    def sweep(self, reduction: Reduction) -> None:
        """One sweep, whatever the state says."""
        counts, row = reduction.shapes(self.job)
        most = values_listed([reduction], self.job)
        collected = Accumulator(
            None if counts is None else np.zeros(counts, np.int64),
            None if row is None else np.zeros((self.job.blocks, *row)),
            Listed(most, Room(most)) if most else None,
        )
        stored = stored_sweep(reduction, self.job, self.state)
        for unit in self.units():
            if stored is not None:
                assert stored(self.bits(unit), collected, unit)
                continue
            for index in range(*unit):
                reduction.update(self.job, self.state, collected, self.tile(index))
        self.found = reduction.combine(self.job, self.state, collected)

    def apply(self) -> None:
        """From bits to bits, or decode, kernel, encode."""
        stored = self.method.stored(self.job, self.state)
        for unit in self.units():
            if stored is not None:
                assert stored(self.bits(unit), self.out[self.span(unit)], unit)
                continue
            self.apply_tiles(unit)

    def apply_tiles(self, unit: Blocks) -> None:
        """The general way."""
        for index in range(*unit):
            tile = self.tile(index)
            n = tile.values.shape[1]
            self.method.kernel(self.job, self.state, tile, self.merged[:n])
            convert.encode(self.merged[:n], "BF16", self.out[tile.start : tile.start + n])

    def units(self) -> Iterator[Blocks]:
        """Runs of blocks as large as a chunk."""
        for first in range(0, self.job.blocks, UNIT):
            yield first, min(first + UNIT, self.job.blocks)

    def span(self, unit: Blocks) -> slice:
        """Its elements."""
        return slice(block_bounds(self.job.shape, unit[0])[0], block_bounds(self.job.shape, unit[1] - 1)[1])

    def bits(self, unit: Blocks) -> list[Array]:
        """What is stored of it."""
        return [stream[self.span(unit)] for stream in self.streams]

    def tile(self, index: int) -> Tile:
        """One block, decoded."""
        start, stop = block_bounds(self.job.shape, index)
        n, donors = stop - start, self.job.models
        values = self.values.reshape(-1)[: donors * n].reshape(donors, n)
        scratch = self.scratch.reshape(-1)[: self.method.scratch_rows * n].reshape(-1, n)
        convert.decode(self.streams[0][start:stop], "BF16", self.base[:n])
        for row, stream in zip(values, self.streams[1:], strict=True):
            convert.decode(stream[start:stop], "BF16", row)
        return Tile(index, start, self.base[:n], values, scratch)


@click.command()
@click.option("--size", default=2**24, show_default=True, help="Elements of a tensor.")
@click.option("--donors", default=1, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@common_options
def main(size: int, donors: int, repeats: int, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time row statistics, sweeps and the kernel of SCF-RKL; --folder is accepted and not needed."""
    size, repeats = (2**18, 1) if quick else (size, repeats)
    report = Report("rkl", {"size": size, "donors": donors, "repeats": repeats})
    streams = random_streams(size, donors)
    report_rows(report, streams, repeats)
    memcpy = report.memcpy(streams[0], repeats)
    for width in (4096, size // 2):
        for importance in ("delta_kl", "pointwise"):
            report_merge(report, importance, Fusion(streams, (size // width, width), importance), memcpy, repeats)
    guessed = Fusion(streams, (size // 4096, 4096), "delta_kl", guessed=True)
    report_merge(report, "delta_kl, guessed", guessed, memcpy, repeats)
    report.save(json_path)


def report_rows(report: Report, streams: list[Array], repeats: int) -> None:
    """The row divergence alone, on decoded blocks that lie in the cache: of close rows, and of others."""
    a, b = (np.empty(2**16, np.float32) for _ in range(2))
    for bits, values in zip(streams, (a, b), strict=False):
        convert.decode(bits[: a.size], "BF16", values)
    kinds = (
        ("", 0.5, 0.0),
        (", a weight beyond 1", 1.5, 0.0),
        (", loose", 0.5, 0.1),
        (", near", 0.5, 0.5),
        (", far", 0.5, 5.0),
    )
    for what, weight, apart in kinds:
        for width in (64, 1024, 4096, 2**16):
            a[::width], b[::width] = weight, weight + apart
            out = np.empty((a.size // width, 1))
            measure = partial(rows.measure_rows, a, b, width, 1.0, 0.0, out)
            times = nanoseconds(lambda measure=measure: [measure() for _ in range(16)], 16 * a.size, repeats)  # type: ignore[misc]
            report.add(f"row divergence{what}, rows of {width}", times, "ns")
    for what, weight, apart in kinds:
        stored = [bits[: a.size].copy() for bits in streams]
        for number, bits in enumerate(stored):
            values = np.full(a.size // 4096, weight + (apart if number else 0.0), np.float32)
            convert.encode(values, "BF16", bits[::4096])
            bits.flags.writeable = False
        donors = tuple(stored[1:])
        found = np.empty((1, len(donors), a.size // 4096 + 1))
        no_counts, how = np.empty((len(donors), 0), np.int64), (4096, a.size, 1.0, 0.0, False)
        measure = partial(stored_rows.measure_and_count, stored[0], donors, *how, found, no_counts)
        elements = 16 * a.size * len(donors)
        times = nanoseconds(lambda measure=measure: [measure() for _ in range(16)], elements, repeats)  # type: ignore[misc]
        report.add(f"row divergence{what}, stored rows of 4096, donors: {len(donors)}", times, "ns")


def report_merge(report: Report, way: str, fusion: Fusion, memcpy: float, repeats: int) -> None:
    """Every sweep of a merge and its kernel, decoding included."""
    size, width, read = fusion.job.size, fusion.job.shape[-1], 2 * len(fusion.streams)
    what = f"{way}, rows of {width}"
    total = 0.0
    for reduction in fusion.method.reductions(fusion.job):
        if not reduction.needed(fusion.job, fusion.state):
            continue
        times = nanoseconds(partial(fusion.sweep, reduction), size, repeats)
        total += report.add(f"{what}: {reduction.name}", times, "ns")
        report.add_rate(f"{what}: {reduction.name}", times, read, memcpy)
        fusion.state = fusion.state | fusion.found
    times = nanoseconds(fusion.apply, size, repeats)
    total += report.add(f"{what}: kernel", times, "ns")
    report.add_rate(f"{what}: kernel", times, read + 2, memcpy)
    report.add(f"{what}: whole merge", total, "ns")


if __name__ == "__main__":
    main()
