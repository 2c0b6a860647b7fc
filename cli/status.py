"""`mergepipe status`: how far a job is."""

from __future__ import annotations

from dataclasses import asdict

import click

from mergepipe.cli.options import json_option, print_json, show_bytes, show_seconds, work_option


@click.command("status")
@work_option
@json_option
def command(work: str, as_json: bool) -> None:
    """Show whether a job is built, running, interrupted, damaged or done, and what to do next.

    \b
    Example:
      mergepipe status
      mergepipe status --json
    """
    from mergepipe.pipeline.status import status

    found = status(work)
    if as_json:
        print_json(asdict(found) | {"percent": round(found.percent, 2)})
        return
    click.echo(f"state     {found.state}" + (f", process {found.process}" if found.process else ""))
    click.echo(f"output    {found.output}")
    for name, state in found.merges.items():
        click.echo(f"merge     {name}: {state}")
    amount = f"{show_bytes(found.done_bytes)} of {show_bytes(found.total_bytes)}"
    click.echo(f"done      {int(found.percent)} %, {amount}, {found.shards_done} of {found.shards} files")
    if found.work_bytes and found.worked_bytes is not None:
        amount = f"{show_bytes(found.worked_bytes)} of {show_bytes(found.work_bytes)}"
        click.echo(f"work      {100 * found.worked_bytes // found.work_bytes} %, {amount} read and written")
    if found.rate and found.left_s is not None:
        click.echo(f"rate      {show_bytes(found.rate)}/s, {show_seconds(found.left_s)} left at that")
    for text in found.damage:
        click.echo(f"damage    {text}")
    if found.failure is not None:
        click.echo(f"stopped   {found.failure}")
    click.echo(f"next      {found.remedy}")
