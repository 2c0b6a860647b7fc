"""The sign that an element without one takes when thresholds are taken over the whole model.

As in the original TIES: where the votes of the models add up to exactly zero, the elected sign is that of the sum of
all elected signs of the model; where those cancel, too, it is minus. (mergekit, and the scope `tensor` here, elect
plus.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, Round, Shared, State, Tile

Votes = Callable[[Job, State, Tile, Array], None]
"""Writes the votes of one tile, whose sign is the elected one, into the last argument, shape (n,)."""


@dataclass(frozen=True, slots=True)
class CountSigns:
    """``_signs``: int64, shape (1,): elements that elect plus, less those that elect minus."""

    votes: Votes
    name: str = "elected signs"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to count."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """One count."""
        return (1,), None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.counts is not None
        votes = np.empty(tile.values.shape[1], job.work)
        self.votes(job, state, tile, votes)
        accumulator.counts[0] += np.count_nonzero(votes > 0) - np.count_nonzero(votes < 0)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """As counted."""
        assert accumulator.counts is not None
        return {"_signs": accumulator.counts}


@dataclass(frozen=True, slots=True)
class Majority:
    """``majority``: +1.0 or -1.0, the sign that wins over all elements of the group.

    Parameters
    ----------
    votes : callable
    before : callable
        The sweeps over a tensor whose state the votes need.
    """

    votes: Votes
    before: Callable[[Job], tuple[Reduction, ...]]
    name: str = "majority of signs"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """What the votes need, then the count."""
        return (*self.before(job), CountSigns(self.votes))

    def counts(self, job: Job, state: State) -> Array | None:
        """The tensor's balance."""
        return state.get("_signs")

    def values(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """``majority``."""
        return Shared({"majority": np.array(1.0 if counts is not None and counts[0] > 0 else -1.0)})


def majority_rounds(jobs: Sequence[Job], majority: Majority) -> tuple[Round, ...]:
    """The round, where thresholds are taken over the whole model."""
    return (majority,) if jobs[0].scope == "model" else ()
