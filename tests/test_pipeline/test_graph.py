"""The Dask graphs: what waits for what, and that they run."""

from __future__ import annotations

import threading
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.pipeline.draw import draw_graph
from mergepipe.pipeline.graph import bundles, count_tasks, dependencies, run_bundle, tensor_graph
from mergepipe.pipeline.workers import Workers


class Work:
    """Notes the order in which its nodes run."""

    def __init__(self, sweeps: int, units: int) -> None:
        self.sweeps = ("sweep",) * sweeps
        self.steps: tuple[str, ...] = ()
        self.sweep_units = self.units = tuple((n, n + 1) for n in range(units))
        self.ran: list[tuple[str, int, int]] = []
        self.lock = threading.Lock()

    def _note(self, *what: object) -> None:
        with self.lock:
            self.ran.append(what)  # type: ignore[arg-type]

    def reduce(self, sweep: int, unit: int, *after: object) -> None:
        self._note("reduce", sweep, unit)

    def combine(self, sweep: int, *after: object) -> None:
        self._note("combine", sweep, -1)

    def apply(self, unit: int, *after: object) -> None:
        self._note("apply", 99, unit)


def test_edges_are_reduce_combine_apply_done() -> None:
    #   reduce 0 ─┐             ┌─ apply 0 ─┐
    #   reduce 1 ─┴─ combine 0 ─┴─ apply 1 ─┴─ done      we want: nothing applied before the combine
    graph = tensor_graph("w", Work(1, 2), lambda *_: None)
    assert dependencies(graph) == {
        ("reduce", "w", 0, 0): [],
        ("reduce", "w", 0, 1): [],
        ("combine", "w", 0): [("reduce", "w", 0, 0), ("reduce", "w", 0, 1)],
        ("apply", "w", 0): [("combine", "w", 0)],
        ("apply", "w", 1): [("combine", "w", 0)],
        ("done", "w"): [("apply", "w", 0), ("apply", "w", 1)],
    }


def test_a_single_unit_is_one_node() -> None:
    work, ended = Work(2, 1), []
    graph = tensor_graph("w", work, lambda name, _units: ended.append(name))
    assert dependencies(graph) == {("make", "w", 0): [], ("done", "w"): [("make", "w", 0)]}
    sweeps = ["coarse histogram", "fine histogram", "ties", "norms after thinning"]
    root = ElementTree.fromstring(draw_graph("w", graph, sweeps))
    heading = ", ".join([*sweeps, "output"])
    assert {"w: 2 nodes", heading, "make", "done"} <= {element.text for element in root.iter()}
    assert int(root.attrib["width"]) > 6 * len(heading)
    with Workers(2) as workers:
        run_bundle([graph], workers, 0)
    assert work.ran == [("reduce", 0, 0), ("combine", 0, -1), ("reduce", 1, 0), ("combine", 1, -1), ("apply", 99, 0)]
    assert ended == ["w"]


@given(st.integers(0, 3), st.integers(0, 5))
def test_graph_has_as_many_nodes_as_planned(sweeps: int, units: int) -> None:
    assert len(tensor_graph("w", Work(sweeps, units), lambda *_: None)) == count_tasks(sweeps, units)


def test_every_node_runs_once_and_after_what_it_needs() -> None:
    work, ended = Work(2, 4), []
    with Workers(3) as workers:
        run_bundle([tensor_graph("w", work, lambda name, _units: ended.append(name))], workers, 0)
    assert ended == ["w"]
    assert len(work.ran) == len(set(work.ran)) == 2 * (4 + 1) + 4
    order = {what: position for position, what in enumerate(work.ran)}
    for unit in range(4):
        assert order["reduce", 0, unit] < order["combine", 0, -1] < order["reduce", 1, unit]
        assert order["reduce", 1, unit] < order["combine", 1, -1] < order["apply", 99, unit]


def test_an_error_in_a_node_comes_out_as_itself() -> None:
    class Broken(Work):
        def apply(self, unit: int, *after: object) -> None:
            raise ValueError("unit is broken")

    with Workers(2) as workers, pytest.raises(ValueError, match="unit is broken"):
        run_bundle([tensor_graph("w", Broken(0, 1), lambda *_: None)], workers, 0)


@given(st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 100 * 2**20)), max_size=40))
def test_bundles_cover_everything_in_order(sizes: list[tuple[int, int]]) -> None:
    found = list(bundles([tasks for tasks, _ in sizes], [nbytes for _, nbytes in sizes]))
    assert [number for bundle in found for number in bundle] == list(range(len(sizes)))
    for bundle in found:
        if len(bundle) > 1:
            assert sum(sizes[number][0] for number in bundle) <= 5000
            assert sum(sizes[number][1] for number in bundle) <= 64 * 2**20


def test_drawing_is_valid_svg_and_says_what_it_left_out() -> None:
    graph = tensor_graph("model.<w>", Work(2, 40), lambda *_: None)
    picture = draw_graph("model.<w>", graph, ["coarse histogram", "fine histogram"])
    root = ElementTree.fromstring(picture)
    texts = [element.text for element in root.iter() if element.text]
    assert f"model.<w>: {len(graph)} nodes" in texts
    assert "and 34 more" in texts
    assert "coarse histogram" in texts
