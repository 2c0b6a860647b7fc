"""The 7B proof: a Llama-2-7B and two experts of it, every byte real, cold, killed five times, under 2 GiB.

40 GB are read and 13.5 GB written. Of the merge that was killed, every byte is held against its checksums, and some
tensors against a reference in float64. Then the same is merged again without kills, each file handed over and removed
as it comes, so that there is never a second output on the disk: its SHA-256s must be the same.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import click

from benchmarks.data import LAYOUTS, Layout, drop_from_cache, weight_files
from benchmarks.process import build
from benchmarks.proof import (
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
from benchmarks.proof_receive import received
from benchmarks.report import Report, common_options

INPUT_FILES = 3
OUTPUT_FILES = 14
QUICK = Layout(768, 2048, 4, 4000, 12, 12)


@click.command()
@click.option("--memory", default="2GiB", show_default=True, help="The ceiling of the run.")
@click.option("--checked", default=12, show_default=True, help="So many tensors are held against float64.")
@proof_options
@common_options
def main(
    memory: str,
    checked: int,
    layers: int | None,
    kills: int | None,
    seed: int,
    reserve: float,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Merge 7B models, kill it at random moments, and check what comes out."""
    layout = replace(QUICK if quick else LAYOUTS["7B"], **({"layers": layers} if layers else {}))
    kills = (2 if quick else 5) if kills is None else kills
    settings = {"layers": layout.layers, "kills": kills, "seed": seed, "memory": memory, "quick": quick}
    report = Report("proof_7b", settings)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-proof-") as name:
            check_room(Path(name), 2 * layout.parameters * (len(model_names()) + 1) + int(reserve * 1e9))
            prove(report, layout, Path(name), memory, kills, seed, checked, quick=quick)
    except CannotProveError as error:
        report.settings["skipped"] = str(error)
        click.echo(f"skipped: {error}")
    report.save(json_path)


def prove(
    report: Report, layout: Layout, here: Path, memory: str, kills: int, seed: int, checked: int, *, quick: bool
) -> None:
    """Do all of it in a folder."""
    click.echo(f"writing {2 * len(model_names()) * layout.parameters / 1e9:.1f} GB")
    folders = write_models(here / "models", layout, INPUT_FILES, seed)
    options = ("--memory", memory, "--shard-size", str(2 * layout.parameters // OUTPUT_FILES))
    build(recipe(folders), here / "killed", *options)
    plan = predicted(here / "killed")
    drop_from_cache(weight_files(folders))
    report_run(report, survive(here / "killed", kills, seed, quick=quick), plan)

    merged = here / "killed" / "merged"
    subprocess.run(
        [sys.executable, "-m", "mergepipe", "verify", str(merged), "--full"], check=True, stdout=subprocess.DEVNULL
    )
    names = sorted(layout.shapes)
    check_in_float64(report, "output", folders, merged, random.Random(seed).sample(names, min(checked, len(names))))
    sums = {entry["file"]: entry["sha256"] for entry in manifest_of(merged)["shards"]}
    shutil.rmtree(merged)

    build(recipe(folders), here / "whole", *options)
    ledger = here / "ledger"
    ledger.mkdir()
    machine = this_machine(plan, weight_files(folders), here)
    drop_from_cache(weight_files(folders))
    took = survive(here / "whole", 0, seed, ledger=ledger)
    compare(report, ledger, sums)
    report_time(report, here / "whole", plan, machine)
    report.add("seconds, measured without kills", took.wall_s, "s")
    report.add("CPU, the same without kills", took.cpu_s, "s")
    report.add("bytes read, the same without kills", took.bytes_read / 1e9, "GB")


def compare(report: Report, ledger: Path, sums: dict[str, str]) -> None:
    """Hold the files of the merge without kills against those of the killed one.

    Raises
    ------
    RuntimeError
        If a file is missing, or is another.
    """
    found = {shard["file"]: shard["sha256"] for shard in received(ledger)}
    wrong = sorted(name for name in found.keys() | sums.keys() if found.get(name) != sums.get(name))
    if wrong:
        raise RuntimeError(f"'{wrong[0]}' and {len(wrong) - 1} more files are not those of the merge without kills")
    report.add("files equal to those of a merge without kills", len(found), "")


if __name__ == "__main__":
    main()
