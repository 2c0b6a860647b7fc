"""Two results of one benchmark side by side: each figure before and after, their ratio, and whether it is a difference.

A figure has changed where the two ranges of its repeats do not meet and the medians differ by more than the wider
range; one that was taken once has no range, and only its ratio is shown. Of two folders, results of the same file name
are compared, one table after another, and those that only one of them holds are named.

    python -m benchmarks.compare OLD.json NEW.json
    python -m benchmarks.compare OLD NEW
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.report import Figure


@dataclass(frozen=True)
class Compared:
    """A figure of two results; None where one of them lacks it."""

    name: str
    unit: str
    old: Figure | None
    new: Figure | None

    @property
    def ratio(self) -> float | None:
        """New / old; None where there is none."""
        if self.old is None or self.new is None or self.old.value == 0:
            return None
        return self.new.value / self.old.value

    @property
    def verdict(self) -> str:
        """Whether the figures differ by more than their spread."""
        if self.old is None or self.new is None:
            return "only new" if self.old is None else "only old"
        if self.old.value == self.new.value:
            return "same"
        spread = max(self.old.high - self.old.low, self.new.high - self.new.low)
        if spread == 0:
            return "no spread known"
        apart = self.old.high < self.new.low or self.new.high < self.old.low
        return "differs" if apart and abs(self.new.value - self.old.value) > spread else "within spread"


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Compared]:
    """The figures of two results as `Report.save` has written them, in the order of the new one.

    Raises
    ------
    ValueError
        If they are of different benchmarks.
    """
    if old["benchmark"] != new["benchmark"]:
        raise ValueError(f"these are results of '{old['benchmark']}' and of '{new['benchmark']}': compare two of one")
    before = {figure["name"]: Figure(**figure) for figure in old["figures"]}
    after = {figure["name"]: Figure(**figure) for figure in new["figures"]}
    names = [*after, *(name for name in before if name not in after)]
    units = {name: figure.unit for name, figure in {**before, **after}.items()}
    return [Compared(name, units[name], before.get(name), after.get(name)) for name in names]


def other_conditions(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """What else differs between two results: settings, versions and the machine."""
    for part in ("settings", "versions", "machine"):
        for key in {**old[part], **new[part]}:
            one, other = old[part].get(key), new[part].get(key)
            if one != other:
                yield f"{part}: {key} was {one}, is {other}"


@click.command()
@click.argument("old", type=click.Path(exists=True, path_type=Path))
@click.argument("new", type=click.Path(exists=True, path_type=Path))
def main(old: Path, new: Path) -> None:
    """Compare two results that a benchmark has saved with --json, or all results of two folders."""
    if old.is_dir() != new.is_dir():
        kinds = ["a folder" if path.is_dir() else "a file" for path in (old, new)]
        raise click.UsageError(f"OLD is {kinds[0]} and NEW is {kinds[1]}: compare two files or two folders")
    if old.is_dir():
        show_folders(old, new)
    else:
        show(old, new)


def show_folders(old: Path, new: Path) -> None:
    """Print a table of each result that both folders hold, what only one of them has, and the differences in all."""
    before, after = ({path.name for path in folder.glob("*.json")} for folder in (old, new))
    counts = [show(old / name, new / name, titled=True) for name in sorted(before & after)]
    for where, names in (("old", before - after), ("new", after - before)):
        if names:
            click.echo(f"only {where}: {', '.join(sorted(names))}")
    differing, of = (sum(each) for each in zip((0, 0), *counts, strict=True))
    click.echo(f"in all, {differing} of {of} figures of {len(counts)} results differ beyond their spread")


def show(old: Path, new: Path, *, titled: bool = False) -> tuple[int, int]:
    """Print two results of one benchmark side by side; how many figures differ beyond their spread, and of how many."""
    one, other = (json.loads(path.read_text(encoding="utf-8")) for path in (old, new))
    try:
        compared = compare(one, other)
    except ValueError as error:
        raise click.UsageError(f"{old} and {new}: {error}") from None
    if titled:
        click.echo(f"== {other['benchmark']} ({new.name})")
    for line in other_conditions(one, other):
        click.echo(line)
    width = max((len(item.name) for item in compared), default=0)
    click.echo(f"{'figure':<{width}} {'old':>10} {'new':>10} {'new/old':>8}")
    for item in compared:
        values = [f"{figure.value:.4g}" if figure else "-" for figure in (item.old, item.new)]
        ratio = "-" if item.ratio is None else f"{item.ratio:.3f}"
        click.echo(f"{item.name:<{width}} {values[0]:>10} {values[1]:>10} {ratio:>8} {item.unit:<5} {item.verdict}")
    count = sum(item.verdict == "differs" for item in compared)
    click.echo(f"{count} of {len(compared)} figures differ beyond their spread" + "\n" * titled)
    return count, len(compared)


if __name__ == "__main__":
    main()
