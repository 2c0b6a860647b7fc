"""The demo from end to end: both families side by side, trained and merged, then one table each."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import click
from rich.console import Console

from mergepipe.cli.demo.table import Report, make_table, remarks
from mergepipe.errors import OutputExistsError

FAMILIES = ("vision", "text")
LEGEND = (
    "* chosen on validation data; all accuracies are of test data. kept: share of the task vectors that was merged.",
    "uniform: the control of TADrop, every tensor trimmed to TADrop's overall density.",
)


def show(folder: str | Path, *, seed: int, quick: bool) -> None:
    """Train, merge, and print one table per family.

    Parameters
    ----------
    folder : path
        Made if need be; everything is written below it.
    seed : int
        Fixes data, weights and order of training.
    quick : bool
        Train less, try fewer lambdas.

    Raises
    ------
    OutputExistsError
        If `folder` holds something already.
    """
    root = Path(folder).absolute()
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise OutputExistsError(f"'{root}' is not empty: name another folder for the demo, or remove it")
    root.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    # A process and a thread of torch for each family: such small models gain nothing from a second thread, and the
    # numbers do not depend on how many processors there are.
    with ProcessPoolExecutor(len(FAMILIES), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_family, name, root / name, seed, quick) for name in FAMILIES]
        reports = [future.result() for future in futures]
    console = Console(highlight=False, soft_wrap=True)
    for report in reports:
        console.print(make_table(report))
        console.print("", *LEGEND, sep="\n")
        for line in remarks(report):
            console.print(f"- {line}")
        console.print()
    console.print(f"Recipes, experts and merges are in {root} ({time.monotonic() - started:.0f} s)")


def run_family(name: str, folder: Path, seed: int, quick: bool) -> Report:
    """Train and merge family `name` below `folder`; runs in a process of its own."""
    started = time.monotonic()

    def tell(what: str) -> None:
        click.echo(f"{time.monotonic() - started:5.0f} s  {name}: {what}", err=True)

    tell("training a base and its experts")
    from mergepipe.cli.demo.merges import merge_family
    from mergepipe.cli.demo.training import quiet

    quiet()
    family = import_module(f"mergepipe.cli.demo.{name}").make_family(folder, seed=seed, quick=quick)
    return merge_family(family, folder, quick=quick, tell=lambda method: tell(f"merged by {method}"))
