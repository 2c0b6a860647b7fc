"""EMR: one unified task vector, and for each task a mask and a factor that bring it back to its own.

Per element the sign is that of the mean (a mean of zero counts as minus), and the unified value is the largest
magnitude among the tasks of that sign: ``out = base + tau``. A task's mask holds where it has that sign, its rescaler
is ``sum abs(tau_k) / sum abs(mask_k * tau)`` over all tensors, or the same with the means of each tensor in place of
its sums (`rescaler`), as the authors' code has it. Masks and rescalers are kept beside the merge; the model of task k
is ``base + rescaler_k * mask_k * tau``.

The unified value of an element is the task vector of one of the models. So unless a sparsifier rescales, or the output
is of a narrower type than the inputs, ``base + tau`` is an element of that model, and rounding it loses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.gram import thin
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, MergeMethod, Paper, Reduction, Round, Shared, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS


@kernel
def _unify(values: Array, out: Array) -> None:
    """The unified task vector; `values` has shape (models, n)."""
    zero = out.dtype.type(0)
    for i in range(out.size):
        total = 0.0
        for k in range(values.shape[0]):
            total += np.float64(values[k, i])
        best = zero
        for k in range(values.shape[0]):
            value = values[k, i] if total > 0 else -values[k, i]
            best = max(best, value)
        out[i] = best if total > 0 else -best


@kernel
def _sums(values: Array, unified: Array, sums: Array) -> None:
    """Per model, the sum of magnitudes and that of the unified vector where the model has its sign."""
    for k in range(values.shape[0]):
        own, masked = 0.0, 0.0
        for i in range(unified.size):
            value, common = np.float64(values[k, i]), np.float64(unified[i])
            own += abs(value)
            same = ((value > 0) & (common > 0)) | ((value < 0) & (common < 0))
            masked += abs(common) if same else 0.0
        sums[k, 0] = own
        sums[k, 1] = masked


def _masks(job: Job, state: State, tile: Tile) -> Array:
    """Where each model has the unified sign, from a tile that the kernel has thinned."""
    unified = np.empty(tile.values.shape[1], job.work)
    _unify(tile.values, unified)
    return ((tile.values > 0) & (unified > 0)) | ((tile.values < 0) & (unified < 0))


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    assert tile.base is not None
    thin(job, state, tile)
    _unify(tile.values, out)
    kernels.put_on_base(tile.base, 1.0, out)


@dataclass(frozen=True, slots=True)
class Sums:
    """``_sums``: float64, (models, 2): see :func:`_sums`."""

    name: str = "sums of the unified vector"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to add up."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block and model."""
        return None, (job.models, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        thin(job, state, tile)
        _unify(tile.values, tile.scratch[0])
        _sums(tile.values, tile.scratch[0], accumulator.blocks[tile.index])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """Added up over the blocks."""
        assert accumulator.blocks is not None
        return {"_sums": kernels.fold(accumulator.blocks)}


@dataclass(frozen=True, slots=True)
class Rescalers:
    """The round that leaves ``rescalers`` (float64, (models,)); 1 for a model whose mask is empty."""

    name: str = "rescalers"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """Those of the sparsifier, then the sums."""
        return (*_reductions(job), Sums())

    def counts(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def values(self, job: Job, state: State) -> Array | None:
        """The tensor's sums, or means."""
        if "_sums" not in state:
            return None
        found: Array = state["_sums"] / (job.size if job.params["rescaler"] == "tensor_means" else 1)
        return found

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """``rescalers``."""
        rows = [value for value in values if value is not None]
        own, masked = kernels.fold(np.stack(rows)).T if rows else np.zeros((2, jobs[0].models))
        return Shared({"rescalers": np.where(masked > 0, own / np.where(masked > 0, masked, 1), 1.0)})


def _reductions(job: Job) -> tuple[Reduction, ...]:
    return SPARSIFIERS[job.sparsify].reductions(job)


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    return (Rescalers(),)


METHOD = MergeMethod(
    name="emr_unified",
    title="EMR-Merging (unified)",
    summary="one unified model, with a mask and a rescaler per task beside it that bring each task's model back",
    base="required",
    space="deltas",
    parameters=(
        Parameter(
            "rescaler", "choice", "from sums over all elements, or, as in the authors' code, over the means of tensors",
            default="elements", choices=("elements", "tensor_means"),
        ),
    ),
    kernel=_apply,
    reductions=_reductions,
    rounds=_rounds,
    rounds_read=("rescaler",),
    masks=_masks,
    scratch_rows=1,
    paper=Paper("EMR-Merging: Tuning-Free High-Performance Model Merging", "https://arxiv.org/abs/2405.17461"),
)  # fmt: skip
