"""`mergepipe materialize`: one task's own model from a merge that keeps heads or masks beside it."""

from __future__ import annotations

import click


@click.command("materialize")
@click.argument("merged", type=click.Path(exists=True, file_okay=False), metavar="OUT")
@click.option("--task", required=True, metavar="NAME", help="The task: a folder in OUT/heads or OUT/tasks.")
@click.option("--out", type=click.Path(), metavar="DIR", help="The checkpoint to write; OUT-NAME by default.")
@click.option(
    "--base", type=click.Path(exists=True, file_okay=False), help="Where the base of masks is now, if it moved."
)
def command(merged: str, task: str, out: str | None, base: str | None) -> None:
    """Write one task's own model from a merge.

    OUT is the output of a merge with `heads: separate`, or by emr_unified: its folder, no hub id. The model is written
    into a folder of its own, beside OUT unless --out says where; never over something that exists.

    \b
    Example:
      mergepipe materialize ./merged --task expert-math    # writes ./merged-expert-math
    """
    from mergepipe.pipeline.materialize import materialize

    click.echo(f"written to {materialize(merged, task=task, out=out, base=base)}")
