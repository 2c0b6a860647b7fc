"""What planning takes and what plans foretell, from headers alone.

The checkpoints are headers followed by holes: real names, counts and sizes, hardly a byte on disk, and none of it read.

First, how long `build` takes: for 723 tensors cut into more than 18,000 chunks, as a 70B model is, and for 45,000
tensors, as a large mixture of experts has; a quarter of its layers shows with which power of the number of tensors time
grows. These shapes are small, so that the check for free disk space passes anywhere.

Then, for every method and the real shapes of Llama 3 70B and Llama 3.1 405B, base and two experts: the memory that is
needed under a ceiling (where whole matrices do not fit, under the smallest that would do), what is read and written,
and the time that the model of `benchmarks/cost.py` computes for three machines. Computed, not measured.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import yaml

import mergepipe
from benchmarks.bench_growth import exponent
from benchmarks.cost import MACHINES, Rates, Work, cpu_seconds, seconds
from benchmarks.data import LAYOUTS, Layout, header, write_headers_only
from benchmarks.process import build, ties_recipe
from benchmarks.recipes import recipe_for
from benchmarks.report import Report, common_options
from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ScheduledTensor, disk_bytes_read, held_for_matrices, pool_bytes, schedule
from mergepipe.pipeline.summary import scheduled
from mergepipe.tasks.registry import METHODS

TENTH_OF_70B = Layout(2560, 8960, 80, 40_064, 20, 4)
RANK = 16
"""Of the adapters that methods for adapters merge."""


@click.command()
@click.option("--repeats", default=3, show_default=True)
@click.option("--size", "sizes", multiple=True, default=("70B", "405B"), type=click.Choice(["70B", "405B"]))
@click.option("--memory", default="512MiB", show_default=True, help="Ceiling of the plans.")
@click.option("--workers", default=2, show_default=True, help="For the check of the ceiling.")
@click.option("--times/--no-times", default=True, help="Time `build` in processes of its own, first.")
@click.option("--method", "chosen", multiple=True, type=click.Choice(list(METHODS)), help="Only these methods.")
@common_options
def main(
    repeats: int,
    sizes: tuple[str, ...],
    memory: str,
    workers: int,
    times: bool,
    chosen: tuple[str, ...],
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time `mergepipe build` for plans of many tensors, and tell what every method needs at 70B and 405B."""
    layouts = {size: LAYOUTS[size] for size in sizes}
    if quick:
        repeats, layouts, memory = 1, {"1M": LAYOUTS["1M"]}, "300MiB"
    report = Report("plan", {"repeats": repeats, "memory": memory, "workers": workers})
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        if times:
            report_times(report, repeats, Path(name), quick=quick)
        for size, layout in layouts.items():
            click.echo(
                f"\n{size}: {layout.parameters:,} parameters, base and two experts in bfloat16, --memory {memory}"
            )
            report_methods(report, size, layout, chosen or tuple(METHODS), (memory, workers), Path(name))
    report.save(json_path)


# ── how long build takes ──


def experts_layout(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a mixture of experts, as an unfused checkpoint has them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 64)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (64, 64) for part in "qkvo"}
        shapes |= {f"{at}.{norm}_layernorm.weight": (64,) for norm in ("input", "post_attention")}
        shapes[f"{at}.mlp.gate.weight"] = (experts, 64)
        for expert in range(experts):
            one = f"{at}.mlp.experts.{expert}"
            shapes |= {f"{one}.{part}_proj.weight": (24, 64) for part in ("gate", "up")}
            shapes[f"{one}.down_proj.weight"] = (64, 24)
    return shapes


def report_times(report: Report, repeats: int, here: Path, *, quick: bool) -> None:
    """Time `build` of TIES in processes of its own; the last two plans are of one kind, with more and fewer layers."""
    plans = {
        "723": (TENTH_OF_70B.shapes, "720KiB", 15),
        "11,000": (experts_layout(23, 158), "8MiB", 8),
        "45,000": (experts_layout(94, 158), "8MiB", 30),
    }
    if quick:
        plans = {"86": (experts_layout(1, 26), "64KiB", 1), "341": (experts_layout(4, 26), "64KiB", 3)}
    sizes, walls = [], []
    for number, (count, (shapes, chunk_size, shards)) in enumerate(plans.items()):
        title = f"{count} tensors"
        at = here / f"times-{number}"
        recipe = ties_recipe(write_headers_only(at / "models", shapes, 3, shards))
        used = [build(recipe, at / f"build-{i}", "--chunk-size", chunk_size) for i in range(repeats)]
        chunks = count_chunks(at / "build-0" / "work" / "plan.json")
        shutil.rmtree(at)
        report.add(f"{title}: tensors", len(shapes), "")
        report.add(f"{title}: chunks", chunks, "")
        wall = report.add(f"{title}: build", [one.wall_s for one in used], "s")
        report.add(f"{title}: build, CPU", [one.cpu_s for one in used], "s")
        report.add(f"{title}: build, peak resident memory", [one.peak_rss / 2**20 for one in used], "MiB")
        report.add(f"{title}: build per tensor, start-up included", 1e6 * wall / len(shapes), "us")
        sizes.append(len(shapes))
        walls.append(wall)
    fewer, more = list(plans)[-2:]
    report.add(f"exponent of build over tensors, {fewer} to {more}", exponent(sizes[-2:], walls[-2:]), "")


def count_chunks(path: Path) -> int:
    """Units of the output in a saved plan, as a run with the ceiling of the plan cuts it."""
    return sum(len(item.units) for item in scheduled(Plan.from_json(path.read_bytes())))


# ── what every method needs ──


@dataclass(frozen=True)
class Foretold:
    """What a plan says of a merge."""

    memory: int
    fits: bool
    work: Work
    passes: int
    build_s: float


def report_methods(
    report: Report, size: str, layout: Layout, methods: Sequence[str], limits: tuple[str, int], here: Path
) -> None:
    """Print one line per method, and keep its figures."""
    rates = Rates.load()
    models = write_headers_only(here / f"models-{size}", layout.shapes, 3, 30)
    adapters = write_adapters(here / f"adapters-{size}", layout)
    machines = " ".join(f"{machine.name:>16}" for machine in MACHINES)
    click.echo(f"{'method':<17} {'MiB':>10} {'read GB':>9} {'passes':>6} {'write GB':>8} {'build s':>7} {machines}")
    for method in methods:
        of_adapters = METHODS[method].takes == "adapters"
        found = foretell(method, adapters if of_adapters else models, *limits, here / "work")
        cpu = cpu_seconds(method, found.work, rates)
        told = [seconds(found.work, cpu, machine) for machine in MACHINES]
        click.echo(
            f"{method:<17} {found.memory / 2**20:>9,.0f}{' ' if found.fits else '*'} {found.work.read / 1e9:>9,.0f} "
            f"{found.passes:>6} {found.work.written / 1e9:>8,.0f} {found.build_s:>7.1f} "
            + " ".join(f"{show_time(times.whole):>16}" for times in told)
        )
        report.keep(f"{size} {method}: memory needed", found.memory / 2**20, "MiB")
        report.keep(f"{size} {method}: bytes read", found.work.read / 1e9, "GB")
        report.keep(f"{size} {method}: bytes written", found.work.written / 1e9, "GB")
        report.keep(f"{size} {method}: passes", found.passes, "")
        report.keep(f"{size} {method}: build, CPU", found.build_s, "s")
        for machine, times in zip(MACHINES, told, strict=True):
            report.keep(f"{size} {method}: computed for {machine.name}", times.whole, "s")
    click.echo("bytes and times are computed (benchmarks/cost.py), not measured, for")
    for machine in MACHINES:
        disk = f"{machine.read / 1e9:g} GB/s read, {machine.write / 1e9:g} GB/s written"
        click.echo(f"  {machine.name}: {disk}, {machine.processors} processors")
    click.echo("* the smallest ceiling that would do, where that of --memory is too small")


def show_time(duration_s: float) -> str:
    """A duration in the unit that suits it."""
    if duration_s < 120:
        return f"{duration_s:.0f} s"
    return f"{duration_s / 60:.0f} min" if duration_s < 7200 else f"{duration_s / 3600:.1f} h"


def foretell(method: str, folders: list[Path], memory: str, workers: int, work: Path) -> Foretold:
    """Build and read the plan of one method, under the smallest ceiling that would do if `memory` is too small."""
    work.mkdir()
    (work / "recipe.yaml").write_text(yaml.safe_dump(recipe_for(method, folders)))
    where: dict[str, Any] = {"work": work / "work", "out": work / "out", "workers": workers}
    fits, began = True, time.process_time()
    # Nothing will be run: room for the output of a model that is not there is not asked for.
    with patch("mergepipe.pipeline.build.check_room"):
        try:
            plan = mergepipe.build(work / "recipe.yaml", memory=memory, **where)
        except MemoryBudgetError as error:
            fits, began = False, time.process_time()
            plan = mergepipe.build(work / "recipe.yaml", memory=smallest(error), **where)
    took = time.process_time() - began
    none = [False] * len(plan.models)
    stages = [schedule(stage, Ceiling(plan.allowed, workers), gathered=none) for stage in plan.stages]
    items = [item for stage in stages for item in stage]
    passes = max(math.ceil(len(item.rounds) + item.sweep_reads + 1 + bool(item.steps)) for item in items)
    shutil.rmtree(work)
    done = work_of(stages)
    if done.products:
        largest = max(item.held for item in items)
        done = replace(done, matrices=min(held_for_matrices(each, plan.allowed) for each in stages) // largest)
    return Foretold(max(item.projected for item in items), fits, done, passes, took)


def smallest(error: MemoryBudgetError) -> str:
    """The smallest ceiling that would do, which every such error names."""
    found = re.search(r"--memory (\d+MiB)", str(error))
    if found is None:
        raise error
    return found[1]


def work_of(stages: Sequence[Sequence[ScheduledTensor]]) -> Work:
    """What the stages of a plan do, read past the page cache."""
    read = written = elements = 0
    products = 0.0
    for items in stages:
        pool = pool_bytes(items)
        for item in items:
            tensor = item.tensor
            written += tensor.output.nbytes
            read += disk_bytes_read(item, pool)
            if tensor.action == "merge" and item.steps:
                rows, columns = sorted(tensor.shape)
                products += float(max(1, len(tensor.models)) * rows * rows * columns)
            elif tensor.action == "merge":
                elements += math.prod(tensor.shape) * len(tensor.sources)
    return Work(read, written, elements, products)


def write_adapters(folder: Path, layout: Layout) -> list[Path]:
    """Headers of three LoRA adapters of every matrix of a model's layers, the first in place of a base."""
    matrices = {name: shape for name, shape in layout.shapes.items() if ".layers." in name and len(shape) == 2}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in matrices.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        shapes |= {f"{stem}.lora_A.weight": (RANK, columns), f"{stem}.lora_B.weight": (rows, RANK)}
    modules = sorted({name.split(".")[-2] for name in matrices})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": modules}
    raw = header(shapes, "BF16", 2)
    for number in range(3):
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "adapter_config.json").write_text(json.dumps(config))
        with (folder / str(number) / "adapter_model.safetensors").open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + 2 * sum(math.prod(shape) for shape in shapes.values()))
    return [folder / str(number) for number in range(3)]


if __name__ == "__main__":
    main()
