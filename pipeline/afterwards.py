"""A sweep over tensors of a merge that is done, for what `run --diagnostics` asks beyond it.

What is found of each tensor goes to the journal of the merge, so that a run that goes on makes the rest.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.graph import Graph, bundles, count_tasks, run_bundle, tensor_graph
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.memory import TENSORS_IN_FLIGHT
from mergepipe.pipeline.resume import Progress
from mergepipe.pipeline.workers import Workers
from mergepipe.storage.journal import Journal
from mergepipe.tasks.nodes import TensorWork


@dataclass(frozen=True)
class Afterwards:
    """The journal of a merge, open, and who writes to it.

    Attributes
    ----------
    journal : Journal
    known : Progress
        What is in it.
    inputs : Inputs
        What is read; nothing that was found of inputs that have changed is kept.
    drivers : Drivers
    """

    journal: Journal
    known: Progress
    inputs: Inputs
    drivers: Drivers
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def keep(self, record: dict[str, Any]) -> None:
        """Put what was found of a tensor into the journal.

        Raises
        ------
        InputChangedError
            If an input is not what it was.
        """
        with self._lock:
            self.inputs.check()
            self.journal.append([record])
            self.known.add(record)

    def sweep(
        self, numbers: Sequence[int], nbytes: Sequence[int], work_of: Callable[[int], TensorWork], workers: int
    ) -> None:
        """Make the sweeps of some tensors.

        Parameters
        ----------
        numbers : sequence of int
            Of the tensors.
        nbytes : sequence of int
            How much is read of each.
        work_of : callable
            Their sweeps, made when their turn comes.
        workers : int

        Raises
        ------
        Interrupted
            If it was stopped; or whatever a sweep raises.
        """
        # Nodes are cheap beside sweeps: the bytes alone say how many tensors go together.
        cut = bundles([count_tasks(1, 1)] * len(numbers), nbytes)
        waiting = ([numbers[position] for position in bundle] for bundle in cut)
        with Workers(workers) as threads:
            self.drivers.drive(waiting, partial(_run, threads, work_of), TENSORS_IN_FLIGHT)


def _run(workers: Workers, work_of: Callable[[int], TensorWork], bundle: Sequence[int]) -> None:
    run_bundle([_graph(work_of(number)) for number in bundle], workers, bundle[0])


def _graph(work: TensorWork) -> Graph:
    work.begin()
    return tensor_graph(work.job.name, work, lambda _name, _sweeps: work.end())
