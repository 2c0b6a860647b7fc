"""The demo from end to end: the families side by side, trained and merged, then one table each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from mergepipe.cli.demo.table import Report, make_table, remarks
from mergepipe.errors import OutputExistsError

if TYPE_CHECKING:
    from mergepipe.cli.demo.language_merges import LanguageReport

FAMILIES = ("vision", "text")
LANGUAGE = "language"
LEGEND = (
    "* chosen on validation data; all accuracies are of test data. kept: share of the task vectors that was merged.",
    "uniform: the control of TADrop, every tensor trimmed to TADrop's overall density.",
    "scf_rkl, Q: all experts as donors of the base, at quantile Q. emr_unified: a mask per task, so no single model.",
)
SHORT = "Not in the quick demo: more hosts of TADrop, SCF-RKL, and a pair of models that write with their stability."


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
    with ProcessPoolExecutor(len(FAMILIES) + 1, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_family, name, root / name, seed, quick) for name in FAMILIES]
        pair = None if quick else pool.submit(run_pair, root / LANGUAGE, seed)
        reports = [future.result() for future in futures]
        written = None if pair is None else pair.result()
    console = Console(highlight=False, soft_wrap=True)
    for report in reports:
        print_table(console, make_table(report), LEGEND[:2] if quick else LEGEND, remarks(report))
    if written is None:
        console.print(SHORT)
    else:
        from mergepipe.cli.demo import language_table

        table = language_table.make_table(written)
        print_table(console, table, language_table.LEGEND, language_table.remarks(written))
    console.print(f"Recipes, experts and merges are in {root} ({time.monotonic() - started:.0f} s)")


def print_table(console: Console, table: Table, legend: Sequence[str], lines: Sequence[str]) -> None:
    """A table, what its words mean, and what it says."""
    # As wide as it is: a narrow terminal had better wrap its lines than leave out what does not fit.
    width = Console(width=1000).measure(table).maximum
    Console(highlight=False, width=max(width, console.width)).print(table)
    console.print("", *legend, sep="\n")
    for line in lines:
        console.print(f"- {line}")
    console.print()


def run_family(name: str, folder: Path, seed: int, quick: bool) -> Report:
    """Train and merge family `name` below `folder`; runs in a process of its own."""
    tell = _teller(name)
    tell("training a base and its experts")
    from mergepipe.cli.demo.merges import merge_family
    from mergepipe.cli.demo.training import quiet

    quiet()
    family = import_module(f"mergepipe.cli.demo.{name}").make_family(folder, seed=seed, quick=quick)
    return merge_family(family, folder, quick=quick, tell=lambda method: tell(f"merged by {method}"))


def run_pair(folder: Path, seed: int) -> LanguageReport:
    """Train and merge the pair that writes below `folder`; runs in a process of its own."""
    tell = _teller(LANGUAGE)
    tell("training a base and two experts")
    from mergepipe.cli.demo.language import make_pair
    from mergepipe.cli.demo.language_merges import merge_pair
    from mergepipe.cli.demo.training import quiet

    quiet()
    return merge_pair(make_pair(folder, seed=seed), folder, tell=tell)


def _teller(name: str) -> Callable[[str], None]:
    """Something that says on stderr what is being done, and since when."""
    started = time.monotonic()
    return lambda what: click.echo(f"{time.monotonic() - started:5.0f} s  {name}: {what}", err=True)
