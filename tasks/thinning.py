"""What sparsifiers share: from a wanted rank to a threshold, ties, norms, and the thinning itself.

A sparsifier says how many of a tensor's elements it wants dropped, smallest first (:func:`start_thresholds`); the
reductions here find the exact threshold, settle which of the elements equal to it stay (`tie_rule`), measure the norms
before and after where a rescale needs them, and leave in the state ``thresholds`` (float64, (models,): smallest kept
magnitude; 0 keeps all, infinity none) and ``densities`` (float64, (models,): fraction kept; for a random drop the
expected one).

`tie_rule`: `keep` keeps every element that is not below the threshold, so may keep more than asked for; `index` keeps
exactly what was asked for, among equals those of lower flat index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import kernels, philox, slices
from mergepipe.tasks.method import Accumulator, Array, Bounds, Job, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.select import refinements, selected, start_selection
from mergepipe.tasks.shrinkage import kept_norms

KEEP_ALL = -1
DROP_ALL = -2
STAGE = "threshold"

TIE_RULE = Parameter(
    "tie_rule", "choice", "elements equal to the threshold: keep them all, or the exact count, lower index first",
    default="keep", per_model=True, choices=("keep", "index"),
)  # fmt: skip


def restored_norms(job: Job) -> tuple[int, ...]:
    """Per model, the norm its `rescale` restores: 1, 2, or 0 for none."""
    norm = {"l1": 1, "l2": 2, True: 1}
    return tuple(norm.get(params.get("rescale", False), 0) for params in job.sparsify_params)


def start_thresholds(
    job: Job, state: State, wanted: Array, limits: Array | None = None, factors: Array | None = None
) -> State:
    """Begin to look for the thresholds.

    Parameters
    ----------
    job, state
        The state holds ``histogram``.
    wanted : int64 ndarray, shape (models,)
        How many elements to drop, which is the ascending rank of the smallest one kept; or `KEEP_ALL`, `DROP_ALL`.
    limits : int64 ndarray, shape (models,), optional
        For a random drop, the kept fraction times 2**32; -1 for none.
    factors : float64 ndarray, shape (models,), optional
        What survivors are multiplied by, where no norm decides.

    Returns
    -------
    dict
        Entries of the state; the thresholds themselves where no rank is wanted.
    """
    new = wish(job, wanted, limits, factors)
    new |= start_selection(STAGE, np.where(wanted < 0, -1, wanted)[:, None], state["histogram"])
    return new | settle(job, state | new) if (wanted < 0).all() else new


def wish(job: Job, wanted: Array, limits: Array | None = None, factors: Array | None = None) -> State:
    """What is to be dropped, as :func:`settle` wants to know it; parameters as of :func:`start_thresholds`."""
    new: State = {"_wanted": wanted, "_factors": np.ones(job.models) if factors is None else factors}
    if limits is not None and (limits >= 0).any():
        new["_limits"] = limits
    return new


def settle(job: Job, state: State) -> State:
    """Thresholds and realised densities of a finished selection, and how many equals stay where that matters."""
    wanted, limits = state["_wanted"], state.get("_limits", np.full(job.models, -1))
    rank, equal = state[f"_{STAGE}_rank"][:, 0], state[f"_{STAGE}_equal"][:, 0]
    exact = np.array([params["tie_rule"] == "index" for params in job.sparsify_params])
    dropped = np.where(exact, wanted, wanted - rank)
    # np.select would take ten times as long, a tenth of a millisecond for every tensor.
    kept, gone = wanted == KEEP_ALL, wanted == DROP_ALL
    dropped = np.where(kept, 0, np.where(gone, job.size, dropped))
    thresholds = np.where(kept, 0.0, np.where(gone, math.inf, selected(job, state, STAGE)[:, 0]))
    return {
        "thresholds": thresholds,
        "densities": np.where(limits >= 0, limits / 2**32, (job.size - dropped) / job.size),
        "_stay": np.where((wanted >= 0) & exact & (rank > 0), equal - rank, -1),
    }


def threshold_reductions(job: Job, reads: float = 1.0) -> tuple[Reduction, ...]:
    """The sweeps from :func:`start_thresholds` on; `reads` as of :func:`mergepipe.tasks.select.refinements`."""
    ties = (Ties(),) if any(params["tie_rule"] == "index" for params in job.sparsify_params) else ()
    norms = (Rescale(),) if any(restored_norms(job)) else ()
    return (*refinements(job, STAGE, 1, settle, reads), *ties, *norms)


@dataclass(frozen=True, slots=True)
class Ties:
    """Counts, block by block, the elements equal to a threshold of which only the first ones stay."""

    name: str = "ties"

    def needed(self, job: Job, state: State) -> bool:
        """Whether some model drops some of its ties."""
        return "_stay" in state and "_ties_before" not in state and bool((state["_stay"] >= 0).any())

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """One count per block and model."""
        return None, (job.models,)

    def leaves(self, job: Job) -> int:
        """One count per block and model."""
        return (job.blocks + 1) * job.models

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Count one tile."""
        assert accumulator.blocks is not None
        for k in np.flatnonzero(state["_stay"] >= 0):
            least = float(state["thresholds"][k])
            accumulator.blocks[tile.index, k] = kernels.count_ties(tile.values[k], least)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_ties_before``: int64, shape (blocks + 1, models), how many ties lie before each block."""
        assert accumulator.blocks is not None
        before = np.zeros((job.blocks + 1, job.models), np.int64)
        np.cumsum(accumulator.blocks.astype(np.int64), axis=0, out=before[1:])
        return {"_ties_before": before}


@dataclass(frozen=True, slots=True)
class Rescale:
    """Measures the norms of what is left, for the factors that restore the norms of the whole."""

    name: str = "norms after thinning"

    def needed(self, job: Job, state: State) -> bool:
        """Whether some model's norm is restored."""
        return any(restored_norms(job)) and "thresholds" in state and "_norms_after" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block and model."""
        return None, (job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Thin one tile and add it up."""
        assert accumulator.blocks is not None
        least, _ = cut(job, state, tile)
        for k in range(job.models):
            kernels.thin(tile.values[k], least[k], 1.0)
            kernels.norms(tile.values[k], accumulator.blocks[tile.index, k])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``_factors``: 1 where nothing is left; ``kept_norms``: the norm of what is left, over that of the whole."""
        assert accumulator.blocks is not None
        before, after = state["moments"], kernels.fold(accumulator.blocks)
        factors = state["_factors"].copy()
        for k, norm in enumerate(restored_norms(job)):
            if norm and after[k, norm - 1] > 0:
                factors[k] = (before[k, norm - 1] / after[k, norm - 1]) ** (1 / norm)
        return {"_factors": factors, "_norms_after": after, "kept_norms": kept_norms(before[:, 1], after[:, 1])}


def cut(job: Job, state: State, tile: Tile) -> tuple[kernels.Scalars, kernels.Scalars]:
    """Do in place what no threshold can say, and return the thresholds and factors that say the rest.

    For a kernel that thins as it reads. What is left of `tile.values` to do is :func:`mergepipe.tasks.kernels.thin`.

    Returns
    -------
    thresholds, factors : tuple of float, one per model
    """
    if slices.COUNT in state:
        _cut_slices(job, state, tile)
        return (0.0,) * job.models, (1.0,) * job.models
    thresholds, factors = _thresholds_and_factors(job, state)
    if "_ties_before" in state:
        before, until = state["_ties_before"][tile.index], state["_ties_before"][tile.index + 1]
        for k in np.flatnonzero((state["_stay"] >= 0) & (until > state["_stay"])):
            kernels.drop_late_ties(tile.values[k], thresholds[k], max(0, int(state["_stay"][k] - before[k])))
    chance = draw(job, state)
    if chance is not None:
        chance.drop(tile)
    return thresholds, factors


def draw(job: Job, state: State) -> philox.Draw | None:
    """Which elements stay of the models that drop at random; None if none does."""
    limits = state.get("_limits")
    return None if limits is None else philox.draw(job, np.where(limits >= 0, limits, philox.ALL))


def _cut_slices(job: Job, state: State, tile: Tile) -> None:
    one = slices.slice_job(job)
    for piece in slices.pieces(job, tile.index):
        apply_cut(one, slices.state_of(state, piece.of), slices.part(tile, piece))


def plain_cut(job: Job, state: State) -> Bounds | None:
    """The `bounds` of every sparsifier of this kind: None where it takes more than thresholds and chance."""
    if state.keys() & {"_ties_before", slices.COUNT}:
        return None
    thresholds, factors = _thresholds_and_factors(job, state)
    return Bounds(thresholds, None, factors, draw(job, state))


def _thresholds_and_factors(job: Job, state: State) -> tuple[kernels.Scalars, kernels.Scalars]:
    if "thresholds" not in state:  # a density of 1, or of 0, needs no look at the data
        keep = [params.get("density", 1) > 0 for params in job.sparsify_params]
        return tuple(0.0 if kept else math.inf for kept in keep), (1.0,) * job.models
    return tuple(state["thresholds"].tolist()), tuple(state["_factors"].tolist())


def apply_cut(job: Job, state: State, tile: Tile) -> None:
    """Thin and rescale `tile.values` in place: the `mask` of every sparsifier of this kind."""
    least, factors = cut(job, state, tile)
    for k in range(job.models):
        kernels.thin(tile.values[k], least[k], factors[k])
