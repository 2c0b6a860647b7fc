"""The common part of all solvers: task vectors are factored one after another, then two thin factors are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from mergepipe.tasks import philox
from mergepipe.tasks.method import Array, Job, State
from mergepipe.tasks.subspace.calibrate import calibrate, calibrate_floats
from mergepipe.tasks.subspace.declare import matrix_shape
from mergepipe.tasks.subspace.factor import Factors, factorize
from mergepipe.tasks.subspace.frames import Frame
from mergepipe.tasks.subspace.panels import Panels, Sources, Span, multiply_rows, panel_floats
from mergepipe.tasks.subspace.route import ROUTES, factor_floats, factor_route, route

if TYPE_CHECKING:
    import torch

HELD_PANELS = 3
"""Panels held at once while factoring: two that are multiplied, and what a panel is made from."""


class LowRank(ABC):
    """An update that ends as ``left @ right.T``; see :class:`mergepipe.tasks.method.MatrixSolver`.

    Parameters
    ----------
    job : Job
    sources : Sources
    device : str
        As torch names it.
    """

    def __init__(self, job: Job, sources: Sources, device: str) -> None:
        import torch

        self.job = job
        self.shape = matrix_shape(job)
        self.sources = sources.thinned
        self.originals = sources.plain
        self.like = torch.empty(0, dtype=torch.float64, device=device)
        self.svd = str(job.params["svd"])
        self.rtol = float(job.params["rtol"])
        self.route = route(self.shape, self.svd)
        self.left = self.like.new_empty(self.shape[0], 0)
        self.right = self.like.new_empty(self.shape[1], 0)
        self.ranks: list[int] = []
        self.frames: tuple[Frame, ...] = ()
        self.lost = 0
        self.repeated = 0

    @property
    @abstractmethod
    def factor_steps(self) -> int:
        """How many steps come before the last one."""

    @abstractmethod
    def factor(self, number: int) -> None:
        """Take one step of factoring."""

    @abstractmethod
    def solve(self) -> None:
        """Set `left` and `right`."""

    def step(self, number: int) -> None:
        """Factor, or solve if this is the last step."""
        if number < self.factor_steps:
            self.factor(number)
            return
        self.solve()
        alpha = self.job.params.get("svc")
        if alpha is not None:
            self.left, self.right = calibrate(self.left, self.right, self.originals, float(alpha))
        self.left *= float(self.job.params["lambda"])
        self.sources = self.originals = ()

    def add_update(self, span: Span, out: Array) -> None:
        """Add rows `span` of the update to `out`, float64, shape (rows, columns)."""
        import torch

        if self.left.shape[1]:
            target = torch.from_numpy(out)
            if self.left.device.type == "cpu":
                target.addmm_(self.left[span[0] : span[1]], self.right.T)
            else:
                target += (self.left[span[0] : span[1]] @ self.right.T).cpu()

    def decompose(self, source: Panels, rank: int, number: int) -> Factors:
        """The leading components of one matrix, by the route of this tensor."""
        way = factor_route(self.shape, self.svd, rank)
        seed = philox.mask_key(self.job.seed, number, self.job.name) >> 1
        found = factorize(source, rank, way, self.like, rtol=self.rtol, seed=seed)
        self.ranks.append(found.rank)
        self.lost += rank - found.rank
        self.repeated += found.repeated
        return found

    def findings(self) -> State:
        """What was found, for statistics and the manifest: small arrays of one shape for all tensors."""
        ranks = np.zeros(self.job.models, np.int64)
        ranks[: len(self.ranks)] = self.ranks[: self.job.models]
        spanned = [frame.rank for frame in self.frames] or [self.left.shape[1]] * 2
        conditioning = [frame.ratio for frame in self.frames] or [1.0, 1.0]
        return {
            "subspace_ranks": ranks,
            "subspace_spanned": np.array(spanned, np.int64),
            "subspace_conditioning": np.array(conditioning, np.float64),
            "subspace_route": np.array([ROUTES.index(self._shown_route())], np.int64),
            "subspace_repeated": np.array([self.repeated + sum(frame.repeated for frame in self.frames)], np.int64),
            "subspace_lost": np.array([self.lost], np.int64),
        }

    def _shown_route(self) -> str:
        return factor_route(self.shape, self.svd, max(self.ranks, default=1))


class PerTask(LowRank):
    """A solver that factors each task vector and lays the components side by side."""

    rank: int

    def __init__(self, job: Job, sources: Sources, device: str, rank: int) -> None:
        super().__init__(job, sources, device)
        self.rank = rank
        count = rank * job.models
        self.lefts = self.like.new_empty(self.shape[0], count)
        self.rights = self.like.new_empty(self.shape[1], count)
        self.values = self.like.new_empty(count)

    @property
    def factor_steps(self) -> int:
        """One for each task vector."""
        return self.job.models

    def factor(self, number: int) -> None:
        """Put the components of task vector `number` beside those before it."""
        first = sum(self.ranks)
        found = self.decompose(self.sources[number], self.rank, number)
        last = first + found.rank
        self.lefts[:, first:last] = found.left
        self.rights[:, first:last] = found.right
        self.values[first:last] = found.values

    def columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All components found: left vectors, values, right vectors. They are the solver's no more."""
        count = sum(self.ranks)
        found = self.lefts, self.values[:count], self.rights
        self.lefts = self.rights = self.values = self.like
        if count < found[0].shape[1]:
            return found[0][:, :count].contiguous(), found[1], found[2][:, :count].contiguous()
        return found


def with_calibration(job: Job, floats: int, count: int) -> int:
    """The peak of a solver whose update has `count` directions, calibrated where the job asks for that."""
    shape = matrix_shape(job)
    if job.params.get("svc") is None:
        return floats
    return max(floats, calibrate_floats(shape, count) + HELD_PANELS * panel_floats(shape))


def recombine(left: Frame, core: torch.Tensor, right: Frame) -> tuple[torch.Tensor, torch.Tensor]:
    """``left @ core @ right.T`` as two factors, in the memory of the frames.

    Parameters
    ----------
    left, right : Frame
    core : float64 tensor, shape (K,) for a diagonal, or (K, K)
    """
    if left.mix is None and right.mix is None:
        return (left.basis * core if core.ndim == 1 else left.basis @ core), right.basis
    mixed = core if left.mix is None else (left.mix * core if core.ndim == 1 else left.mix @ core)
    if right.mix is not None:
        mixed = mixed[:, None] * right.mix.T if mixed.ndim == 1 else mixed @ right.mix.T
    if mixed.ndim == 1:
        left.basis *= mixed
        return left.basis, right.basis
    return multiply_rows(left.basis, mixed), right.basis


def per_task_floats(job: Job, rank: int, right_of_factors: int) -> int:
    """float64 values of a :class:`PerTask` solver at its peak.

    Parameters
    ----------
    job : Job
    rank : int
        Components of each task vector.
    right_of_factors : int
        What its last step takes beside the components.
    """
    shape = matrix_shape(job)
    kept = (shape[0] + shape[1] + 1) * rank * job.models
    factoring = factor_floats(shape, rank, factor_route(shape, str(job.params["svd"]), rank))
    floats = kept + HELD_PANELS * panel_floats(shape) + max(factoring, right_of_factors)
    return with_calibration(job, floats, rank * job.models)
