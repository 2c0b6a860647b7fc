"""`mergepipe check`: every fault of a recipe and its checkpoints at once."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Literal

import click

from mergepipe.cli.options import json_option, print_json, tensors_option, work_option

if TYPE_CHECKING:
    from mergepipe.pipeline.check import Check


@click.command("check")
@click.argument("recipe", type=click.Path(dir_okay=False), default="mergepipe.yaml")
@work_option
@click.option("--out", type=click.Path(), help="Output folder; the recipe's `output`, else ./merged, by default.")
@click.option(
    "--memory",
    metavar="SIZE",
    help="Ceiling of the run's memory, such as 8GiB; by default 512MiB, or half of what is free for whole matrices.",
)
@click.option("--shard-size", metavar="SIZE", help="Size of an output file, such as 5GB; by default as in the base.")
@tensors_option
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace a value of the recipe.")
@json_option
def command(
    recipe: str,
    work: str,
    out: str | None,
    memory: str | None,
    shard_size: str | None,
    tensors: Literal["union", "intersection"] | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Tell everything that is wrong with a recipe and its checkpoints.

    Reads the recipe and the headers of the checkpoints, no weights, and writes nothing. Where `build` stops at the
    first stage that finds a fault, this goes on: faults of the recipe, missing or broken files, tensors that do not
    fit, memory, disk, and what is in the way. The exit code is that of the most basic fault, 0 if there is none. Of hub
    ids only the headers are fetched, by range.

    \b
    Example:
      mergepipe check
      mergepipe check recipe.yaml --memory 2GiB --json
    """
    from mergepipe.cli.plan import print_summary
    from mergepipe.pipeline.check import check, report

    checked = check(recipe, work, out=out, memory=memory, shard_size=shard_size, overrides=overrides, tensors=tensors)
    result = report(checked)
    if as_json:
        print_json(result)
    elif checked.faults:
        _print_faults(checked)
    else:
        print_summary(result["plan"])
        for note in checked.notes:
            click.echo(f"note      {note}")
        click.echo("no faults found; nothing was written")
    click.get_current_context().exit(checked.exit_code)


def _print_faults(checked: Check) -> None:
    count = len(checked.faults)
    click.echo(f"{count} fault{'s' * (count != 1)} found; nothing was written")
    for kind, group in groupby(checked.faults, lambda one: one.kind):
        click.echo(f"\n{kind}")
        for one in group:
            text = one.message if one.where is None else f"{one.where}: {one.message}"
            click.echo("  " + text.replace("\n", "\n  "))
    if checked.unchecked:
        click.echo(f"\nnot looked at because of these faults: {', '.join(checked.unchecked)}")
