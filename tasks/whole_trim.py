"""Magnitude trimming over the flattened model: one threshold per task, for all tensors of a group together.

What the original TIES does. The exact threshold is found by two rounds of counting
(:mod:`mergepipe.tasks.whole_select`); a third says how much of each tensor it keeps, which of the elements equal to it
stay (`tie_rule: index`: in plan order, then by flat index), and the norms that a `rescale` restores, tensor by tensor.
After that a tensor is trimmed as by any other threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, Round, Shared, State, Tile
from mergepipe.tasks.thinning import DROP_ALL, KEEP_ALL, Rescale, Ties, restored_norms
from mergepipe.tasks.whole_select import magnitude_scores, selection

STAGE = "trim"


def reductions(job: Job) -> tuple[Reduction, ...]:
    """What is left to do for each tensor once the threshold is known."""
    exact = any(params["tie_rule"] == "index" for params in job.sparsify_params)
    return (*((Ties(),) if exact else ()), *((Rescale(),) if any(restored_norms(job)) else ()))


def rounds(jobs: Sequence[Job], kept_count: Callable[[float, int], int]) -> tuple[Round, ...]:
    """The rounds of a group whose sparsifier takes `density`, `tie_rule` and `rescale`; none with nothing to drop.

    Parameters
    ----------
    jobs : sequence of Job
    kept_count : callable
        How many of n elements a density keeps.
    """
    n = sum(job.size for job in jobs)
    kept = np.array([kept_count(params["density"], n) for params in jobs[0].sparsify_params])
    wanted = np.select([kept == n, kept == 0], [KEEP_ALL, DROP_ALL], n - kept)
    levels = selection(jobs, STAGE, np.where(wanted < 0, -1, wanted)[:, None], magnitude_scores)
    return (*levels, Kept(wanted)) if levels else ()


def _thresholds(state: State, wanted: Array) -> Array:
    found = state[f"_{STAGE}_values"][:, 0]
    return np.select([wanted == KEEP_ALL, wanted == DROP_ALL], [0.0, math.inf], found)


def _next_in(work: np.dtype[Any], thresholds: Array) -> Array:
    """The smallest values of the working type that are not below the thresholds, as float64."""
    rounded = thresholds.astype(work)
    return np.where(rounded < thresholds, np.nextafter(rounded, work.type(np.inf)), rounded).astype(np.float64)


@dataclass(frozen=True, slots=True)
class CountKept:
    """``_kept``: float64, (models, 4): elements above the threshold, equal to it, L1 norm, squared L2 norm."""

    wanted: Array
    name: str = "kept by the whole model's threshold"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to count."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Four sums per block and model."""
        return None, (job.models, 4)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile; in float64, as the threshold may be none of a float32 tensor's values."""
        assert accumulator.blocks is not None
        for k, threshold in enumerate(_thresholds(state, self.wanted)):
            row = accumulator.blocks[tile.index, k]
            row[:2] = kernels.count_kept(tile.values[k], threshold)
            kernels.norms(tile.values[k], row[2:])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """Added up over the blocks."""
        assert accumulator.blocks is not None
        return {"_kept": kernels.fold(accumulator.blocks)}


@dataclass(frozen=True, slots=True)
class Kept:
    """The round that gives every tensor its threshold, its share of the ties, and its density."""

    wanted: Array
    name: str = "kept elements"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """One sweep."""
        return (CountKept(self.wanted),)

    def counts(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def values(self, job: Job, state: State) -> Array | None:
        """What the sweep found; None for an empty tensor."""
        return state.get("_kept")

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """``thresholds``, ``densities``, ``moments`` and what :mod:`mergepipe.tasks.thinning` reads beside them."""
        models = jobs[0].models
        kept = np.stack([np.zeros((models, 4)) if value is None else value for value in values])
        above, ties = kept[:, :, 0], kept[:, :, 1]
        rank, equal = (shared.common[f"_{STAGE}_{name}"][:, 0] for name in ("rank", "equal"))
        exact = np.array([params["tie_rule"] == "index" for params in jobs[0].sparsify_params]) & (self.wanted >= 0)
        before = np.cumsum(ties, axis=0) - ties
        stay = np.where(exact, np.clip(equal - rank - before, 0, ties), ties)
        sizes = np.array([[max(1, job.size)] for job in jobs])
        found = np.select([self.wanted == KEEP_ALL, self.wanted == DROP_ALL], [1.0, 0.0], (above + stay) / sizes)
        thresholds = _thresholds(shared.common, self.wanted)
        each = {
            "thresholds": np.stack([_next_in(job.work, thresholds) for job in jobs]),
            "densities": found,
            "moments": kept[:, :, 2:],
            "_stay": np.where(stay < ties, stay, -1).astype(np.int64),
        }
        return Shared({"_factors": np.ones(models)}, each)
