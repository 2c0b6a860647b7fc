"""The table that the demo ends with: one line per body, one column per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes
    ----------
    name : str
    accuracies : tuple of float or None
        One per task, from 0 to 1; None where the body has no head for the task.
    kind : {'base', 'expert', 'merge', 'masks'}
        `masks`: a unified vector with a mask for each task, which is no single model.
    scale : float or None
        Lambda, where there is one.
    chosen : bool
        True if `scale` was chosen on validation data.
    density : float or None
        Overall realised density of the task vectors, where the method thins them.
    """

    name: str
    accuracies: tuple[float | None, ...]
    kind: Literal["base", "expert", "merge", "masks"]
    scale: float | None = None
    chosen: bool = False
    density: float | None = None

    @property
    def mean(self) -> float | None:
        """Mean accuracy; None where one is lacking."""
        known = [a for a in self.accuracies if a is not None]
        return sum(known) / len(known) if len(known) == len(self.accuracies) else None


@dataclass(frozen=True, slots=True)
class Report:
    """What came out for one family.

    Attributes
    ----------
    title : str
    tasks : tuple of (str, int, int)
        Name, number of classes and number of test examples.
    rows : tuple of Row
        Base, experts, merges, in this order.
    copy_is_same : bool
        Whether a run from copied stores gave the same bytes as the run from the checkpoints themselves.
    """

    title: str
    tasks: tuple[tuple[str, int, int], ...]
    rows: tuple[Row, ...]
    copy_is_same: bool


def make_table(report: Report) -> Table:
    """Accuracies in percent; the best merge of all tasks in bold."""
    best = best_merge(report.rows)
    table = Table(title=f"Accuracy in percent: {report.title}", title_justify="left", box=None, header_style="dim")
    table.add_column("", no_wrap=True)
    table.add_column("lambda", justify="right")
    for name, _, _ in report.tasks:
        table.add_column(name, justify="right")
    table.add_column("mean", justify="right")
    table.add_column("kept", justify="right")
    table.add_row("by chance", "", *[percent(1 / classes) for _, classes, _ in report.tasks], style="dim")
    kind = report.rows[0].kind
    for row in report.rows:
        if row.kind != kind:
            table.add_row()
        kind = row.kind
        scale = "" if row.scale is None else f"{row.scale:g}{'*' if row.chosen else ' '}"
        cells = [percent(value) for value in (*row.accuracies, row.mean)]
        kept = "" if row.density is None else f"{100 * row.density:.1f} %"
        table.add_row(indented(row.name), scale, *cells, kept, style="bold" if row is best else "")
    return table


def indented(name: str) -> str:
    """A sparsified method's name as it stands below that of the method.

    Examples
    --------
    >>> indented("ties"), indented("ties + tadrop")
    ('ties', '  + tadrop')
    """
    _, plus, sparsifier = name.partition(" + ")
    return f"  + {sparsifier}" if plus else name


def percent(value: float | None) -> str:
    """A share in percent with one digit, or "n/a".

    Examples
    --------
    >>> percent(0.5), percent(None)
    ('50.0', 'n/a')
    """
    return "n/a" if value is None else f"{100 * value:.1f}"


def best_merge(rows: Sequence[Row]) -> Row:
    """The single merged model with the highest mean; the first of several."""
    return max((row for row in rows if row.kind == "merge"), key=lambda row: row.mean or 0.0)


def standard_error(report: Report) -> float:
    """Of a mean accuracy near a half, from the sizes of the test sets alone."""
    return math.sqrt(sum(0.25 / size for _, _, size in report.tasks)) / len(report.tasks)


def remarks(report: Report) -> list[str]:
    """What the table says, in words."""
    best = best_merge(report.rows)
    base = report.rows[0].mean or 0.0
    assert best.mean is not None, "a merge of all experts has an accuracy for each task"
    scale = "" if best.scale is None else f" at lambda {best.scale:g}"
    gain, error = 100 * (best.mean - base), 100 * standard_error(report)
    lines = [
        f"Highest mean of a single merged model: {best.name}{scale}, {percent(best.mean)}; the base {-gain:+.1f}.",
        f"One standard error of a mean is about {error:.1f} points: read nothing into smaller differences.",
    ]
    hosts = [row.name.removesuffix(" + tadrop") for row in report.rows if row.name.endswith(" + tadrop")]
    gains = ", ".join(f"{host} {100 * _gain(report.rows, host):+.1f}" for host in dict.fromkeys(hosts))
    lines.append(
        "TADrop against uniform trimming to the same overall density, lambda chosen for each, points of mean "
        f"accuracy: {gains}."
    )
    outcome = "the same bytes as" if report.copy_is_same else "OTHER BYTES than"
    lines.append(f"ties + tadrop from copied zarr stores (--store copy): {outcome} from the checkpoints themselves.")
    return lines


def _gain(rows: Sequence[Row], host: str) -> float:
    """What `host` has of TADrop rather than of its control."""
    return _chosen(rows, f"{host} + tadrop") - _chosen(rows, f"{host} + uniform")


def _chosen(rows: Sequence[Row], name: str) -> float:
    """Mean accuracy at the lambda chosen on validation data, which is the last row of that name."""
    return [row.mean or 0.0 for row in rows if row.name == name][-1]
