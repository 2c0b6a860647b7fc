"""Writing one output file against writing the same number of bytes plainly, to a new file that is allocated first.

Ours is a whole life of a file: allocation, tensors at their places in pieces of 8 MiB, checksums on the way, made
durable, proved to be a valid safetensors file, renamed. The yardsticks write from one piece of aligned memory: past the
page cache, and through it; both allocate and sync, too. All in one thread.
"""

from __future__ import annotations

import mmap
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import numpy as np

from benchmarks.data import LAYOUTS, size_option
from benchmarks.disk import PIECE, Spent, spent, write_alone
from benchmarks.report import Report, common_options
from mergepipe.storage.digest import Held
from mergepipe.storage.direct import supports_direct
from mergepipe.storage.layout import OutputTensor, ShardLayout, lay_out
from mergepipe.storage.writer import PAGE, ShardWriter

DIRECT = "plain write past the page cache"
BUFFERED = "plain write through the page cache"
OURS = {False: "ours, --sha256 no", True: "ours, with SHA-256"}


@click.command()
@size_option("0.25B")
@click.option("--repeats", default=5, show_default=True)
@common_options
def main(size: str, repeats: int, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time writing a model's output file against plain writes of as many bytes."""
    size, repeats = ("1M", 1) if quick else (size, repeats)
    report = Report("write", {"size": size, "repeats": repeats})
    tensors = [OutputTensor(name, "BF16", shape) for name, shape in LAYOUTS[size].shapes.items()]
    layout = lay_out([tensors], {"format": "pt"}).shards[0]
    report.add("output", layout.size / 1e9, "GB")
    memory = mmap.mmap(-1, PIECE + PAGE)  # anonymous maps begin on a page
    memory[:] = np.random.default_rng(0).bytes(len(memory))
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        ways = ways_to_write(Path(name), layout, memory)
        took: dict[str, list[Spent]] = {way: [] for way in ways}
        for way, write in list(ways.items()) * repeats:
            took[way].append(spent(write))
            for file in Path(name).iterdir():
                file.unlink()
    for way, times in took.items():
        report.add(way, [one.wall_s for one in times], "s")
        report.add(f"{way}, CPU", [one.cpu_s for one in times], "s")
    for ours in OURS.values():
        for plain in (way for way in took if way not in OURS.values()):
            pairs = list(zip(took[plain], took[ours], strict=True))
            report.add(f"rate of {ours} / {plain}", [one.wall_s / other.wall_s for one, other in pairs], "x")
    report.save(json_path)


def ways_to_write(folder: Path, layout: ShardLayout, memory: mmap.mmap) -> dict[str, Callable[[], object]]:
    """Each writes one file into the folder, which is empty before."""
    source = memoryview(memory)[:PIECE]
    plain = {BUFFERED: partial(write_alone, folder / "plain", layout.size, source, direct=False)}
    probe = folder / "probe"
    probe.touch()
    if supports_direct(probe):
        plain[DIRECT] = partial(write_alone, folder / "plain", layout.size, source, direct=True)
    else:
        click.echo(f"{DIRECT}: not timed (the file system refuses O_DIRECT)")
    probe.unlink()
    ours = {name: partial(write_ours, folder, layout, memory, sha256=sha256) for sha256, name in OURS.items()}
    return {**plain, **ours}


def write_ours(folder: Path, layout: ShardLayout, memory: mmap.mmap, *, sha256: bool) -> None:
    """Write, seal and publish a file whose tensors hold what is in the memory, as a run does it."""
    source = np.frombuffer(memory, np.uint8)
    writer = ShardWriter(folder, layout)
    writer.hash_in_passing(sha256=sha256, held=Held())
    for tensor in layout.tensors:
        for start in range(0, tensor.nbytes, PIECE):
            place = tensor.offset + start
            # A worker's output lies in its page as it will in the file's: that lets whole pages go straight there.
            first = place % PAGE
            writer.write(place, source[first : first + min(PIECE, tensor.nbytes - start)])
    sealed = writer.seal(sha256=sha256)
    assert (sealed.sha256 is None) != sha256, "hashed as asked"
    writer.publish()


if __name__ == "__main__":
    main()
