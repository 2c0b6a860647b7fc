"""Rounds: what has to be known of the whole model before its first tensor is made.

Some methods take a threshold, a norm or a calibration over all tensors that they merge. Each such *round* is a sweep
over the tensors of a group (see :class:`mergepipe.tasks.method.Round`), in graphs like those that make the output but
without the kernel; what a tensor contributes is a few numbers or one array that is added up, and its state is dropped
at once. When all are in, the round is finished: the shared state goes to the journal, so that a finished round is never
made again, and into the initial state of every tensor of the group.

    tensor 0 ── reduce ─ combine ─┐
    tensor 1 ── reduce ─ combine ─┼─ finish ─► shared state ─► next round, or the tensors themselves
    tensor 2 ── reduce ─ combine ─┘

Counts are integers and values are put in plan order before they are folded, so the order in which tensors are worked on
changes no bit. A round that was interrupted is made again as a whole; the output has not been begun then.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergepipe.pipeline.kinds import plain_key
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.tasks.method import Array, Job, Reduction, Round, Shared, State
from mergepipe.tasks.registry import METHODS, SPARSIFIERS

RoundId = tuple[int, int]
"""Number of the group, and of the round in it."""


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that share their rounds.

    Attributes
    ----------
    numbers : tuple of int
        Their numbers in the plan, ascending.
    jobs : tuple of Job
    rounds : tuple of Round
        In order; at least one.
    """

    numbers: tuple[int, ...]
    jobs: tuple[Job, ...]
    rounds: tuple[Round, ...]


def groups(plan: Plan) -> tuple[Group, ...]:
    """The groups of a plan that have rounds, in the order of their first tensors."""
    members: dict[Hashable, list[int]] = {}
    for number, tensor in enumerate(plan.tensors):
        if tensor.action == "merge":
            members.setdefault(_key(tensor), []).append(number)
    found = []
    for numbers in members.values():
        jobs = tuple(plan.tensors[number].job(plan.seed) for number in numbers)
        rounds = (
            *SPARSIFIERS[jobs[0].sparsify].rounds(jobs),
            *METHODS[plan.tensors[numbers[0]].method].rounds(jobs),
        )
        if rounds:
            found.append(Group(tuple(numbers), jobs, rounds))
    return tuple(found)


def _key(tensor: PlannedTensor) -> Hashable:
    """The same for tensors of one group."""
    params = tensor.params or {}
    read = [params.get(name) for name in METHODS[tensor.method].rounds_read]
    models = tuple([source.model for source in tensor.models])
    return tensor.method, models, tensor.sparsify, plain_key(tensor.sparsify_params), tensor.scope, plain_key(read)


def sweeps_ahead(plan: Plan) -> dict[str, tuple[Reduction, ...]]:
    """The sweeps that rounds make over each tensor, by its name; none for a tensor of no group."""
    return {
        job.name: tuple(sweep for one in group.rounds for sweep in one.reductions(job))
        for group in groups(plan)
        for job in group.jobs
    }


class SharedStates:
    """What the rounds of a run have found out so far.

    Parameters
    ----------
    groups : sequence of Group
    finished : mapping of (int, int) to Shared
        Rounds that an earlier run has finished.
    """

    def __init__(self, groups: Sequence[Group], finished: Mapping[RoundId, Shared]) -> None:
        self.groups = tuple(groups)
        self._finished = dict(finished)
        self._shared = [Shared() for _ in self.groups]
        for group, number in sorted(self._finished):
            self._shared[group] |= self._finished[group, number]
        self._places = {
            tensor: (number, position)
            for number, group in enumerate(self.groups)
            for position, tensor in enumerate(group.numbers)
        }
        self._lock = threading.Lock()
        self._counts: Array | None = None
        self._values: dict[int, Array | None] = {}

    def left(self) -> Iterator[RoundId]:
        """The rounds that are still to be made, in order."""
        for number, group in enumerate(self.groups):
            for at in range(len(group.rounds)):
                if (number, at) not in self._finished:
                    yield number, at

    def left_of(self, tensor: int) -> list[Round]:
        """Rounds that are still to be made over a tensor."""
        place = self._places.get(tensor)
        if place is None:
            return []
        rounds = self.groups[place[0]].rounds
        return [one for at, one in enumerate(rounds) if (place[0], at) not in self._finished]

    def state_of(self, tensor: int) -> State:
        """What a tensor's own sweeps and kernel start from."""
        place = self._places.get(tensor)
        return {} if place is None else self._shared[place[0]].of(place[1])

    def collect(self, which: RoundId, tensor: int, state: State) -> None:
        """Take in what one tensor contributes to a round. In several threads at once."""
        group = self.groups[which[0]]
        position = self._places[tensor][1]
        job, one = group.jobs[position], group.rounds[which[1]]
        counts, values = one.counts(job, state), one.values(job, state)
        with self._lock:
            self._values[position] = values
            if counts is not None:
                self._counts = counts.copy() if self._counts is None else self._counts + counts

    def finish(self, which: RoundId) -> Shared:
        """The result of a round to which all tensors of its group have contributed."""
        group = self.groups[which[0]]
        values = [self._values[position] for position in range(len(group.jobs))]
        found = group.rounds[which[1]].finish(group.jobs, self._shared[which[0]], self._counts, values)
        self._counts, self._values = None, {}
        self._finished[which] = found
        self._shared[which[0]] |= found
        return found
