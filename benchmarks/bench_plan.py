"""How long `build` takes for plans of many tensors, from headers alone.

The checkpoints are headers followed by holes: real names, counts and sizes, hardly a byte on disk, and none of it read.
Two plans: 723 tensors cut into about 18,000 chunks, as a 70B model is, and 45,000 tensors, as a large mixture of
experts has. Shapes are a tenth of the real ones, so that the check for free disk space passes on a small machine.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from benchmarks.data import Layout, write_headers_only
from benchmarks.process import build, ties_recipe
from benchmarks.report import Report, common_options

TENTH_OF_70B = Layout(2560, 8960, 80, 40_064, 20, 4)


def experts_layout(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a mixture of experts, as an unfused checkpoint has them."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (32_000, 512)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": (512, 512) for part in "qkvo"}
        shapes |= {f"{at}.{norm}_layernorm.weight": (512,) for norm in ("input", "post_attention")}
        shapes[f"{at}.mlp.gate.weight"] = (experts, 512)
        for expert in range(experts):
            one = f"{at}.mlp.experts.{expert}"
            shapes |= {f"{one}.{part}_proj.weight": (192, 512) for part in ("gate", "up")}
            shapes[f"{one}.down_proj.weight"] = (512, 192)
    return shapes


@click.command()
@click.option("--repeats", default=3, show_default=True)
@common_options
def main(repeats: int, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time `mergepipe build` of TIES over a base and two experts for plans of many tensors."""
    plans = {
        "723 tensors": (TENTH_OF_70B.shapes, "800KiB", 15),
        "45,000 tensors": (experts_layout(94, 158), "8MiB", 30),
    }
    if quick:
        repeats = 1
        plans = {"341 tensors": (experts_layout(4, 26), "64KiB", 3)}
    report = Report("plan", {"repeats": repeats})
    with tempfile.TemporaryDirectory(dir=folder, prefix="mergepipe-bench-") as name:
        for number, (title, (shapes, chunk_size, shards)) in enumerate(plans.items()):
            here = Path(name) / str(number)
            folders = write_headers_only(here / "models", shapes, 3, shards)
            recipe = ties_recipe(folders)
            used = [build(recipe, here / f"build-{i}", "--chunk-size", chunk_size) for i in range(repeats)]
            report.add(f"{title}: tensors", len(shapes), "")
            wall = report.add(f"{title}: build", [one.wall_s for one in used], "s")
            report.add(f"{title}: build, CPU", [one.cpu_s for one in used], "s")
            report.add(f"{title}: build, peak resident memory", [one.peak_rss / 2**20 for one in used], "MiB")
            report.add(f"{title}: build per tensor, start-up included", 1e6 * wall / len(shapes), "us")
    report.save(json_path)


if __name__ == "__main__":
    main()
