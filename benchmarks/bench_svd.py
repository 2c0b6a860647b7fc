"""The routes to a matrix's leading singular vectors, on one thread, against `torch.linalg.svd` of the whole matrix.

Every route gets the same float64 matrix in panels and finds as many components as `rank: auto` keeps for three models;
the randomized one finds a sixteenth of them all, which is what it is for.
"""

from __future__ import annotations

import time
from pathlib import Path

import click

from benchmarks.report import Report, common_options

SHAPES = {"quick": (96, 160), "small": (1024, 3584), "full": (4096, 14336)}


@click.command()
@click.option("--full", is_flag=True, help="4096 x 14336, which takes minutes and 6 GiB, instead of 1024 x 3584.")
@click.option("--threads", default=1, show_default=True, help="Threads of torch; a merge uses one in each worker.")
@click.option("--device", default="cpu", show_default=True, help="As torch names it.")
@common_options
def main(full: bool, threads: int, device: str, quick: bool, json_path: Path | None, folder: Path | None) -> None:
    """Time the full, Gram and randomized routes."""
    import torch

    shape = SHAPES["quick" if quick else "full" if full else "small"]
    torch.set_num_threads(threads)
    report = Report("svd", {"shape": list(shape), "threads": threads, "device": device})
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    auto, few = max(1, min(shape) // 3), max(1, min(shape) // 16)
    start = time.perf_counter()
    _, values, _ = torch.linalg.svd(matrix, full_matrices=False)
    yardstick = report.add("torch.linalg.svd of the whole", _since(start, device), "s")
    for way, rank in (("gram", auto), ("randomized", few)):
        seconds, residual = _factor(matrix, way, rank, device)
        report.add(f"{way}, {rank} components", seconds, "s")
        report.add(f"{way}: time against torch.linalg.svd", seconds / yardstick, "x")
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
    start = time.perf_counter()
    found = factorize(panels, rank, way, matrix)  # type: ignore[arg-type]
    seconds = _since(start, device)
    return seconds, float(torch.linalg.norm(matrix - (found.left * found.values) @ found.right.T))


def _since(start: float, device: str) -> float:
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
