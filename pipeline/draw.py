"""A picture of one bundle's Dask graph, as SVG.

The graph of a tensor is made of stages, so its layout needs no search: a column per stage, a row per unit, the
gathering nodes in the middle. Long fans are drawn with their first and last nodes and a line that counts the rest.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from html import escape
from typing import Any

from mergepipe.pipeline.graph import Graph, dependencies

FAN_SHOWN = 6
"""Nodes of one fan that are drawn."""

COLUMN, ROW, WIDTH, HEIGHT = 190, 44, 150, 28
LETTER = 7
"""Of a heading, on average and rounded up."""
COLORS = {
    "reduce": "#cfe3f5",
    "combine": "#f6e3b4",
    "factor": "#f3d0d0",
    "project": "#f3d0d0",
    "solve": "#f6e3b4",
    "calibrate": "#f6e3b4",
    "apply": "#d3ecd0",
    "make": "#d3ecd0",
    "done": "#e4dcef",
}
STEPS = ("factor", "project", "solve", "calibrate")
"""Steps of methods that look at a whole matrix: a column each."""


def draw_graph(name: str, graph: Graph, sweeps: Sequence[str]) -> str:
    """SVG of the graph of tensor `name`.

    Parameters
    ----------
    name : str
    graph : Graph
        As made by :func:`mergepipe.pipeline.graph.tensor_graph`.
    sweeps : sequence of str
        Names of its reductions, written above their columns.
    """
    edges = dependencies(graph)
    places, dropped = _place(list(graph))
    rows = max(row for _, row in places.values()) + 1
    columns = max(column for column, _ in places.values()) + 1
    kinds = [key[0] for key in graph if isinstance(key, tuple)]
    headings, last = [*sweeps, "output"], 2 * len(sweeps) + sum(kind in STEPS for kind in kinds)
    if "make" in kinds:  # all in one node
        headings, last = [", ".join(headings)], 0
    width, height = int(columns * COLUMN + 40), int((rows + 2) * ROW + 30)
    width = max(width, LETTER * len(headings[0]) + 40)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">',
        "<style>text { font: 12px sans-serif } rect.node { stroke: #666 }</style>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="20" y="24" font-size="14">{escape(name)}: {len(graph)} nodes</text>',
    ]
    parts += _headings(headings, last)
    parts += [_edge(places[before], places[key]) for key in places for before in edges[key] if before in places]
    parts += [_node(key, place) for key, place in places.items()]
    parts += [
        f'<text x="{20 + column * COLUMN}" y="{_y(rows) + 4}" fill="#555">and {count} more</text>'
        for column, count in dropped.items()
    ]
    return "\n".join([*parts, "</svg>", ""])


def _place(keys: Sequence[Hashable]) -> tuple[dict[Hashable, tuple[float, float]], dict[int, int]]:
    columns: dict[int, list[Any]] = {}
    for key in keys:
        assert isinstance(key, tuple), "every key of a tensor's graph is a tuple"
        columns.setdefault(_column(key, keys), []).append(key)
    places: dict[Hashable, tuple[float, float]] = {}
    dropped = {}
    tallest = max(min(len(fan), FAN_SHOWN) for fan in columns.values())
    for column, fan in sorted(columns.items()):
        shown = fan if len(fan) <= FAN_SHOWN else [*fan[: FAN_SHOWN - 1], fan[-1]]
        if len(shown) < len(fan):
            dropped[column] = len(fan) - len(shown)
        first = (tallest - len(shown)) / 2
        places |= {key: (column, first + row) for row, key in enumerate(shown)}
    return places, dropped


def _column(key: tuple[Any, ...], keys: Sequence[Hashable]) -> int:
    sweeps = sum(isinstance(other, tuple) and other[0] == "combine" for other in keys)
    stage = int(key[2]) if key[0] in ("reduce", "combine") else sweeps
    steps = sum(isinstance(other, tuple) and other[0] in STEPS for other in keys)
    if key[0] in STEPS:
        column: int = 2 * sweeps + int(key[2])
        return column
    later = steps if key[0] in ("apply", "done") else 0
    return 2 * stage + later + (1 if key[0] in ("combine", "done") else 0)


def _headings(names: Sequence[str], last: int) -> list[str]:
    """One above every second column, and one above column number `last`."""
    named = [*((2 * number, name) for number, name in enumerate(names[:-1])), (last, names[-1])]
    return [f'<text x="{20 + column * COLUMN}" y="48" fill="#555">{escape(name)}</text>' for column, name in named]


def _y(row: float) -> float:
    return 64 + row * ROW


def _edge(start: tuple[float, float], end: tuple[float, float]) -> str:
    x1, y1 = 20 + start[0] * COLUMN + WIDTH, _y(start[1]) + HEIGHT / 2
    x2, y2 = 20 + end[0] * COLUMN, _y(end[1]) + HEIGHT / 2
    return f'<line x1="{x1:.0f}" y1="{y1:.0f}" x2="{x2:.0f}" y2="{y2:.0f}" stroke="#999"/>'


def _node(key: Hashable, place: tuple[float, float]) -> str:
    assert isinstance(key, tuple)
    x, y = 20 + place[0] * COLUMN, _y(place[1])
    labels = {"reduce": "unit {}", "apply": "apply, unit {}", "combine": "combine", "make": "make", "done": "done"}
    label = labels.get(str(key[0]), f"{key[0]} {{}}")
    return (
        f'<rect class="node" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}" fill="{COLORS[key[0]]}"/>'
        f'<text x="{x + 8:.0f}" y="{y + 18:.0f}">{escape(label.format(key[-1]))}</text>'
    )
