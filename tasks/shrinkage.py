"""What a thinning takes from the L1 norm of each task vector, and the factors that give it back.

For every thinning that can be done in place, tile by tile, whatever decides which elements go: one sweep measures
both norms. The survivors' factor is the ratio of the two, which is mergekit's `rescale`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergepipe.tasks import fused_sums, kernels
from mergepipe.tasks.blocks import Blocks, block_edges
from mergepipe.tasks.method import Accumulator, Array, InPlace, Job, State, StoredSweep, Tile
from mergepipe.tasks.philox import MOST, Draw


def as_it_is(job: Job, state: State, tile: Tile) -> None:
    """The :data:`InPlace` that changes nothing."""


def no_draw(job: Job) -> Draw | None:
    """The draw of a thinning that chance alone does not decide."""
    return None


@dataclass(frozen=True, slots=True)
class Shrinkage:
    """Measures the L1 norms before and after a thinning.

    Leaves ``_<stage>_factors`` (float64, (models,)) in the state: 1 for a model whose norm is not restored, or of which
    nothing is left. And where it is known ``kept_norms`` (float64, (models,)): the norm of what is left, over that of
    the whole; the sums of squares come with those of magnitudes.

    Parameters
    ----------
    stage : str
        Name of the thinning.
    restored : callable
        Which models' norms are restored, for a job.
    thin : callable
        The thinning, without a rescale.
    before : callable
        What runs ahead of it and is not part of the ratio.
    draw : callable
        Says for a job what stays, where chance alone decides and nothing runs ahead; None else.
    """

    stage: str
    restored: Callable[[Job], Sequence[bool]]
    thin: InPlace
    before: InPlace = as_it_is
    draw: Callable[[Job], Draw | None] = no_draw

    @property
    def name(self) -> str:
        """The thinning it belongs to."""
        return f"norms around {self.stage}"

    def needed(self, job: Job, state: State) -> bool:
        """Whether some model's norm is restored, and not known yet."""
        return job.size > 0 and f"_{self.stage}_factors" not in state and any(self.restored(job))

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Per block and model, the sum of magnitudes and of squares, before and after."""
        return None, (2, job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Thin one tile and measure it."""
        assert accumulator.blocks is not None
        sums = accumulator.blocks[tile.index]
        self.before(job, state, tile)
        for k in range(job.models):
            kernels.norms(tile.values[k], sums[0, k])
        self.thin(_unscaled(job), state, tile)
        for k in range(job.models):
            kernels.norms(tile.values[k], sums[1, k])

    def stored(self, job: Job, state: State) -> StoredSweep | None:
        """Measure stored bits, where a draw says what stays."""
        draw = self.draw(job) if job.models <= MOST else None
        if draw is None:
            return None

        def run(rows: Sequence[Array], accumulator: Accumulator, blocks: Blocks) -> bool:
            assert accumulator.blocks is not None
            for (first, after), part, marks in draw.marked(job.shape, blocks):
                edges = block_edges(job.shape, (first, after))
                base, *models = [row[part] for row in rows]
                if not fused_sums.norms_around(
                    base, tuple(models), marks, edges - edges[0], accumulator.blocks[first:after]
                ):
                    return False
            return True

        return run

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The factors and ``kept_norms``."""
        assert accumulator.blocks is not None
        sums = kernels.fold(accumulator.blocks)
        before, after = sums[:, :, 0]
        wanted = np.array(self.restored(job)) & (after > 0)
        new: State = {f"_{self.stage}_factors": np.where(wanted, before / np.where(after > 0, after, 1), 1.0)}
        if job.sparsify == "none" or self.before is as_it_is:
            new["kept_norms"] = kept_norms(*sums[:, :, 1])
        elif "kept_norms" in state:  # of two thinnings, and of the first one alone so far
            new["kept_norms"] = state["kept_norms"] * kept_norms(*sums[:, :, 1])
        return new


def _unscaled(job: Job) -> Job:
    """The job without a rescale: another model's may be one that the thinning does itself."""
    bare = tuple({**params, "rescale": "none"} for params in job.sparsify_params)
    return replace(job, params={**job.params, "rescale": False}, sparsify_params=bare)


def kept_norms(before: Array, after: Array) -> Array:
    """Norms of what is left over those of the whole, from their squares, shape (models,); 0 where there is nothing.

    Examples
    --------
    >>> kept_norms(np.array([4.0, 0.0]), np.array([1.0, 0.0])).tolist()
    [0.5, 0.0]
    """
    found: Array = np.sqrt(np.minimum(after / np.where(before > 0, before, 1.0), 1.0))
    return found


def factors(job: Job, state: State, stage: str) -> kernels.Scalars:
    """What a :class:`Shrinkage` has found that survivors are to be multiplied by; 1 if it did not run."""
    return tuple(state[f"_{stage}_factors"].tolist()) if f"_{stage}_factors" in state else (1.0,) * job.models


def restore(job: Job, state: State, tile: Tile, stage: str) -> None:
    """Multiply `tile.values`, thinned already, by the factors of a :class:`Shrinkage`. In place."""
    for row, factor in zip(tile.values, factors(job, state, stage), strict=True):
        if factor != 1:
            kernels.thin(row, 0.0, factor)
