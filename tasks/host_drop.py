"""The random thinning that `dare_*` and `della*` do themselves, after whatever sparsifier the recipe names.

Alone, a host draws the same mask as the sparsifier of its kind would: ``dare_ties`` is ``ties`` with ``sparsify:
random``. After another sparsifier it draws from a stream of its own, so that two random masks are independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.method import Array, Bounds, Job, Reduction, State, StoredKernel, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.philox import Draw
from mergepipe.tasks.random_drop import Drawn, restored, scales
from mergepipe.tasks.shrinkage import Shrinkage, restore
from mergepipe.tasks.sparsify import SPARSIFIERS

STAGE = "host"

RESCALE = Parameter("rescale", "flag", "scale survivors as rescale_by says", default=True)
RESCALE_BY = Parameter(
    "rescale_by", "choice",
    "by the ratio of L1 norms, as mergekit does, or by 1/(probability to be kept), as in the papers",
    default="l1", choices=("l1", "inverse_keep"),
)  # fmt: skip


def drawn(job: Job) -> list[dict[str, Any]]:
    """What the sparsifier of the host's kind would be given."""
    rescale = job.params["rescale_by"] if job.params["rescale"] else "none"
    return [{**params, "rescale": rescale} for params in job.model_params]


def first(job: Job, state: State, tile: Tile) -> None:
    """What the recipe's own sparsifier does, in place."""
    SPARSIFIERS[job.sparsify].mask(job, state, tile)


@dataclass(frozen=True, slots=True)
class HostDrop:
    """The reductions and the kernel of a host that thins at random.

    Parameters
    ----------
    drop : callable
        As :func:`mergepipe.tasks.random_drop.drop`.
    check : callable
        Refuses, while planning, what can't be done.
    draw : callable
        As :func:`mergepipe.tasks.random_drop.draw`, where that is all that `drop` does but for a rescale; None else.
    """

    drop: Callable[[Job, Tile, Sequence[Drawn], str], None]
    check: Callable[[Job, Sequence[Drawn]], None] = lambda job, drawn: None
    draw: Callable[[Job, Sequence[Drawn]], Draw] | None = None

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """Those of the recipe's sparsifier, then the norms around the host's own thinning."""
        self.check(job, drawn(job))
        around = Shrinkage(STAGE, lambda job: restored(drawn(job)), self._thin, first, self._draw)
        return (*family.reductions(job), around)

    def _draw(self, job: Job) -> Draw | None:
        """What stays, where it is a matter of chance alone."""
        return None if self.draw is None or job.sparsify != "none" else self.draw(job, drawn(job))

    def _thin(self, job: Job, state: State, tile: Tile) -> None:
        self.drop(job, tile, drawn(job), "" if job.sparsify == "none" else "\0host")

    def thin(self, job: Job, state: State, tile: Tile) -> None:
        """Both thinnings, the second without the factors that restore a norm."""
        first(job, state, tile)
        self._thin(job, state, tile)

    def apply(self, job: Job, state: State, tile: Tile, out: Array) -> None:
        """The kernel."""
        self.thin(job, state, tile)
        restore(job, state, tile, STAGE)
        family.apply(replace(job, sparsify="none"), state, tile, out)

    def stored(self, job: Job, state: State) -> StoredKernel | None:
        """The kernel from bits to bits, where it is a matter of chance alone what stays."""
        chance = self._draw(job)
        if chance is None:
            return None
        zeros = (0.0,) * job.models
        return family.stored_within(job, state, Bounds(zeros, None, scales(job, state, drawn(job), STAGE), chance))
