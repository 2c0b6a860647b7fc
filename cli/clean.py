"""`mergepipe clean`: remove a workspace."""

from __future__ import annotations

import click

from mergepipe.cli.options import show_bytes, work_option


@click.command("clean")
@work_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def command(work: str, yes: bool) -> None:
    """Remove a workspace: its plan, journal, statistics and copied stores, and unfinished output of its plan.

    Inputs and finished outputs are never touched.

    \b
    Example:
      mergepipe clean
      mergepipe clean --work w --yes
    """
    from mergepipe.pipeline.clean import clean, scratch

    found = scratch(work)
    for path in found.paths:
        click.echo(f"removes   {path}", err=True)
    if not yes:
        click.confirm(f"remove these {show_bytes(found.nbytes)}?", abort=True, err=True)
    clean(work)
    click.echo(f"removed   {show_bytes(found.nbytes)}")
