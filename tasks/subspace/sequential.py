"""OPCM: models merged one after another, each cleaned of what it has in common with the merge so far.

With the singular vectors of the merge so far, ``M = U S V.T``, a task vector tau is written as ``P = U.T tau V``. The
diagonal of P is its part along the merge's own directions, the top-left r x r block its part inside their leading
subspace; both are left out: ``M <- M + tau - U masked(P) V.T``. r is the first place where the singular values up to
there add up to more than `alpha` of them all. What lies outside the thin factors is never touched, so thin ones do.

The published rule divides by a factor after each step, so that the norm of the whole merged update is the mean norm of
the task vectors seen so far. Neither singular vectors nor r depend on such a factor: it cancels from one step to the
next, and only the last one counts. So tensors are merged independently, and scaled once, when all are known.

Each step ends with one rounding to the working type. That is what is kept for models that come later: going on from it
gives the same bits as merging all models at once.

References
----------
Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual Model Merging,
arXiv:2501.09522
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, Tile
from mergepipe.tasks.sparsify import SPARSIFIERS
from mergepipe.tasks.subspace import declare
from mergepipe.tasks.subspace.factor import factorize
from mergepipe.tasks.subspace.panels import Made, Panels, Sources, Span, panel_floats, spans
from mergepipe.tasks.subspace.route import ROUTES, factor_floats, route
from mergepipe.tasks.subspace.solver import HELD_PANELS

if TYPE_CHECKING:
    import torch

FACTOR = "factor"
"""In the state of the second stage: what all merged task vectors are multiplied with."""

STEP_PANELS = HELD_PANELS + 3
"""Panels held in a step: the task vector's, its products with the factors, the correction, and the sum."""


def scale_factor(norms: Sequence[float], merged: float) -> float:
    """What brings the merged update to the mean norm of the task vectors; 1 where there is nothing to scale.

    Examples
    --------
    >>> scale_factor([3.0, 5.0], 2.0), scale_factor([3.0], 0.0)
    (2.0, 1.0)
    """
    return math.fsum(norms) / len(norms) / merged if merged > 0 else 1.0


def is_projected(job: Job) -> bool:
    """Whether a tensor is merged as a matrix; the second stage only scales."""
    return job.models > 0 and declare.is_matrix(job)


def steps(job: Job) -> tuple[str, ...]:
    """One for each model."""
    return ("project",) * job.models


def peak(job: Job) -> int:
    """float64 values held at the peak."""
    shape = declare.matrix_shape(job)
    side = min(shape)
    held = -(-shape[0] * shape[1] * job.work.itemsize // 8)
    factoring = factor_floats(shape, side, route(shape, str(job.params["svd"])))
    cleaning = sum(shape) * side + 4 * side * side
    return held + max(factoring, cleaning) + STEP_PANELS * panel_floats(shape)


def start(job: Job, sources: Sources, device: str) -> Sequential:
    """A solver that has done nothing yet."""
    return Sequential(job, sources, device)


def protected_rank(values: torch.Tensor, alpha: float) -> int:
    """The first place where the singular values up to there, itself included, exceed `alpha` of their sum.

    Examples
    --------
    >>> import torch
    >>> [protected_rank(torch.tensor([5.0, 3.0, 2.0]), alpha) for alpha in (0.0, 0.5, 0.9)]
    [0, 1, 2]
    """
    share = values.cumsum(0) / values.sum()
    # The last share may round to just below 1.
    return min(int((share <= alpha).sum()), values.shape[0] - 1)


class Sequential:
    """Solver of one matrix; see :class:`mergepipe.tasks.method.MatrixSolver`.

    Parameters
    ----------
    job : Job
    sources : Sources
        Where something was carried over, the merge goes on from that; else the first model is taken as it is.
    device : str
    """

    def __init__(self, job: Job, sources: Sources, device: str) -> None:
        import torch

        self.job = job
        self.shape = declare.matrix_shape(job)
        self.sources = sources
        self.like = torch.empty(0, dtype=torch.float64, device=device)
        self.way = route(self.shape, str(job.params["svd"]))
        work = torch.float64 if job.work == np.float64 else torch.float32
        self.merged = torch.zeros(self.shape, dtype=work, device=device)
        self.squares = np.zeros(job.models)
        self.ranks, self.protected = np.zeros(job.models, np.int64), np.zeros(job.models, np.int64)
        self.lost = self.repeated = 0

    def step(self, number: int) -> None:
        """Merge one model."""
        if number == 0 and self.sources.carried is not None:
            for first, last in spans(self.shape):
                self.merged[first:last] = self.sources.carried.panel((first, last))
        if number == 0 and self.sources.carried is None:
            self._take(self.sources.thinned[0])
        else:
            self._project(number, self.sources.thinned[number])

    def _take(self, source: Panels) -> None:
        for first, last in spans(self.shape):
            panel = source.panel((first, last))
            self._measure(0, panel)
            self.merged[first:last] = panel

    def _measure(self, number: int, panel: torch.Tensor) -> None:
        self.squares[number] += float((panel * panel).sum())

    def _project(self, number: int, source: Panels) -> None:
        """Add a task vector without its part along the directions of the merge so far."""
        import torch

        so_far = Made(self.shape, lambda span: self.merged[span[0] : span[1]].to(torch.float64, copy=True))
        found = factorize(so_far, min(self.shape), self.way, self.like, rtol=float(self.job.params["rtol"]))
        self.ranks[number] = found.rank
        self.lost = max(self.lost, min(self.shape) - found.rank)
        self.repeated += found.repeated
        core = self.like.new_zeros(found.rank, found.rank)
        for first, last in spans(self.shape):
            panel = source.panel((first, last))
            self._measure(number, panel)
            core.addmm_(found.left[first:last].T, panel @ found.right)
        if found.rank:
            self.protected[number] = protected_rank(found.values, float(self.job.params["alpha"]))
        core = _left_out(core, int(self.protected[number]))
        for first, last in spans(self.shape):
            panel = source.panel((first, last))
            panel -= (found.left[first:last] @ core) @ found.right.T
            panel += self.merged[first:last]
            self.merged[first:last] = panel

    def findings(self) -> State:
        """Norms for the scaling, and what the manifest shows."""
        square = sum(
            float((part * part).sum())
            for first, last in spans(self.shape)
            for part in [self.merged[first:last].double()]
        )
        return {
            "task_squares": self.squares,
            "merged_square": np.array([square]),
            "subspace_ranks": self.ranks,
            "subspace_protected": self.protected,
            "subspace_route": np.array([ROUTES.index(self.way)], np.int64),
            "subspace_repeated": np.array([self.repeated], np.int64),
            "subspace_lost": np.array([self.lost], np.int64),
        }

    def add_update(self, span: Span, out: Array) -> None:
        """Add rows `span` of the merged task vectors to `out`, float64, shape (rows, columns)."""
        out += self.merged[span[0] : span[1]].cpu().numpy()


def _left_out(core: torch.Tensor, rank: int) -> torch.Tensor:
    """The entries of P that are not merged: its diagonal and its leading block; all others become zero."""
    kept = core.diagonal().diag()
    kept[:rank, :rank] = core[:rank, :rank]
    return kept


@dataclass(frozen=True, slots=True)
class Squares:
    """``task_squares``, (models,), and ``merged_square``, (1,): squared norms, float64, of what is no matrix."""

    name: str = "norms"

    def needed(self, job: Job, state: State) -> bool:
        """Wherever there is something to add up."""
        return job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Two sums per block for each model and for the merge, of which one is used."""
        return None, (job.models + 1, 2)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        _accumulate(job, state, tile, tile.scratch[0])
        for k, row in enumerate((*tile.values, tile.scratch[0])):
            kernels.norms(row, accumulator.blocks[tile.index, k])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """Added up, each sum rounded once."""
        assert accumulator.blocks is not None
        squares = kernels.fold(accumulator.blocks)[:, 1]
        return {"task_squares": squares[:-1], "merged_square": squares[-1:]}


SCRATCH_ROWS = 1


def reductions(job: Job) -> tuple[Reduction, ...]:
    """Those of the sparsifier, and the norms of what is no matrix."""
    if job.models == 0:
        return ()
    own = () if is_projected(job) else (Squares(),)
    return (*SPARSIFIERS[job.sparsify].reductions(job), *own)


def apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    """The kernel: of the first stage the sum of the thinned task vectors, of the second the scaled sum on the base."""
    if job.models == 0:
        assert tile.base is not None
        assert tile.carried is not None, "the first stage has made it"
        _put(tile.base, tile.carried, float(state[FACTOR]) * float(job.params["lambda"]), out)
    else:
        _accumulate(job, state, tile, out)


def _accumulate(job: Job, state: State, tile: Tile, out: Array) -> None:
    """Add up one by one, in the working type, as later models will be."""
    declare.thin(job, state, tile)
    rows = list(tile.values)
    out[:] = rows.pop(0) if tile.carried is None else tile.carried
    for row in rows:
        out += row


@kernel
def _put(base: Array, merged: Array, factor: float, out: Array) -> None:
    """``out = base + factor * merged``, in float64, rounded to the working type."""
    for i in range(out.size):
        out[i] = np.float64(base[i]) + factor * np.float64(merged[i])
