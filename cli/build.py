"""`mergepipe build`: check everything and write the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from mergepipe.cli.options import json_option, print_json, tensors_option, work_option


@click.command("build")
@click.argument("recipe", type=click.Path(dir_okay=False), default="mergepipe.yaml")
@work_option
@click.option("--out", type=click.Path(), help="Output folder; the recipe's `output`, else ./merged, by default.")
@click.option(
    "--store",
    type=click.Choice(["auto", "virtual", "copy"]),
    default="auto",
    show_default=True,
    help="How models become chunked zarr: byte ranges of their own files, or a copy.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    help="Ceiling of the run's memory, such as 8GiB; by default 512MiB, or half of what is free for whole matrices.",
)
@click.option("--chunk-size", metavar="SIZE", default="8MiB", show_default=True, help="Size of a chunk.")
@click.option("--shard-size", metavar="SIZE", help="Size of an output file, such as 5GB; by default as in the base.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the recipe.")
@tensors_option
@click.option("--force", is_flag=True, help="Drop the unfinished work of another plan in the workspace.")
@json_option
def command(
    recipe: str,
    work: str,
    out: str | None,
    store: Literal["auto", "virtual", "copy"],
    memory: str | None,
    chunk_size: str,
    shard_size: str | None,
    overrides: tuple[str, ...],
    tensors: Literal["union", "intersection"] | None,
    force: bool,
    as_json: bool,
) -> None:
    """Check a recipe and its checkpoints, and write the plan.

    RECIPE is mergepipe.yaml unless another file is named. Nothing is merged yet.

    \b
    Example:
      mergepipe build
      mergepipe build recipe.yaml --memory 2GiB --set parameters.lambda=0.7
    """
    from mergepipe.pipeline.machine import one_blas_thread
    from mergepipe.storage.collector import imports_that_stay

    with one_blas_thread(), imports_that_stay():
        from mergepipe.cli.plan import print_summary
        from mergepipe.cli.progress import progress
        from mergepipe.pipeline.build import build
        from mergepipe.pipeline.chain_run import plans
        from mergepipe.pipeline.summary import summarize
        from mergepipe.storage.workspace import Workspace

    with progress() as listener:
        plan = build(
            recipe,
            work,
            out=out,
            memory=memory,
            store=store,
            chunk_size=chunk_size,
            shard_size=shard_size,
            overrides=overrides,
            tensors=tensors,
            force=force,
            on_event=listener,
        )
    summary = summarize(plan)
    merges = {name: summarize(earlier) for name, _, earlier in plans(Workspace(Path(work)))}
    if as_json:
        print_json(summary | ({"merges": merges} if merges else {}))
        return
    for name, found in merges.items():
        click.echo(f"merge     {name}")
        print_summary(found)
        click.echo()
    print_summary(summary)
    where = "" if work == ".mergepipe" else f" -w {work}"
    click.echo(f"`mergepipe run{where}` merges, `mergepipe plan{where}` shows the plan in full")
