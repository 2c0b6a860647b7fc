"""SCE: select the elements in which the models differ most, weight each model by its energy, merge those that agree.

Of each tensor the ``int(select_topk * n)`` elements of highest variance across the models stay, n counting those whose
variance is not zero; elements equal to the last of them stay, too. A model's weight is its mean square over the tensor,
after the selection, divided by the sum over all models. Per element, the models that agree with the sign of the sum are
averaged by weight; as in mergekit, a sum of weights counts as 1e-6 at least.

mergekit gives all models the same weight where the mean squares add up to less than 1e-6, which is so for most
fine-tunes; `equal_below` says where, and with 0 the paper's weights are taken always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks import task_vectors as family
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, MergeMethod, Paper, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.select import Coarse, refinements, selected, start_selection

STAGE = "variance"
PREFIX = "_sce_"
SMALLEST_DIVISOR = 1e-6
SCRATCH_ROWS = 1


@kernel
def _variances(values: Array, out: Array) -> None:
    """Population variance over the models, in float64 and rounded once."""
    models = values.shape[0]
    mean, spread = np.empty(kernels.STRIP), np.empty(kernels.STRIP)
    for start in range(0, out.size, kernels.STRIP):
        found = out[start : start + kernels.STRIP]
        mean[:] = 0
        spread[:] = 0
        for k in range(models):
            row = values[k][start : start + kernels.STRIP]
            for i in range(found.size):
                mean[i] += np.float64(row[i])
        for k in range(models):
            row = values[k][start : start + kernels.STRIP]
            for i in range(found.size):
                apart = np.float64(row[i]) - mean[i] / models
                spread[i] += apart * apart
        for i in range(found.size):
            found[i] = spread[i] / models


@kernel
def _drop_below(values: Array, scores: Array, least: float) -> None:
    zero, smallest = values.dtype.type(0), values.dtype.type(least)
    for k in range(values.shape[0]):
        row = values[k]
        for i in range(row.size):
            row[i] = row[i] if scores[i] >= smallest else zero


@kernel
def _merge(base: Array, values: Array, weights: Array, smallest: float, out: Array) -> None:
    """In float64, rounded once; `out` holds the votes on entry."""
    zero = out.dtype.type(0)
    total, divisor = np.empty(kernels.STRIP), np.empty(kernels.STRIP)
    for start in range(0, out.size, kernels.STRIP):
        votes, below = out[start : start + kernels.STRIP], base[start : start + kernels.STRIP]
        total[:] = 0
        divisor[:] = 0
        for k in range(values.shape[0]):
            weight, row = weights[k], values[k][start : start + kernels.STRIP]
            for i in range(votes.size):
                agrees = (row[i] > zero) if votes[i] >= zero else (row[i] < zero)
                total[i] += weight * np.float64(row[i]) if agrees else 0.0
                divisor[i] += weight if agrees else 0.0
        for i in range(votes.size):
            votes[i] = np.float64(below[i]) + total[i] / max(divisor[i], smallest)


def _one(job: Job) -> Job:
    """The job as the selection sees it: one model, whose values are the variances."""
    return replace(job, models=1, model_params=({},), sparsify="none", sparsify_params=())


def _own(state: State) -> State:
    """The entries of the selection, under the names it knows."""
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def _kept(state: State) -> State:
    return {PREFIX + name: value for name, value in state.items() if name != "histogram"}


@dataclass(frozen=True, slots=True)
class OfVariances:
    """A sweep of a selection, over the variances; the first one also counts those that are not zero."""

    inner: Reduction
    counts_nonzero: bool = False

    @property
    def name(self) -> str:
        """The sweep's own name, and of what."""
        return f"{self.inner.name} of variances"

    def needed(self, job: Job, state: State) -> bool:
        """Whether the selection is not done."""
        return self.inner.needed(_one(job), _own(state))

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """The selection's counts, and a count per block."""
        return self.inner.shapes(_one(job))[0], (1,) if self.counts_nonzero else None

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        thin(job, state, tile)
        scores = tile.scratch[:1]
        _variances(tile.values, scores[0])
        if accumulator.blocks is not None:
            accumulator.blocks[tile.index, 0] = np.count_nonzero(scores)
        scored = Tile(tile.index, tile.start, None, scores, tile.scratch[1:])
        self.inner.update(_one(job), _own(state), Accumulator(accumulator.counts), scored)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """The selection's entries."""
        own = _own(state)
        if accumulator.blocks is not None:
            kept = int(accumulator.blocks.sum() * job.params["select_topk"])
            own["ranks"] = np.array([[job.size - kept if kept else -1]])
        return _kept(self.inner.combine(_one(job), own, Accumulator(accumulator.counts)))


def _start(job: Job, state: State) -> State:
    if state["ranks"][0, 0] < 0:
        return {"thresholds": np.array([math.inf])}
    return start_selection(STAGE, state["ranks"], state["histogram"])


def _settle(job: Job, state: State) -> State:
    return {"thresholds": selected(job, state, STAGE)[:, 0]}


def _select(job: Job, state: State, tile: Tile) -> None:
    """Thin, and zero what is not selected, in place."""
    thin(job, state, tile)
    topk = job.params["select_topk"]
    if topk <= 0:
        tile.values[:] = 0
    elif topk < 1:
        _variances(tile.values, tile.scratch[0])
        _drop_below(tile.values, tile.scratch[0], float(state[PREFIX + "thresholds"][0]))


@dataclass(frozen=True, slots=True)
class Energies:
    """``energies``: float64, shape (models,): sums of squares after the selection."""

    name: str = "energies"

    def needed(self, job: Job, state: State) -> bool:
        """Whether it has to run."""
        return job.size > 0 and "energies" not in state

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block and model, of which one is used."""
        return None, (job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        _select(job, state, tile)
        for k in range(job.models):
            kernels.norms(tile.values[k], accumulator.blocks[tile.index, k])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """``energies``."""
        assert accumulator.blocks is not None
        return {"energies": kernels.fold(accumulator.blocks)[:, 1]}


def _weights(job: Job, energies: Array) -> Array:
    means = energies / job.size
    total = means.sum()
    equal = total < job.params["equal_below"] or total == 0
    found: Array = np.full(job.models, 1 / job.models) if equal else means / total
    return found


def _reductions(job: Job) -> tuple[Reduction, ...]:
    selection: tuple[Reduction, ...] = ()
    if 0 < job.params["select_topk"] < 1:
        fine = [OfVariances(sweep) for sweep in refinements(_one(job), STAGE, 1, _settle)]
        selection = (OfVariances(Coarse(False, _start), counts_nonzero=True), *fine)
    return (*family.reductions(job), *selection, Energies())


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    _select(job, state, tile)
    kernels.sum_many(tile.values, np.ones(job.models, job.work), 1.0, out)
    _merge(tile.base, tile.values, _weights(job, state["energies"]), SMALLEST_DIVISOR, out)


METHOD = MergeMethod(
    name="sce",
    title="SCE",
    summary="selects the elements in which models differ most, weights models by their energy, merges those that agree",
    base="required",
    space="deltas",
    parameters=(
        Parameter("select_topk", "number", "fraction that is selected", default=1.0, minimum=0, maximum=1),
        Parameter(
            "equal_below", "number", "sum of mean squares below which weights are equal", default=1e-6, minimum=0
        ),
        family.INT8_MASK,
    ),
    kernel=_apply,
    reductions=_reductions,
    thin=_select,
    scratch_rows=SCRATCH_ROWS,
    paper=Paper("FuseChat: Knowledge Fusion of Chat Models", "https://arxiv.org/abs/2408.07990"),
)
