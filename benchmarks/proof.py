"""What the proofs share: real models written in a stream, a run that is killed at random and goes on, what it took.

A proof is no benchmark: it shows that a merge of a real model's size comes out right under kills and a ceiling, and
prints what that took here.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import numpy.typing as npt

from benchmarks.bench_plan import work_of
from benchmarks.cost import Machine, Rates, cpu_seconds, seconds
from benchmarks.data import Layout, drop_from_cache, header, shard_name, split, write_small_files
from benchmarks.disk import CALL, read_alone, spent, write_alone
from benchmarks.process import anonymous_bytes
from benchmarks.proof_reference import largest_deviation, tensors_of
from benchmarks.report import Report
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.summary import scheduled
from mergepipe.storage.direct import IO_THREADS
from mergepipe.storage.workspace import Workspace

ROOT = Path(__file__).resolve().parents[1]
PAGE = 4096
PIECE = 1 << 20
"""Elements generated at a time."""

METHOD = "ties"
WEIGHTS = (0.75, 0.5)
SAMPLE_S = 0.02
LOOK_S = 0.25
DEVIATION_ALLOWED = 1.001
READ_TRIED, WRITTEN_TRIED = 4_000_000_000, 2_000_000_000
"""Bytes to measure a disk with, or a quarter of what a merge reads and writes if that is less."""

Shapes = dict[str, tuple[int, ...]]


class CannotProveError(Exception):
    """This machine lacks what the proof takes."""


def model_names(experts: int = len(WEIGHTS)) -> list[str]:
    """Folder names: the base first."""
    return ["base", *(f"expert-{i + 1}" for i in range(experts))]


def recipe(folders: Sequence[Path]) -> dict[str, Any]:
    """TIES with TADrop over a base (the first) and its experts."""
    base, *experts = folders
    models = [{"model": str(path), "parameters": {"weight": w}} for path, w in zip(experts, WEIGHTS, strict=True)]
    return {
        "merge_method": METHOD,
        "base_model": str(base),
        "models": models,
        "sparsify": "tadrop",
        "dtype": "bfloat16",
    }


def write_models(folder: Path, layout: Layout, shards: int, seed: int = 0) -> list[Path]:
    """Write a base and its experts, really random, every tensor at a multiple of 4,096 bytes if its size is one.

    Weights are normal with standard deviation 0.02. An expert leaves two fifths of them alone; the differences of the
    rest are normal too, with a standard deviation of 0.001. The files are durable, and out of the cache, at the end.

    Returns
    -------
    list of Path
        The base first.
    """
    folders = [folder / name for name in model_names()]
    groups = split(layout.shapes, shards)
    for path in folders:
        write_small_files(path, layout.config, groups, itemsize=2)
    with ThreadPoolExecutor(2) as pool:
        names = [shard_name(number, len(groups)) for number in range(len(groups))]
        jobs = [([path / name for path in folders], group) for name, group in zip(names, groups, strict=True)]
        for done in [pool.submit(_write_shard, *job, [seed, number]) for number, job in enumerate(jobs)]:
            done.result()
    return folders


def _tables() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Values to draw from, by 16 random bits: weights, and differences from them."""
    draw = np.random.Generator(np.random.SFC64(7))
    weights = (draw.standard_normal(1 << 16, np.float32) * np.float32(0.02)).astype(ml_dtypes.bfloat16)
    deltas = draw.standard_normal(1 << 16, np.float32) * np.float32(0.001)
    deltas[: (2 << 16) // 5] = 0
    return weights.astype(np.float32), deltas


def _write_shard(paths: Sequence[Path], shapes: Shapes, seed: Sequence[int]) -> None:
    """Write one shard of every model at once."""
    weights, deltas = _tables()
    draw = np.random.Generator(np.random.SFC64(seed))
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for file in files:
            file.write(header(shapes, "BF16", 2, align=PAGE))
        for shape in shapes.values():
            left = int(np.prod(shape))
            while left:
                size = min(left, PIECE)
                base = weights[draw.integers(0, 1 << 16, size, np.uint16)]
                files[0].write(base.astype(ml_dtypes.bfloat16).view(np.uint16).data)
                for file in files[1:]:
                    expert = base + deltas[draw.integers(0, 1 << 16, size, np.uint16)]
                    file.write(expert.astype(ml_dtypes.bfloat16).view(np.uint16).data)
                left -= size
        for file in files:
            file.flush()
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(slots=True)
class Survived:
    """What a run took, over all the processes it needed.

    Attributes
    ----------
    processes, kills : int
    wall_s, cpu_s : float
        Of all processes together, those that were killed too.
    peak_anonymous : int
        Sampled every 20 ms.
    bytes_read, bytes_written : int
        As the kernel counts them; of a killed process, up to its last sample.
    output_disk : int
        Most bytes that the output folder took up on its disk, sampled four times a second.
    """

    processes: int = 0
    kills: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    peak_anonymous: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    output_disk: int = 0


def survive(folder: Path, kills: int, seed: int, *, quick: bool = False, ledger: Path | None = None) -> Survived:
    """Run what was built in ``folder/work`` into ``folder/merged``, kill it at random moments, and let it go on.

    The moments are random shares of the tensors, and up to five random seconds on top: where two of them lie close
    together, the second hits a run that is still finding out what is done.

    Parameters
    ----------
    folder : Path
    kills : int
    seed : int
        Of the moments.
    quick : bool
        Kill in the first tenths of a second: the merge takes no longer.
    ledger : Path, optional
        Each sealed shard is handed over to :mod:`benchmarks.proof_receive`, which keeps its notes there.

    Raises
    ------
    RuntimeError
        If a run fails, or ends before all kills have come to pass.
    """
    draw = random.Random(seed)
    last, pause_s = (0.0, 0.2) if quick else (0.95, 5.0)
    moments = sorted(draw.uniform(0, last) for _ in range(kills))
    took = Survived()
    while True:
        moment = moments[took.kills] if took.kills < kills else None
        code = _run_once(folder, took, moment, draw.uniform(0, pause_s), ledger)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            said = (folder / "run.log").read_text(errors="replace")[-4000:]
            raise RuntimeError(f"run {took.processes} ended with {code}: {said}")
        took.kills += 1
        done = max(0.0, progress(folder))
        click.echo(f"  kill {took.kills} of {kills} after {took.wall_s:.0f} s, {done:.0%} of the tensors done")
    if took.kills < kills:
        raise RuntimeError(f"the merge was done after {took.kills} of {kills} kills: it is too small for so many")
    return took


def _run_once(folder: Path, took: Survived, moment: float | None, pause_s: float, ledger: Path | None) -> int:
    """One process, to its end or to the moment of its death; its exit code."""
    command = [sys.executable, "-m", "mergepipe", "run", "-w", str(folder / "work"), "--quiet"]
    if ledger is not None:
        receiver = shlex.join([sys.executable, "-m", "benchmarks.proof_receive", str(ledger)])
        command += ["--on-shard", receiver + " {path}"]
    began, due, looked = time.monotonic(), None, 0.0
    counts = (0, 0)
    with (folder / "run.log").open("ab") as log, ExitStack() as stack:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        stack.callback(process.kill)  # should the watching fail
        while True:
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(status)
                break
            took.peak_anonymous = max(took.peak_anonymous, anonymous_bytes(process.pid))
            counts = io_bytes(process.pid) or counts
            now = time.monotonic()
            if due is not None and now >= due:
                process.kill()
                due = float("inf")
            if now - looked > LOOK_S:
                looked, took.output_disk = now, max(took.output_disk, disk_bytes(folder / "merged"))
                if due is None and moment is not None and progress(folder) >= moment:
                    due = now + pause_s
            time.sleep(SAMPLE_S)
    took.processes += 1
    took.wall_s += time.monotonic() - began
    took.cpu_s += used.ru_utime + used.ru_stime
    took.bytes_read += counts[0]
    took.bytes_written += counts[1]
    return process.returncode


def progress(folder: Path) -> float:
    """The share of the tensors that the event log tells of as finished; -1 before the first run has begun."""
    path = folder / "work" / "events.jsonl"
    if not path.exists():
        return -1.0
    finished, total = set(), 0
    for line in path.read_text(errors="replace").splitlines():
        with suppress(ValueError):  # a line that a killed run has not ended
            event = json.loads(line)
            total = event.get("tensors", total)
            if event["event"] == "TensorFinished":
                finished.add(event["name"])
    return len(finished) / total if total else -1.0


def io_bytes(pid: int) -> tuple[int, int] | None:
    """Bytes that a process has read from disks and written to them; None once it is gone."""
    try:
        text = Path(f"/proc/{pid}/io").read_text(encoding="utf-8")
    except OSError:
        return None
    counts = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", text)}
    return (counts["read_bytes"], counts["write_bytes"]) if "write_bytes" in counts else None


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take up on their disk."""
    total = 0
    for path in folder.glob("**/*"):
        try:
            total += path.stat().st_blocks * 512
        except FileNotFoundError:  # it was renamed, or handed over
            continue
    return total


def predicted(folder: Path) -> dict[str, Any]:
    """What `mergepipe plan` says of ``folder/work``."""
    command = [sys.executable, "-m", "mergepipe", "plan", "-w", str(folder / "work"), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return found


def check_in_float64(report: Report, what: str, folders: Sequence[Path], merged: Path, names: Sequence[str]) -> None:
    """Hold tensors of a merge against the reference; two at a time, the largest first.

    Raises
    ------
    RuntimeError
        If one is further away than one rounding.
    """
    base, *experts = [tensors_of(folder) for folder in folders]
    output = tensors_of(merged)

    def check(name: str) -> float:
        return largest_deviation(base[name], [expert[name] for expert in experts], WEIGHTS, output[name])

    ordered = sorted(names, key=lambda name: -base[name].size)
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(ordered, pool.map(check, ordered), strict=True))
    far = [name for name, deviation in found.items() if not deviation <= DEVIATION_ALLOWED]
    if far:
        raise RuntimeError(f"'{far[0]}' and {len(far) - 1} more differ from the float64 reference: {found[far[0]]}")
    report.add(f"{what}: tensors equal to the float64 reference", len(found), "")
    report.add(f"{what}: largest deviation, in half units of the last place", max(found.values()), "x")


def report_run(report: Report, took: Survived, plan: dict[str, Any]) -> None:
    """Print what a run took beside what `plan` said it would take."""
    report.add("kills survived", took.kills, "")
    report.add("processes", took.processes, "")
    report.add("wall, all processes", took.wall_s, "s")
    report.add("CPU, all processes", took.cpu_s, "s")
    report.add("inputs", plan["input_bytes"] / 1e9, "GB")
    report.add("output", plan["output_bytes"] / 1e9, "GB")
    report.add("bytes read", took.bytes_read / 1e9, "GB")
    report.add("bytes read, as `plan` said for a run without kills", plan["read_bytes"] / 1e9, "GB")
    report.add("bytes written", took.bytes_written / 1e9, "GB")
    report.add("peak anonymous memory", took.peak_anonymous / 2**20, "MiB")
    report.add("peak anonymous memory, as `plan` said", plan["projected_bytes"] / 2**20, "MiB")
    report.add("ceiling", plan["allowed_bytes"] / 2**20, "MiB")
    report.add("most disk that the output took up", took.output_disk / 1e9, "GB")
    if took.peak_anonymous > plan["allowed_bytes"]:
        raise RuntimeError("the run took more memory than its ceiling")


def this_machine(plan: dict[str, Any], files: Sequence[Path], folder: Path) -> Machine:
    """This machine as it is now: it reads some of these files, cold, and writes to `folder`, and is timed.

    Past the page cache, or through it where the file system knows no other way.
    """
    ends = accumulate(file.stat().st_size for file in files)
    count = 1 + sum(end < min(READ_TRIED, plan["input_bytes"] // 4) for end in ends)
    tried, written = list(files[:count]), min(WRITTEN_TRIED, plan["output_bytes"] // 4)
    output, source = folder / "written", mmap.mmap(-1, CALL)
    source[:] = os.urandom(CALL)

    def write(direct: bool) -> None:
        output.unlink(missing_ok=True)
        write_alone(output, written, memoryview(source), direct=direct)

    drop_from_cache(tried)
    read_s = _past_the_page_cache_s(lambda direct: read_alone(tried, CALL, direct=direct, threads=IO_THREADS))
    write_s = _past_the_page_cache_s(write)
    output.unlink()
    read = sum(file.stat().st_size for file in tried)
    return Machine("this one", read / read_s, written / write_s, len(os.sched_getaffinity(0)))


def _past_the_page_cache_s(move: Callable[[bool], None]) -> float:
    try:
        return spent(lambda: move(True)).wall_s
    except OSError:
        return spent(lambda: move(False)).wall_s


def report_time(report: Report, folder: Path, plan: dict[str, Any], machine: Machine) -> None:
    """Print how long a run of ``folder/work`` takes by the model of cost.

    What kills lose is not in it, nor what is done with files that are handed over.
    """
    stages = [scheduled(Plan.from_json(Workspace(folder / "work").read_plan()))]
    work = replace(work_of(stages), read=plan["read_bytes"])
    times = seconds(work, cpu_seconds(METHOD, work, Rates.load()), machine)
    report.add("read rate, measured before the run", machine.read / 1e9, "GB/s")
    report.add("write rate, measured before the run", machine.write / 1e9, "GB/s")
    report.add("seconds of the disk, computed", times.disk, "s")
    report.add("seconds of the processors, computed", times.arithmetic, "s")
    report.add("seconds, computed (benchmarks/cost.py)", times.whole, "s")


def check_room(folder: Path, nbytes: int) -> None:
    """Say so if a folder's disk has fewer bytes free than a proof needs, what is to stay free among them.

    Raises
    ------
    CannotProveError
    """
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        needed = f"{nbytes / 1e9:.0f} GB of disk are needed, with what is to stay free"
        raise CannotProveError(f"{needed}, and {free / 1e9:.0f} GB are free in '{folder.parent}'")


def manifest_of(folder: Path) -> dict[str, Any]:
    """The manifest of a finished merge."""
    found: dict[str, Any] = json.loads((folder / "mergepipe_manifest.json").read_text(encoding="utf-8"))
    return found


def proof_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that all proofs have besides those of the benchmarks."""
    options = (
        click.option("--layers", type=click.IntRange(min=2), help="So many layers, for a smaller one."),
        click.option("--kills", type=click.IntRange(min=0), help="So many kills."),
        click.option("--seed", default=0, show_default=True, help="Of the data and of the moments of the kills."),
        click.option("--reserve", default=15.0, show_default=True, help="GB of disk to leave free."),
    )
    for option in options:
        command = option(command)
    return command
