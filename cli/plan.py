"""`mergepipe plan`: what will be done, in full."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergepipe.cli.inspect import print_table
from mergepipe.cli.options import json_option, print_json, show_bytes, show_count, show_shape, work_option
from mergepipe.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from mergepipe.pipeline.plan import Plan


@click.command("plan")
@work_option
@click.option(
    "--graph", type=click.Path(dir_okay=False, path_type=Path), help="Draw the Dask graph of one bundle (SVG)."
)
@json_option
def command(work: str, graph: Path | None, as_json: bool) -> None:
    """Show the plan, tensor by tensor.

    The method, passes over the inputs, units, bytes and memory of each.

    \b
    Example:
      mergepipe plan
      mergepipe plan --graph bundle.svg
    """
    from mergepipe.pipeline.chain_run import plans
    from mergepipe.pipeline.plan import Plan
    from mergepipe.storage.workspace import Workspace

    root = Workspace(Path(work))
    plan = Plan.from_json(root.read_plan())
    before = {name: earlier for name, _, earlier in plans(root)}
    if graph is not None:
        _draw(graph, _picture(plan))
    if as_json:
        merges = {name: _in_full(earlier) for name, earlier in before.items()}
        print_json(_in_full(plan) | ({"merges": merges} if merges else {}))
        return
    for name, earlier in before.items():
        click.echo(f"merge     {name}")
        _print_full(earlier)
        click.echo()
    _print_full(plan)
    if graph is not None:
        click.echo(f"\nthe graph of one bundle is drawn in {graph}")


def _in_full(plan: Plan) -> dict[str, Any]:
    from mergepipe.pipeline.summary import summarize, tensor_rows

    return summarize(plan) | {"per_tensor": tensor_rows(plan)}


def _print_full(plan: Plan) -> None:
    found = _in_full(plan)
    print_summary(found)
    for note in found["notes"]:
        click.echo(f"note      {note}")
    click.echo()
    head = ("tensor", "shape", "dtype", "method", "passes", "units", "read", "write", "memory")
    print_table(head, [_cells(row, staged=plan.first_stage is not None) for row in found["per_tensor"]])


def _draw(path: Path, picture: str) -> None:
    """Write the picture; over an older picture if there is one, never over anything else."""
    if path.suffix != ".svg":
        raise UsageError(f"'{path}' is no name for the picture: it is SVG, so name a file that ends in .svg")
    try:
        if path.exists() and not path.read_bytes().startswith(b"<svg"):
            raise OutputExistsError(f"'{path}' exists and is no SVG: name another file")
        path.write_text(picture, encoding="utf-8")
    except OSError as error:
        if isinstance(error, OutputExistsError):
            raise
        raise UsageError(f"'{path}' can't be written: {error.strerror}") from error


def print_summary(summary: dict[str, Any]) -> None:
    """Print what `mergepipe.pipeline.summary.summarize` found, in a few lines on stdout."""
    click.echo(f"plan      {summary['id']}")
    width = max(len(model["label"]) for model in summary["models"])
    for model in summary["models"]:
        kind = "copied" if model["store"] == "copy" else "virtual"
        role = "weighing" if model["role"] == "importance" else model["role"]
        click.echo(
            f"{role:8}  {model['label']:{width}}  {model['tensors']} tensors, {show_bytes(model['nbytes'])}; "
            f"{kind} zarr, {show_bytes(model['copied_bytes'])} ({model['why']})"
        )
    beside = sum(map(len, summary["side"].values()))
    kept = f", {beside} kept beside the merge" if beside else ""
    click.echo(
        f"tensors   {summary['merged']} merged, {summary['copied']} copied{kept}; "
        f"{show_count(summary['parameters'])} parameters"
    )
    click.echo(f"methods   {', '.join(f'{name} ({count})' for name, count in summary['methods'].items()) or 'none'}")
    click.echo(
        f"read      {show_bytes(summary['input_bytes'])}, "
        f"{show_bytes(summary['requested_bytes'])} in all passes (up to {summary['sweeps']} over a tensor), "
        f"{show_bytes(summary['read_bytes'])} of them from the disk"
    )
    files = f"{summary['shards']} file{'s' * (summary['shards'] != 1)}"
    click.echo(f"write     {show_bytes(summary['output_bytes'])} in {files} to {summary['output']}")
    if summary["first_stage_bytes"]:
        click.echo(f"keep      {show_bytes(summary['first_stage_bytes'])} beside it, for models to be added later")
    needed, projected = show_bytes(summary["needed_bytes"]), show_bytes(summary["projected_bytes"])
    click.echo(
        f"memory    {projected} projected at the peak ({needed} needed, the rest buffers reads), "
        f"{show_bytes(summary['allowed_bytes'])} allowed"
    )
    click.echo(f"disk      {show_bytes(summary['disk_bytes'])} needed")


def _cells(row: dict[str, Any], *, staged: bool = False) -> tuple[str, ...]:
    method = row["method"] or "copied"
    if staged:
        method += f", stage {row['stage']}"
    return (
        row["name"],
        show_shape(tuple(row["shape"])),
        row["dtype"],
        method if row["sparsify"] == "none" else f"{row['sparsify']} + {method}",
        str(len(row["sweeps"]) + 1),
        str(row["units"]),
        show_bytes(row["bytes_read"]),
        show_bytes(row["bytes_written"]),
        show_bytes(row["projected_bytes"]),
    )


class _Stages:
    """The stages of a tensor that is drawn and not run."""

    def __init__(self, sweeps: Any, units: Any, steps: Any) -> None:
        self.sweeps = sweeps
        self.steps = steps
        self.sweep_units = self.units = units

    def reduce(self, *_: object) -> None:
        """Stands for a node."""

    combine = apply = take_step = reduce


def _picture(plan: Plan) -> str:
    """SVG of the graph of the tensor that has most nodes."""
    from mergepipe.pipeline.draw import draw_graph
    from mergepipe.pipeline.graph import tensor_graph
    from mergepipe.pipeline.summary import scheduled

    item = max(scheduled(plan), key=lambda item: item.tasks)
    stages = _Stages(item.sweeps, item.units, item.steps)
    return draw_graph(item.tensor.name, tensor_graph(item.tensor.name, stages, stages.apply), item.sweeps)
