"""The routes to a matrix's leading singular vectors, on one thread, against `torch.linalg.svd` of the whole matrix.

Every route gets the same float64 matrix in panels. The Gram route finds as many components as `rank: auto` keeps for
three models; the randomized one finds 64, or a sixteenth of them all where that is less, which is what it is for. On
the CPU all is CPU time, on a GPU elapsed time.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from benchmarks.report import Report, common_options

SHAPES = {"tiny": (96, 160), "small": (1024, 3584), "medium": (2048, 7168), "full": (4096, 14336)}


@click.command()
@click.option(
    "--size",
    type=click.Choice(list(SHAPES)),
    default="small",
    show_default=True,
    help="1024 x 3584; medium twice that along both sides, full four times, which takes minutes and 6 GiB.",
)
@click.option(
    "--route",
    "routes",
    type=click.Choice(["gram", "randomized"]),
    multiple=True,
    default=["gram", "randomized"],
    show_default=True,
)
@click.option("--threads", default=1, show_default=True, help="Threads of torch; a merge uses one in each worker.")
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
@common_options
def main(
    size: str,
    routes: tuple[str, ...],
    threads: int,
    device: str,
    quick: bool,
    json_path: Path | None,
    folder: Path | None,
) -> None:
    """Time the full, Gram and randomized routes."""
    import torch

    shape = SHAPES["tiny" if quick else size]
    torch.set_num_threads(threads)
    report = Report("svd", {"shape": list(shape), "threads": threads, "device": device})
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    ranks = {"gram": max(1, min(shape) // 3), "randomized": min(64, max(1, min(shape) // 16))}
    start = _now(device)
    _, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    yardstick = report.add("torch.linalg.svd of the whole", _now(device) - start, "s")
    for way in dict.fromkeys(routes):
        rank = ranks[way]
        seconds, residual = _factor(matrix, way, rank, device)
        report.add(f"{way}, {rank} components", seconds, "s")
        report.add(f"{way}: torch.linalg.svd / ours", yardstick / seconds, "x")
        best = float(torch.linalg.norm(values[rank:]))
        report.add(f"{way}: residual against the best possible", residual / best, "x")
    report.save(json_path)


def _factor(matrix: object, way: str, rank: int, device: str) -> tuple[float, float]:
    """Seconds, and the norm of what the components leave of the matrix."""
    import torch

    from mergepipe.tasks.subspace.factor import factorize
    from mergepipe.tasks.subspace.panels import Made

    assert isinstance(matrix, torch.Tensor)
    panels = Made((matrix.shape[0], matrix.shape[1]), lambda span: matrix[span[0] : span[1]].clone())
    start = _now(device)
    found = factorize(panels, rank, way, matrix)  # type: ignore[arg-type]
    seconds = _now(device) - start
    return seconds, float(torch.linalg.norm(matrix - (found.left * found.values) @ found.right.T))


def _now(device: str) -> float:
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


if __name__ == "__main__":
    main()
