"""Ways to the inputs' bytes against the plainest ones: the virtual store and the readers of a run.

The virtual store serves the chunks of a base and its experts to `get()`, one call after another, and a kernel works on
them; its yardstick are the same bytes in one map per file, as `numpy.memmap` makes it, under the same kernel. The
kernels are `ties` with its exact thresholds, as a merge runs it, and `linear`, the lightest of all, behind which
nothing can hide and which takes no base. *Warm* has all files in the page cache; *cold* has nothing.

The readers hand the same windows to nobody; their yardsticks read whole files in reused memory: past the page cache in
pieces of 1 MiB in as many threads as the reader has, and of 8 MiB in one, as `dd` does, and through it in pieces of 128
KiB, as `cat` does. All cold.
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
from zarr.core.buffer import default_buffer_prototype

from benchmarks.bench_kernels import Merge
from benchmarks.data import LAYOUTS, drop_from_cache, size_option, weight_files, write_checkpoints
from benchmarks.disk import CALL, PIECE, Spent, read_alone, spent
from benchmarks.report import Report, common_options
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.checksum import crc32c
from mergepipe.storage.direct import IO_THREADS, DirectReader, supports_direct
from mergepipe.storage.hierarchy import chunk_keys
from mergepipe.storage.manifest import ChunkManifest, Segment, virtual_manifest
from mergepipe.storage.readers import MmapReader, Reader
from mergepipe.storage.virtual import VirtualStore
from mergepipe.tasks.method import Array
from mergepipe.tasks.registry import METHODS

CAT_PIECE = 128 << 10
BUFFERS = 128 << 20
"""What the direct reader may keep, about as much as a run gives it."""

Chunk = tuple[str, list[Segment]]
"""Its key, and its bytes in each model."""


@click.command()
@size_option("0.25B")
@click.option("--experts", default=3, show_default=True)
@click.option("--density", default=0.2, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@common_options
def main(
    size: str, experts: int, density: float, repeats: int, quick: bool, json_path: Path | None, folder: Path | None
) -> None:
    """Time the virtual store and the readers against plain maps and plain reads of the same files."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    report = Report("store", {"size": size, "experts": experts, "density": density, "repeats": repeats})
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        folders = write_checkpoints(Path(name) / "models", LAYOUTS[size], experts)
        files = weight_files(folders)
        manifests = [virtual_manifest(open_checkpoint(path)) for path in folders]
        chunks = list(chunks_of(manifests))
        report.add("inputs", sum(file.stat().st_size for file in files) / 1e9, "GB")
        stores = [VirtualStore(manifest) for manifest in manifests]
        for method in ("ties", "linear"):
            first = 0 if METHODS[method].base == "required" else 1
            taken = [(key, segments[first:]) for key, segments in chunks]
            report_stores(report, Work(method, density), stores[first:], taken, files, repeats)
        for store in stores:
            store.close()
        report_readers(report, chunks, files, repeats)
    report.save(json_path)


def chunks_of(manifests: Sequence[ChunkManifest]) -> Iterator[Chunk]:
    """Every chunk of the matrices, tensor by tensor."""
    for name, array in manifests[0].arrays.items():
        if len(array.shape) < 2:
            continue
        for key, (start, stop) in zip(chunk_keys(array), itertools.pairwise(array.starts.tolist()), strict=True):
            yield f"{name}/{key}", [manifest.segments(name, start, stop)[0] for manifest in manifests]


class Work:
    """A method's sweeps and kernel on one chunk after another, as if each was a tensor."""

    def __init__(self, method: str, density: float) -> None:
        self.method = method
        self._density = density
        self._merges: dict[int, Merge] = {}

    def __call__(self, streams: list[Array]) -> Array:
        """The merged chunk of the streams that the method takes, in memory that the next call uses again."""
        if METHODS[self.method].base != "required":
            streams = [streams[0], *streams]  # the place of the base, which nobody looks at
        size = streams[0].size
        if size not in self._merges:
            self._merges[size] = Merge(self.method, streams, self._density)
        merge = self._merges[size]
        merge.take(streams)
        merge.reduce()
        merge.apply()
        merge.take([])
        return merge.out


def through_stores(work: Work, stores: Sequence[VirtualStore], chunks: Sequence[Chunk]) -> int:
    """Take every chunk from the virtual stores and work on it; the checksum of all that comes out."""
    prototype = default_buffer_prototype()

    async def all_chunks() -> int:
        checksum = 0
        for key, segments in chunks:
            streams = []
            for store, segment in zip(stores, segments, strict=True):
                buffer = await store.get(key, prototype)
                assert buffer is not None, key
                # The last chunk may be padded; a map has no such bytes.
                streams.append(np.asarray(buffer.as_numpy_array())[: segment.length].view(np.uint16))
            checksum ^= _checksum(work(streams))
        return checksum

    return asyncio.run(all_chunks())


def through_maps(work: Work, chunks: Sequence[Chunk]) -> int:
    """The same through one map per file."""
    maps = {path: np.memmap(path, np.uint8, "r") for path in {s.path for _, segments in chunks for s in segments}}
    checksum = 0
    for _, segments in chunks:
        checksum ^= _checksum(work([maps[s.path][s.offset : s.offset + s.length].view(np.uint16) for s in segments]))
    return checksum


def _checksum(out: Array) -> int:
    return crc32c(out.view(np.uint8))


def report_stores(
    report: Report,
    work: Work,
    stores: Sequence[VirtualStore],
    chunks: Sequence[Chunk],
    files: list[Path],
    repeats: int,
) -> None:
    """The stores against maps, warm and cold, one just after the other."""
    # This also compiles the kernels and warms the cache.
    checksums = through_stores(work, stores, chunks), through_maps(work, chunks)
    assert checksums[0] == checksums[1], "the store and the map hold other bytes"
    for cache in ("warm", "cold"):
        ways: dict[str, Callable[[], object]] = {
            "map + kernel": partial(through_maps, work, chunks),
            "store get() + kernel": partial(through_stores, work, stores, chunks),
        }
        took = _turns(ways, files if cache == "cold" else [], repeats)
        title = f"{work.method}, {cache}"
        _report_ways(report, title, took)
        _report_share(report, title, took, "map + kernel", "store get() + kernel")


def report_readers(report: Report, chunks: Sequence[Chunk], files: list[Path], repeats: int) -> None:
    """Both readers against plain reads, cold, all in turn."""
    ways: dict[str, Callable[[], object]] = {
        "read() as cat does": partial(read_alone, files, CAT_PIECE, direct=False),
        "mmap reader": lambda: hand_out(MmapReader(), chunks),
    }
    direct = all(supports_direct(file) for file in files)
    if direct:
        ways |= {
            "O_DIRECT as dd does": partial(read_alone, files, PIECE, direct=True),
            f"O_DIRECT, {IO_THREADS} threads": partial(read_alone, files, CALL, direct=True, threads=IO_THREADS),
            "direct reader": lambda: hand_out(DirectReader(BUFFERS), chunks),
        }
    else:
        click.echo("direct reader: not timed (the file system refuses O_DIRECT)")
    took = _turns(ways, files, repeats)
    _report_ways(report, "readers", took)
    _report_share(report, "readers", took, "read() as cat does", "mmap reader")
    if direct:
        for plain in (f"O_DIRECT, {IO_THREADS} threads", "O_DIRECT as dd does", "read() as cat does"):
            _report_share(report, "readers", took, plain, "direct reader")


def hand_out(reader: Reader, chunks: Sequence[Chunk]) -> None:
    """Announce all windows, take each and give it back untouched, as a method that reads everything once would."""
    units = [[[segment] for segment in segments] for _, segments in chunks]
    reader.ahead(units)
    for unit in units:
        with reader.windows(unit, last=True):
            pass
    reader.close()


def _turns(ways: dict[str, Callable[[], object]], cold: list[Path], repeats: int) -> dict[str, list[Spent]]:
    """What each way took, each time: all of them in turn, so that neighbours see the same machine."""
    took: dict[str, list[Spent]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, work in ways.items():
            drop_from_cache(cold)
            took[way].append(spent(work))
    return took


def _report_ways(report: Report, title: str, took: dict[str, list[Spent]]) -> None:
    for way, times in took.items():
        report.add(f"{title}: {way}", [one.wall_s for one in times], "s")
        report.add(f"{title}: {way}, CPU", [one.cpu_s for one in times], "s")


def _report_share(report: Report, title: str, took: dict[str, list[Spent]], plain: str, ours: str) -> None:
    pairs = list(zip(took[plain], took[ours], strict=True))
    report.add(f"{title}: rate of {ours} / {plain}", [one.wall_s / other.wall_s for one, other in pairs], "x")
    report.add(f"{title}: CPU of {plain} / {ours}", [one.cpu_s / other.cpu_s for one, other in pairs], "x")


if __name__ == "__main__":
    main()
