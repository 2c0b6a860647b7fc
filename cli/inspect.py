"""`mergepipe inspect`: what is in checkpoints, and in what they differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergepipe.cli.options import json_option, print_json, show_bytes, show_count, show_shape
from mergepipe.errors import UsageError

if TYPE_CHECKING:
    from mergepipe.pipeline.compare import Difference, TensorStatistics
    from mergepipe.pipeline.models import InputModel

NAMES_SHOWN = 10
"""Names of tensors in one line of differences before the rest is counted."""


@click.command("inspect")
@click.argument("checkpoints", nargs=-1, required=True, metavar="CHECKPOINT...")
@click.option("--stats", is_flag=True, help="Read the tensors, too: norms and densities of the task vectors.")
@json_option
def command(checkpoints: tuple[str, ...], stats: bool, as_json: bool) -> None:
    """Show what is in checkpoints, and how they differ.

    Tensors, dtypes, shapes, shards and sizes of one. With two or more, show in what the others differ from the first;
    --stats takes the first as the base of their task vectors. Each is named as in a recipe: a folder, a file, a hub id,
    with +ADAPTER if need be. Of a hub id only the headers are fetched, by range, without --stats.

    \b
    Example:
      mergepipe inspect ./llama-base
      mergepipe inspect ./llama-base ./expert-math ./expert-code --stats
      mergepipe inspect org/base org/base+./adapter --stats
    """
    from mergepipe.cli.progress import progress
    from mergepipe.pipeline.compare import compare_headers, open_shown, task_vector_statistics
    from mergepipe.pipeline.events import Announcer

    if stats and len(checkpoints) < 2:
        raise UsageError("--stats compares: name a base and at least one other checkpoint")
    with progress(quiet=False) as listener:
        opened = open_shown(checkpoints, Announcer(listener), values=stats)
    difference = compare_headers(opened) if len(opened) > 1 else None
    statistics = list(task_vector_statistics(opened)) if stats else []
    if as_json:
        print_json(_as_json(opened, difference, statistics, stats))
        return
    for checkpoint in opened:
        _print_summary(checkpoint)
    if difference is None:
        _print_tensors(opened[0])
    else:
        _print_difference(difference, opened)
    if stats:
        _print_statistics(statistics, opened)


def _dtypes(checkpoint: InputModel) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for tensor in checkpoint.tensors.values():
        entry = found.setdefault(tensor.dtype, {"tensors": 0, "parameters": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["parameters"] += _size(tensor.shape)
        entry["bytes"] += tensor.nbytes
    return found


def _size(shape: Iterable[int]) -> int:
    from math import prod

    return prod(shape)


def _print_summary(checkpoint: InputModel) -> None:
    dtypes = _dtypes(checkpoint)
    files = len(checkpoint.files)
    click.echo(
        f"{checkpoint.reference}: {_tensors(len(checkpoint.tensors))}, "
        f"{show_count(sum(d['parameters'] for d in dtypes.values()))} parameters, "
        f"{show_bytes(sum(file.size for file in checkpoint.files))} in {files} file{'s' * (files != 1)}"
    )
    for name, entry in dtypes.items():
        click.echo(f"  {name}: {_tensors(entry['tensors'])}, {show_bytes(entry['bytes'])}")


def _tensors(count: int) -> str:
    return f"{count} tensor{'s' * (count != 1)}"


def _print_tensors(checkpoint: InputModel) -> None:
    rows = [
        (name, t.dtype, show_shape(t.shape), show_bytes(t.nbytes), Path(checkpoint.files[t.file].path).name)
        for name, t in checkpoint.tensors.items()
    ]
    print_table(("tensor", "dtype", "shape", "size", "file"), rows)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows below a head on stdout, in columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        click.echo("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_difference(difference: Difference, opened: Sequence[InputModel]) -> None:
    click.echo()
    if difference.same:
        click.echo("same tensor names, shapes and dtypes")
    for number, checkpoint in enumerate(opened[1:]):
        for what, names in (
            ("lacks", difference.missing[number]),
            ("has besides", difference.extra[number]),
            ("other shape", difference.reshaped[number]),
            ("other dtype", difference.retyped[number]),
        ):
            if names:
                more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                click.echo(f"{checkpoint.reference}: {what} ({len(names)}): {', '.join(names[:NAMES_SHOWN])}{more}")


def _print_statistics(statistics: Sequence[TensorStatistics], opened: Sequence[InputModel]) -> None:
    from mergepipe.pipeline.compare import total_statistics

    click.echo("\ntask vectors: norm of the difference to the base, and the fraction of it that is not zero")
    head = ["tensor", "base norm"]
    for checkpoint in opened[1:]:
        head += [f"{checkpoint.reference.label} norm", "density"]
    entries = [*statistics, total_statistics(statistics, len(opened) - 1)]
    rows = []
    for entry in entries:
        row = [entry.name, f"{entry.base_norm:.6g}"]
        for norm, density in zip(entry.norms, entry.densities, strict=True):
            row += [f"{norm:.6g}", f"{density:.4f}"]
        rows.append(row)
    print_table(head, rows)


def _as_json(
    opened: Sequence[InputModel],
    difference: Difference | None,
    statistics: Sequence[TensorStatistics],
    stats: bool,
) -> dict[str, Any]:
    from mergepipe.pipeline.compare import total_statistics

    result: dict[str, Any] = {"checkpoints": [_checkpoint_json(checkpoint) for checkpoint in opened]}
    if difference is not None:
        result["differences"] = [
            {
                "checkpoint": str(checkpoint.reference),
                "missing": list(difference.missing[number]),
                "extra": list(difference.extra[number]),
                "other_shape": list(difference.reshaped[number]),
                "other_dtype": list(difference.retyped[number]),
            }
            for number, checkpoint in enumerate(opened[1:])
        ]
    if stats:
        result["statistics"] = {
            "base": str(opened[0].reference),
            "models": [str(checkpoint.reference) for checkpoint in opened[1:]],
            "tensors": [entry.to_dict() for entry in statistics],
            "total": total_statistics(statistics, len(opened) - 1).to_dict(),
        }
    return result


def _checkpoint_json(checkpoint: InputModel) -> dict[str, Any]:
    return {
        "path": str(checkpoint.reference),
        "files": [{"file": Path(file.path).name, "bytes": file.size} for file in checkpoint.files],
        "dtypes": _dtypes(checkpoint),
        "tensors": [
            {
                "name": name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "file": Path(checkpoint.files[tensor.file].path).name,
            }
            for name, tensor in checkpoint.tensors.items()
        ],
    }
