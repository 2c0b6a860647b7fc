"""The 70B proof: a Llama-3-70B and two experts of it, 141 GB each, merged by TIES with TADrop and killed ten times.

Two layers are real, and so are the embeddings and the head; they lie in an XFS image on a loop mount, and all 80 layers
of each model share their extents (FICLONERANGE), so that 423 GB of inputs take up 23 GB of disk. Nothing of that is
known to the merge: it reads three checkpoints of 723 tensors in 30 files. Each sealed shard is handed over, checked,
noted and removed, so the output never takes up more than three files. In the end layer i of it must be layer i mod 2 of
the merge of the two-layer models, whose tensors are held against a reference in float64.

Its seconds say nothing of a disk: extents that are read forty times may come from the cache under the loop device.
"""

from __future__ import annotations

import fcntl
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.data import LAYOUTS, Layout, header, shard_name, split, weight_files, write_small_files
from benchmarks.process import build, run
from benchmarks.proof import (
    PAGE,
    CannotProveError,
    check_in_float64,
    check_room,
    manifest_of,
    model_names,
    predicted,
    proof_options,
    recipe,
    report_run,
    report_time,
    survive,
    this_machine,
    write_models,
)
from benchmarks.proof_receive import contents, received
from benchmarks.proof_reference import tensors_of
from benchmarks.report import Report, common_options

FICLONERANGE = 0x4020940D
"""<linux/fs.h>: let a range of one file share the extents of another's."""

REAL_LAYERS = 2
SHARD_BYTES = 4_900_000_000
EMPTY_IMAGE = 512 << 20
"""Room for the journal and the tables of an XFS."""
QUICK = Layout(2048, 1024, 4, 2048, 16, 2)


@click.command()
@click.option("--memory", default="3GiB", show_default=True, help="The ceiling of the run.")
@proof_options
@common_options
def main(
    memory: str,
    layers: int | None,
    kills: int | None,
    seed: int,
    reserve: float,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Merge 70B models whose layers share extents, kill it at random moments, and check every tensor."""
    layout = replace(QUICK if quick else LAYOUTS["70B"], **({"layers": layers} if layers else {}))
    kills = (2 if quick else 10) if kills is None else kills
    settings = {"layers": layout.layers, "kills": kills, "seed": seed, "memory": memory, "quick": quick}
    report = Report("proof_70b", settings)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-proof-") as name:
            prove(report, layout, Path(name), memory, kills, seed, int(reserve * 1e9), quick=quick)
    except CannotProveError as error:
        report.settings["skipped"] = str(error)
        click.echo(f"skipped: {error}")
    report.save(json_path)


def prove(
    report: Report, layout: Layout, here: Path, memory: str, kills: int, seed: int, reserve: int, *, quick: bool
) -> None:
    """Do all of it in a folder."""
    two = replace(layout, layers=REAL_LAYERS)
    real = 2 * len(model_names()) * two.parameters
    shard_bytes = 2 * layout.parameters // 8 if quick else SHARD_BYTES
    image = EMPTY_IMAGE + real + real // 20
    with mounted_xfs(here, image, image + 2 * two.parameters + 3 * shard_bytes + reserve) as mount:
        click.echo(f"writing {real / 1e9:.1f} GB, and {layout.layers} layers out of {REAL_LAYERS}")
        sources = write_models(mount / "two", two, max(2, math.ceil(2 * two.parameters / shard_bytes)), seed)
        folders = grow(sources, mount / "all", layout, math.ceil(2 * layout.parameters / shard_bytes))
        inputs = sum(file.stat().st_size for file in weight_files(folders))
        report.add("models, as their files say", inputs / 1e9, "GB")
        report.add("models, on the disk", (here / "xfs.img").stat().st_blocks * 512 / 1e9, "GB")
        report.add("tensors of each", len(layout.shapes), "")

        build(recipe(sources), here / "small", "--memory", memory)
        run(here / "small")
        merged = here / "small" / "merged"
        check_in_float64(report, "two layers", sources, merged, list(two.shapes))
        checksums = {name: crc for file in weight_files([merged]) for name, crc in contents(file)["tensors"].items()}
        shutil.rmtree(merged)

        build(recipe(folders), here / "large", "--memory", memory)
        plan, ledger = predicted(here / "large"), here / "ledger"
        ledger.mkdir()
        machine = this_machine(plan, weight_files(folders), here)
        took = survive(here / "large", kills, seed, quick=quick, ledger=ledger)
        report_run(report, took, plan)
        report_time(report, here / "large", plan, machine)
        report.add("seconds, measured with what the kills lost", took.wall_s, "s")
        compare(report, layout, ledger, checksums, here / "large" / "merged")


def compare(report: Report, layout: Layout, ledger: Path, checksums: dict[str, int], output: Path) -> None:
    """Hold what was handed over against the manifest, and each tensor against that of the two-layer merge.

    Raises
    ------
    RuntimeError
        If a file or a tensor is missing, or is another.
    """
    expected = {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in manifest_of(output)["shards"]}
    shards = received(ledger)
    if {shard["file"]: (shard["bytes"], shard["sha256"]) for shard in shards} != expected:
        raise RuntimeError("what was handed over is not what the manifest says")
    found = {name: crc for shard in shards for name, crc in shard["tensors"].items()}
    wanted = {name: checksums[twin(name)] for name in layout.shapes}
    wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
    if wrong:
        raise RuntimeError(f"'{wrong[0]}' and {len(wrong) - 1} more are not those of the two-layer merge")
    report.add("shards handed over, as the manifest says", len(shards), "")
    report.add("tensors equal to those of the two-layer merge", len(found), "")


def twin(name: str) -> str:
    """The tensor of the two-layer model that has the same bytes.

    Examples
    --------
    >>> twin("model.layers.7.mlp.up_proj.weight"), twin("lm_head.weight")
    ('model.layers.1.mlp.up_proj.weight', 'lm_head.weight')
    """
    return re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) % REAL_LAYERS), name)


def grow(sources: Sequence[Path], folder: Path, layout: Layout, shards: int) -> list[Path]:
    """Write models of more layers, whose tensors share the extents of those of two-layer models.

    Every tensor must be a multiple of 4,096 bytes long, and lie at such a place in the sources; it does here too.

    Returns
    -------
    list of Path
    """
    groups = split(layout.shapes, shards)
    grown = [folder / source.name for source in sources]
    for source, path in zip(sources, grown, strict=True):
        write_small_files(path, layout.config, groups, itemsize=2)
        tensors = tensors_of(source)
        with ExitStack() as stack:
            files = {file: stack.enter_context(file.open("rb")).fileno() for file in weight_files([source])}
            for number, group in enumerate(groups):
                with (path / shard_name(number, len(groups))).open("wb") as file:
                    file.write(header(group, "BF16", 2, align=PAGE))
                    file.flush()
                    at = file.tell()
                    for name in group:
                        data = tensors[twin(name)]
                        place = struct.pack("qQQQ", files[Path(str(data.filename))], data.offset, data.nbytes, at)
                        fcntl.ioctl(file.fileno(), FICLONERANGE, place)
                        at += data.nbytes
                    os.fsync(file.fileno())
    return grown


@contextmanager
def mounted_xfs(here: Path, nbytes: int, needed: int) -> Iterator[Path]:
    """An XFS with reflinks in a sparse file, mounted in a folder and unmounted at the end.

    Raises
    ------
    CannotProveError
        If there is no room for `needed` bytes, or no XFS, loop device or right to mount one.
    """
    check_room(here, needed)
    if shutil.which("mkfs.xfs") is None:
        raise CannotProveError("there is no mkfs.xfs: install xfsprogs")
    image, mount = here / "xfs.img", here / "xfs"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(nbytes)
    _or_cannot(["mkfs.xfs", "-q", "-m", "reflink=1", str(image)])
    _or_cannot(["mount", "-o", "loop", str(image), str(mount)])
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def _or_cannot(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[:1]
        raise CannotProveError(f"`{' '.join(command[:-1])}` failed: {' '.join(said)}")


if __name__ == "__main__":
    main()
