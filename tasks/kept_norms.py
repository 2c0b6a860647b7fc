"""The norm of what a thinning keeps of each task vector, over that of the whole, by a sweep of its own.

Where a norm is restored the sums come by the way (:mod:`mergepipe.tasks.shrinkage`, :mod:`mergepipe.tasks.thinning`),
and coordinate fusion counts them in any case. Everywhere else they are more than the other work has room for: in the
kernel of `ties` they would double the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

from mergepipe.tasks import kernels
from mergepipe.tasks.method import Accumulator, InPlace, Job, MergeMethod, State, Tile
from mergepipe.tasks.shrinkage import kept_norms
from mergepipe.tasks.sparsify import SPARSIFIERS

FOUND = "kept_norms"
"""The entry of a state, and of a manifest."""


def thinning(job: Job, method: MergeMethod) -> InPlace | None:
    """All that is dropped before anything is merged; None for a tensor of which nothing is."""
    if job.size == 0 or job.models == 0:
        return None
    if method.thin is not None:
        return method.thin
    return None if job.sparsify == "none" else SPARSIFIERS[job.sparsify].mask


def is_known(state: State) -> bool:
    """Whether the norms have come by the way."""
    return FOUND in state


@dataclass(frozen=True, slots=True)
class KeptNorms:
    """Leaves ``kept_norms`` (float64, (models,)): of the elements as they were before a rescale.

    Parameters
    ----------
    thin : callable
        May rescale: what counts is which elements are zero after it.
    """

    thin: InPlace
    name: str = "norms of what is kept"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to measure."""
        return job.size > 0 and not is_known(state)

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums of squares per block and model."""
        return None, (job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Thin one tile and measure what was there."""
        assert accumulator.blocks is not None
        before = tile.values.copy()
        self.thin(job, state, tile)
        for k in range(job.models):
            kernels.kept_squares(before[k], tile.values[k], accumulator.blocks[tile.index, k])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``kept_norms``."""
        assert accumulator.blocks is not None
        return {FOUND: kept_norms(*kernels.fold(accumulator.blocks).T)}
