"""The arithmetic alone, on one thread and in memory: nanoseconds per element of each stage of a merge.

The yardsticks, in the same run: the memory roof, which is the exclusive or of the same bf16 streams written to one
output, for everything that maps inputs to an output; and `torch.topk` of the magnitudes of one float32 delta for the
exact threshold. Where streams lie matters to both, kernel and roof: they lie as the direct reader puts the windows of
one unit after another, and kernel and roof take turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.report import Report, common_options
from mergepipe.storage.direct import SLACK_BYTES, Arena
from mergepipe.tasks import convert
from mergepipe.tasks.blocks import BLOCK_ELEMENTS, Blocks
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.kept_norms import KeptNorms, thinning
from mergepipe.tasks.method import Accumulator, Array, Job, Sparsifier, State, Tile, stored_sweep
from mergepipe.tasks.registry import METHODS, SPARSIFIERS

UNIT = 1 << 20
"""Elements of a unit: 8 MiB of bf16 for a base and three models."""


@kernel
def _xor(streams: tuple[Array, ...], out: Array) -> None:
    for i in range(out.size):
        value = streams[0][i]
        for k in range(1, len(streams)):
            value ^= streams[k][i]
        out[i] = value


class Merge:
    """One bf16 tensor of a base and K models in memory, merged as a run does it."""

    def __init__(self, method: str, streams: list[Array], density: float, weight: float = 0.5) -> None:
        self.method = METHODS[method]
        self.take(streams)
        models = len(streams) - 1
        shared = {p.name: p.default for p in self.method.parameters if not p.per_model}
        own = {p.name: p.default for p in self.method.parameters if p.per_model}
        own |= {"weight": weight, "density": density}
        trim = {p.name: p.default for p in SPARSIFIERS[self.method.trim].parameters} | {"density": density}
        self.job = Job(
            "w", streams[0].shape, models, np.dtype(np.float32), shared, (own,) * models, self.method.trim,
            (trim,) * models, halves=True,
        )  # fmt: skip
        self.state: State = {}
        self.base = np.empty(BLOCK_ELEMENTS, np.float32)
        self.values = np.empty((models, BLOCK_ELEMENTS), np.float32)
        self.scratch = np.empty((self.method.scratch_rows, BLOCK_ELEMENTS), np.float32)
        self.merged = np.empty(BLOCK_ELEMENTS, np.float32)
        self.out = np.empty_like(streams[0])

    def take(self, streams: list[Array]) -> None:
        """Work on other streams of the same length from now on: the base first, whether the method takes it or not."""
        self.streams = streams if self.method.base == "required" else streams[1:]
        length = len(streams[0]) if streams else 0
        self.units = [[stream[start : start + UNIT] for stream in self.streams] for start in range(0, length, UNIT)]

    def reduce(self) -> None:
        """All sweeps: exact thresholds, where the method takes them."""
        self.state = {}
        for reduction in self.method.reductions(self.job):
            if not reduction.needed(self.job, self.state):
                continue
            counts, row = reduction.shapes(self.job)
            collected = Accumulator(
                None if counts is None else np.zeros(counts, np.int64),
                None if row is None else np.zeros((self.out.size // BLOCK_ELEMENTS, *row)),
            )
            stored = stored_sweep(reduction, self.job, self.state)
            if stored is None or not self.by_units(stored, collected):
                for index in range(self.out.size // BLOCK_ELEMENTS):
                    reduction.update(self.job, self.state, collected, self._tile(index))
            self.state |= reduction.combine(self.job, self.state, collected)

    def apply(self) -> None:
        """The kernel, from bits to bits."""
        stored = self.method.stored(self.job, self.state)
        assert stored is not None
        assert self.by_units(stored, self.out)

    def by_units(self, stored: Callable[[list[Array], Any, Blocks], bool], out: Array | Accumulator) -> bool:
        """Hand a kernel of stored bits one unit after another; an output of the tensor's size is cut likewise."""
        for start, windows in zip(range(0, self.out.size, UNIT), self.units, strict=True):
            stop = start + len(windows[0])
            into = out if isinstance(out, Accumulator) else out[start:stop]
            if not stored(windows, into, (start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS))):
                return False
        return True

    def xor(self) -> None:
        """The exclusive or of the streams, in the place of what the kernel makes of them."""
        for start, windows in zip(range(0, self.out.size, UNIT), self.units, strict=True):
            _xor(tuple(windows), self.out[start : start + UNIT])

    def apply_tiles(self) -> None:
        """Decode, kernel, encode: the way for other dtypes."""
        for index in range(self.out.size // BLOCK_ELEMENTS):
            tile = self._tile(index)
            self.method.kernel(self.job, self.state, tile, self.merged)
            convert.encode(self.merged, "BF16", self.out[tile.start : tile.start + BLOCK_ELEMENTS])

    def measure(self) -> None:
        """The sweep of ``run --diagnostics``: the norms of what is kept."""
        thin = thinning(self.job, self.method)
        assert thin is not None
        reduction, blocks = KeptNorms(thin), self.out.size // BLOCK_ELEMENTS
        sums = Accumulator(None, np.zeros((blocks, self.job.models, 2)))
        for index in range(blocks):
            reduction.update(self.job, self.state, sums, self._tile(index))

    def _tile(self, index: int) -> Tile:
        part = slice(index * BLOCK_ELEMENTS, (index + 1) * BLOCK_ELEMENTS)
        if self.method.base != "required":
            for row, stream in zip(self.values, self.streams, strict=True):
                convert.decode(stream[part], "BF16", row)
            return Tile(index, part.start, None, self.values, self.scratch)
        convert.decode(self.streams[0][part], "BF16", self.base)
        for row, stream in zip(self.values, self.streams[1:], strict=True):
            convert.decode_delta(stream[part], "BF16", self.base, row)
        return Tile(index, part.start, self.base, self.values, self.scratch)


def random_streams(size: int, models: int) -> list[Array]:
    """A base and its fine-tunes as bf16 bits."""
    draw = np.random.default_rng(0)
    base = draw.standard_normal(size, np.float32) * np.float32(0.02)
    return [
        _bits(base),
        *(_bits(base + draw.standard_normal(size, np.float32) / np.float32(1000)) for _ in range(models)),
    ]


def as_read(units: list[list[Array]]) -> list[list[Array]]:
    """The windows of all units where the direct reader puts them: one after another in its arena."""
    arena = Arena(sum(window.nbytes + SLACK_BYTES for windows in units for window in windows))

    def placed(window: Array) -> Array:
        start = arena.take(window.nbytes + SLACK_BYTES)
        there: Array = arena.bytes[start : start + window.nbytes].view(window.dtype)
        there[:] = window
        there.flags.writeable = False
        return there

    return [[placed(window) for window in windows] for windows in units]


def _bits(values: Array) -> Array:
    out = np.empty(values.size, np.uint16)
    convert.encode(values, "BF16", out)
    out.flags.writeable = False  # as a run reads them: what may be written has kernels of its own
    return out


def nanoseconds(work: Callable[[], Any], elements: int, repeats: int) -> list[float]:
    """CPU time of this thread per element, after one call that is not timed: what neighbours take counts for less."""
    return in_turn([work], elements, repeats)[0]


def in_turn(works: list[Callable[[], Any]], elements: int, repeats: int) -> list[list[float]]:
    """The same of several pieces of work, one after another each time, so that they see the same machine."""
    for work in works:
        work()
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, took in zip(works, times, strict=True):
            began = time.thread_time()
            work()
            took.append(1e9 * (time.thread_time() - began) / elements)
    return times


@click.command()
@click.option("--blocks", default=256, show_default=True, help="Tensor size in blocks of 65,536 elements.")
@click.option("--models", default=3, show_default=True)
@click.option("--density", default=0.2, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@common_options
def main(
    blocks: int, models: int, density: float, repeats: int, quick: bool, json_path: Path | None, folder: Path | None
) -> None:
    """Time decoding, thresholds and kernels on one thread; --folder is accepted and not needed."""
    blocks, repeats = (4, 1) if quick else (blocks, repeats)
    report = Report("kernels", {"blocks": blocks, "models": models, "density": density, "repeats": repeats})
    size = blocks * BLOCK_ELEMENTS
    streams = random_streams(size, models)
    report_roofed(report, streams, density, repeats)
    report_threshold(report, streams, density, repeats)
    report_random(report, streams, repeats)
    report.save(json_path)


def report_roofed(report: Report, streams: list[Array], density: float, repeats: int) -> None:
    """Everything that maps inputs to an output, against the memory roof."""
    size = len(streams[0])
    for name in ("linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties"):
        merge = Merge(name, streams, density)
        merge.reduce()
        if merge.state:
            report.add(f"{name}: sweeps", nanoseconds(merge.reduce, size, repeats), "ns")
        merge.units = as_read(merge.units)
        kernel, roof = in_turn([merge.apply, merge.xor], size, repeats)
        report.add(f"{name}: kernel", kernel, "ns")
        report.add(f"{name}: memory roof, xor of {len(merge.streams)} streams", roof, "ns")
        report.add(f"{name}: kernel / memory roof", [one / other for one, other in zip(kernel, roof, strict=True)], "x")
        if name == "ties":
            other = Merge(name, streams, density, 0.3)
            other.reduce()
            other.units = merge.units
            kernel, roof = in_turn([other.apply, merge.xor], size, repeats)
            title = f"{name}: kernel, weights that are no power of two"
            report.add(title, kernel, "ns")
            report.add(f"{title} / memory roof", [one / best for one, best in zip(kernel, roof, strict=True)], "x")
        report.add(f"{name}: tile by tile", nanoseconds(merge.apply_tiles, size, repeats), "ns")
        if name == "dare_ties":
            report.add(f"{name}: norms around the drop", nanoseconds(merge.reduce, size, repeats), "ns")
        if name == "ties":
            report.add(f"{name}: norms of what is kept", nanoseconds(merge.measure, size, repeats), "ns")


def report_threshold(report: Report, streams: list[Array], density: float, repeats: int) -> None:
    """The exact threshold of one delta, decoding included, against torch on a float32 delta that lies in memory."""
    import torch

    merge = Merge("ties", streams[:2], density)
    size = merge.out.size
    ours = report.add("exact threshold of one delta", nanoseconds(merge.reduce, size, repeats), "ns")
    base, other = np.empty(size, np.float32), np.empty(size, np.float32)
    convert.decode(streams[0], "BF16", base)
    convert.decode_delta(streams[1], "BF16", base, other)
    magnitudes = torch.from_numpy(np.abs(other))
    k = max(1, int(density * size))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    theirs = nanoseconds(lambda: torch.topk(magnitudes, k, sorted=False), size, min(repeats, 2))
    torch.set_num_threads(threads)
    assert float(torch.topk(magnitudes, k).values[-1]) == float(merge.state["thresholds"][0]), "thresholds differ"
    report.add("torch.topk / exact threshold", report.add("torch.topk of one delta", theirs, "ns") / ours, "x")


def report_random(report: Report, streams: list[Array], repeats: int) -> None:
    """Masks drawn at random, of a block of one delta: `random` looks at nothing, `della` ranks every row."""
    base, delta = np.empty(BLOCK_ELEMENTS, np.float32), np.empty(BLOCK_ELEMENTS, np.float32)
    convert.decode(streams[0][:BLOCK_ELEMENTS], "BF16", base)
    convert.decode_delta(streams[1][:BLOCK_ELEMENTS], "BF16", base, delta)
    tile = Tile(0, 0, base, delta[None].copy(), np.empty((0, BLOCK_ELEMENTS), np.float32))

    def mask(sparsifier: Sparsifier, job: Job) -> None:
        tile.values[0] = delta
        sparsifier.mask(job, {}, tile)

    for name in ("random", "della"):
        sparsifier = SPARSIFIERS[name]
        own = {p.name: p.default for p in sparsifier.parameters} | {"density": 0.5, "rescale": "none"}
        for width in (1024, 4096):
            job = Job("w", (BLOCK_ELEMENTS // width, width), 1, np.dtype(np.float32), {}, ({},), name, (own,))
            times = nanoseconds(partial(mask, sparsifier, job), BLOCK_ELEMENTS, 4 * repeats)
            report.add(f"{name}: mask of one delta, rows of {width}", times, "ns")


if __name__ == "__main__":
    main()
