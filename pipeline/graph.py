"""The Dask graphs: one small raw graph per bundle of tensors.

For each tensor, every sweep is a fan of ("reduce", tensor, sweep, unit) nodes gathered by one ("combine", tensor,
sweep), and the kernel is a fan of ("apply", tensor, unit) nodes after the last combine; ("done", tensor) gathers those.
A method that looks at a whole matrix has its own steps in between, one after another: ("factor", tensor, 0), …,
("solve", tensor, n).

    reduce 0 ─┐               ┌─ reduce 0 ─┐              ┌─ apply 0 ─┐
    reduce 1 ─┼─ combine 0 ───┼─ reduce 1 ─┼─ combine 1 ──┼─ apply 1 ─┼─ done
    reduce 2 ─┘               └─ reduce 2 ─┘              └─ apply 2 ─┘

Of a tensor of one unit nothing can be done side by side, and a node for each stage would cost more than it does:
("make", tensor, 0) does all of it.

Nodes fetch their own data, edges carry no array: what Dask decides is the order, and it is free to choose any that the
edges allow. Among nodes of one fan the order of the file, or its reverse, is better than any that Dask can know, so the
first node to start takes the first unit in that order, whatever its own number. Raw graphs cost about 60 µs a node and
no memory to speak of; one graph of a whole 70B model would cost hundreds of MB, `dask.delayed` grows faster than
linearly, a collection would hold whole tensors alive.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mergepipe.pipeline.workers import Workers, always
from mergepipe.tasks.method import Reduction

if TYPE_CHECKING:  # to plan, nodes are counted: Dask, which takes a tenth of a second to import, makes them in a run
    from dask.task_spec import Task

MAX_TASKS = 5_000
"""Nodes of one bundle at most, unless a single tensor has more."""

MAX_BUNDLE_BYTES = 32 * 1024 * 1024
"""Small tensors share a bundle up to this many input bytes."""


class Work(Protocol):
    """What a graph needs of a tensor: see :class:`mergepipe.tasks.nodes.TensorWork`."""

    @property
    def sweeps(self) -> Sequence[Reduction]:
        """Its reductions, in order."""

    @property
    def sweep_units(self) -> Sequence[tuple[int, int]]:
        """Units of its reductions."""

    @property
    def steps(self) -> Sequence[str]:
        """Names of what is done, in this order, between the last reduction and the output."""

    @property
    def units(self) -> Sequence[tuple[int, int]]:
        """Units of its output."""

    def apply(self, unit: int, *after: object) -> None:
        """Compute one unit."""


Graph: TypeAlias = "dict[Hashable, Task]"


def tensor_graph(name: str, work: Work, done: Callable[..., None]) -> Graph:
    """The graph of one tensor; its result is the key ("done", name).

    Examples
    --------
    >>> class Plain:
    ...     sweeps, sweep_units, steps, units = (), (), (), [(0, 1), (1, 2)]
    ...     def apply(self, unit, *after): pass
    >>> for key, task in tensor_graph("w", Plain(), print).items():
    ...     print(key, sorted(task.dependencies))
    ('apply', 'w', 0) []
    ('apply', 'w', 1) []
    ('done', 'w') [('apply', 'w', 0), ('apply', 'w', 1)]
    """
    from dask.task_spec import List, Task, TaskRef

    graph: Graph = {}
    end = ("done", name)
    if work.sweeps and not work.steps and len(work.sweep_units) == 1 and len(work.units) <= 1:
        whole = ("make", name, 0)
        return {
            whole: Task(whole, _make, work),
            end: Task(end, done, name, List(TaskRef(whole))),
        }
    before: tuple[Any, ...] = ()
    for sweep in range(len(work.sweeps)):
        fan = []
        units = itertools.count()
        for unit in range(len(work.sweep_units)):
            key = ("reduce", name, sweep, unit)
            graph[key] = Task(key, _next_of, units, partial(work.reduce, sweep), *before)  # type: ignore[attr-defined]
            fan.append(TaskRef(key))
        gather = ("combine", name, sweep)
        graph[gather] = Task(gather, work.combine, sweep, List(*fan))  # type: ignore[attr-defined]
        before = (TaskRef(gather),)
    for number, step in enumerate(work.steps):
        stage = (step, name, number)
        graph[stage] = Task(stage, work.take_step, number, *before)  # type: ignore[attr-defined]
        before = (TaskRef(stage),)
    fan = []
    units = itertools.count()
    for unit in range(len(work.units)):
        leaf = ("apply", name, unit)
        graph[leaf] = Task(leaf, _next_of, units, work.apply, *before)
        fan.append(TaskRef(leaf))
    graph[end] = Task(end, done, name, List(*(fan or before)))  # a sweep of a round has no output
    return graph


def _make(work: Work) -> None:
    for sweep in range(len(work.sweeps)):
        work.reduce(sweep, 0)  # type: ignore[attr-defined]
        work.combine(sweep)  # type: ignore[attr-defined]
    for unit in range(len(work.units)):
        work.apply(unit)


def _next_of(units: Iterator[int], body: Callable[[int], None], *_after: object) -> None:
    body(next(units))


def count_tasks(sweeps: int, units: int, steps: int = 0) -> int:
    """Nodes in the graph of one tensor.

    Examples
    --------
    >>> count_tasks(2, 3), count_tasks(2, 1)
    (12, 2)
    """
    if sweeps and units == 1 and not steps:
        return 2
    return sweeps * (units + 1) + steps + units + 1


def bundles(tasks: Sequence[int], nbytes: Sequence[int]) -> Iterator[range]:
    """Cut a sequence of tensors into bundles: neighbours share one while both limits hold.

    Parameters
    ----------
    tasks, nbytes : sequence of int
        Nodes and input bytes of each tensor.

    Examples
    --------
    >>> list(bundles([3, 3, 3, 9000], [1, 1, 70_000_000, 1]))
    [range(0, 2), range(2, 3), range(3, 4)]
    """
    first = 0
    total_tasks = total_bytes = 0
    for number, (count, size) in enumerate(zip(tasks, nbytes, strict=True)):
        if number > first and (total_tasks + count > MAX_TASKS or total_bytes + size > MAX_BUNDLE_BYTES):
            yield range(first, number)
            first, total_tasks, total_bytes = number, 0, 0
        total_tasks += count
        total_bytes += size
    if first < len(tasks):
        yield range(first, len(tasks))


def run_bundle(graphs: Iterable[Graph], workers: Workers, rank: int, at_hand: Callable[[], bool] = always) -> None:
    """Compute all nodes of a bundle, those of a lower rank first; returns when they are done or one has raised.

    Parameters
    ----------
    graphs : iterable of Graph
        Made once the bundle counts as being at work.
    workers : Workers
    rank, at_hand
        As of :meth:`mergepipe.pipeline.workers.Workers.ranked`.
    """
    with workers.ranked(rank, at_hand) as pool:
        import dask.threaded

        merged: Graph = {}
        for graph in graphs:
            merged.update(graph)
        ends = [key for key in merged if isinstance(key, tuple) and key[0] == "done"]
        dask.threaded.get(merged, ends, pool=pool)


def dependencies(graph: Mapping[Hashable, Task]) -> dict[Hashable, list[Hashable]]:
    """Which nodes each node waits for."""
    return {key: sorted(task.dependencies, key=str) for key, task in graph.items()}
