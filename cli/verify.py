"""`mergepipe verify`: is what lies on disk what was written."""

from __future__ import annotations

from dataclasses import asdict

import click

from mergepipe.cli.options import json_option, print_json, show_bytes


@click.command("verify")
@click.argument("path", type=click.Path(), default=".mergepipe")
@click.option("--full", is_flag=True, help="Read every byte; a sample otherwise.")
@json_option
def command(path: str, full: bool, as_json: bool) -> None:
    """Check an output folder, or a workspace and its output, against their checksums.

    Damage is named by file, tensor and chunk, and ends the command with exit code 7.

    \b
    Example:
      mergepipe verify merged
      mergepipe verify --full
    """
    from mergepipe.pipeline.verify import verify

    report = verify(path, full=full)
    if as_json:
        print_json(asdict(report) | {"ok": not report.damage})
        click.get_current_context().exit(7 if report.damage else 0)
    report.raise_for_damage()
    for text in report.notes:
        click.echo(f"note      {text}")
    how = "every byte" if full else "a sample"
    click.echo(f"intact    {report.path}: {report.files} files, {show_bytes(report.nbytes)} compared ({how})")
