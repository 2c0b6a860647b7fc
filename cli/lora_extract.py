"""`mergepipe lora-extract`: a LoRA adapter from a base and a fine-tune of it."""

from __future__ import annotations

from typing import Literal

import click

from mergepipe.cli.options import json_option, print_json


@click.command("lora-extract")
@click.argument("base")
@click.argument("finetuned")
@click.argument("out", type=click.Path())
@click.option("--rank", type=click.IntRange(min=1), required=True, metavar="N", help="Rank of each pair, at the most.")
@click.option("-i", "--include", multiple=True, metavar="REGEX", help="Only tensors whose name matches; repeatable.")
@click.option("-e", "--exclude", multiple=True, metavar="REGEX", help="No tensors whose name matches; repeatable.")
@click.option("--save-module", "save", multiple=True, metavar="REGEX", help="Save such modules whole; repeatable.")
@click.option("--embed-lora", is_flag=True, help="Give embeddings a pair, too, instead of saving them whole.")
@click.option("--skip-undecomposable", is_flag=True, help="Leave out norms, biases and whatever else has no pair.")
@click.option("--sv-epsilon", type=float, default=0.0, help="Leave out singular values of at most this.")
@click.option("--dtype", help="Type of the adapter; each tensor's own in the base by default.")
@click.option(
    "--svd",
    type=click.Choice(["auto", "exact"]),
    default="auto",
    show_default=True,
    help="How small ranks of large matrices are found: by a seeded range finder, or as all others.",
)
@click.option("--memory", metavar="SIZE", help="Ceiling of memory, such as 8GiB; half of what is free by default.")
@click.option("--workers", type=click.IntRange(min=1), metavar="N", help="Matrices at work at once, memory permitting.")
@click.option("--quiet", is_flag=True, help="No progress.")
@json_option
def command(
    base: str,
    finetuned: str,
    out: str,
    rank: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    save: tuple[str, ...],
    embed_lora: bool,
    skip_undecomposable: bool,
    sv_epsilon: float,
    dtype: str | None,
    svd: Literal["auto", "exact"],
    memory: str | None,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write the LoRA adapter that turns BASE into FINETUNED.

    Both are named as in a recipe: a folder, a file, a hub id, each with +ADAPTER if need be. OUT becomes a folder that
    PEFT loads. Matrices are read in pieces and factored one by one. Norms and biases that
    changed, and embeddings, are saved whole. Interrupted, the same command goes on.

    \b
    Example:
      mergepipe lora-extract ./llama-base ./expert-math ./math-lora --rank 64
      mergepipe lora-extract ./llama-base ./expert-math ./math-lora --rank 16 -i self_attn --memory 2GiB
      mergepipe lora-extract org/base org/base+./adapter ./smaller --rank 4
    """
    from mergepipe.cli.progress import progress
    from mergepipe.cli.run import stop_on_signal
    from mergepipe.pipeline.extract import extract_lora
    from mergepipe.pipeline.spool import Wanted

    wanted = Wanted(rank, include, exclude, save, embed_lora, skip_undecomposable, sv_epsilon, dtype, svd)
    with stop_on_signal() as stop, progress(quiet) as listener:
        made = extract_lora(base, finetuned, out, wanted, memory=memory, workers=workers, stop=stop, on_event=listener)
    if as_json:
        print_json(
            {
                "output": str(made.output),
                "energy": made.energy,
                "modules": {name: {"rank": made.ranks[name], "energy": made.energies[name]} for name in made.ranks},
                "whole": list(made.whole),
                "left_out": list(made.left_out),
                "unchanged": made.unchanged,
            }
        )
        return
    click.echo(f"adapter   {made.output}")
    click.echo(f"pairs     {len(made.ranks)} modules, rank {max(made.ranks.values(), default=0)} at the most")
    if made.energies:
        worst = min(made.energies, key=lambda name: made.energies[name])
        click.echo(
            f"energy    {made.energy:.2%} of the updates' squared norm; least {made.energies[worst]:.2%} ({worst})"
        )
    click.echo(f"whole     {len(made.whole)} tensors saved as they are")
    click.echo(f"left out  {len(made.left_out)} tensors that changed; {made.unchanged} did not")
