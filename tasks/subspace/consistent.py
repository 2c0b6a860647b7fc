"""DC-Merge: task vectors in one shared pair of orthonormal bases, where only their largest entries are merged.

Each task vector, cut to its leading components, is written in the bases that are nearest to all components of all
tasks. Of each such matrix the largest 0.1 % of the entries are kept; a mean over the tasks that agree with the sign of
the sum is taken entry by entry, and what lies outside the diagonal blocks, one for each task, is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mergepipe.tasks.method import Job
from mergepipe.tasks.subspace.declare import matrix_shape
from mergepipe.tasks.subspace.frames import Frame, frame_floats, nearest
from mergepipe.tasks.subspace.panels import Sources
from mergepipe.tasks.subspace.route import resolve_rank, route
from mergepipe.tasks.subspace.solver import PerTask, per_task_floats, recombine

if TYPE_CHECKING:
    import torch

KEPT_SHARE = 0.001
"""Of the entries of a task vector in the shared bases."""

TIED = 1e-9
"""Entries that differ from the least one kept by this share of it are as large, but for rounding, and are kept too:
which of the entries of twins is largest would depend on the processor."""


def rank_of(job: Job) -> int:
    """Components kept of each task vector."""
    return resolve_rank(job.params["rank"], matrix_shape(job), job.models, None, job.name)


def peak(job: Job) -> int:
    """float64 values held at the peak."""
    rank = rank_of(job)
    shape = matrix_shape(job)
    count = rank * job.models
    way = route(shape, str(job.params["svd"]))
    bases = sum(shape) * count
    # Overlaps of both sides, one task's matrix with its magnitudes and mask, the sums, and what torch sorts.
    solving = bases + max(frame_floats(max(shape), count, way) + 2 * count * count, 8 * count * count)
    return per_task_floats(job, rank, solving)


def start(job: Job, sources: Sources, device: str) -> Consistent:
    """A solver that has done nothing yet."""
    return Consistent(job, sources, device, rank_of(job))


class Consistent(PerTask):
    """Solver of DC-Merge."""

    def solve(self) -> None:
        """Write the task vectors in shared bases, merge them there, and come back."""
        left, values, right = self.columns()
        bounds = [0]
        for rank in self.ranks:
            bounds.append(bounds[-1] + rank)
        if not bounds[-1]:
            return
        _smooth(values, bounds, str(self.job.params["smoothing"]), float(self.job.params["rho"]))
        first, over = self._basis(left)
        second, across = self._basis(right)
        del left, right
        self.lost += bounds[-1] - min(first.rank, second.rank)
        self.frames = tuple(Frame(self.like, None, f.rank, f.ratio, f.repeated) for f in (first, second))
        side = min(self.shape) if self.job.params["padded"] else bounds[-1]
        core = _merged_core(over, values, across, bounds, side, self.rank)
        self.left, self.right = recombine(first, core, second)

    def _basis(self, columns: torch.Tensor) -> tuple[Frame, torch.Tensor]:
        """The orthonormal basis nearest to some columns, and those columns written in it."""
        frame = nearest(columns.clone(), "polar", self.route, self.rtol)
        dense = Frame(frame.dense(), None, frame.rank, frame.ratio, frame.repeated)
        return dense, dense.basis.T @ columns


def _smooth(values: torch.Tensor, bounds: Sequence[int], how: str, rho: float) -> None:
    """Spread the sum of each task's singular values evenly, or on a line, in place."""
    import torch

    for first, last in pairwise(bounds):
        part = values[first:last]
        if how == "none" or not len(part):
            continue
        weights = torch.ones_like(part)
        if how == "linear":
            weights = torch.linspace(min(rho, float(part[0] / part[-1])), 1, len(part)).to(part)
        part.copy_(part.sum() * weights / weights.sum())


def _merged_core(
    over: torch.Tensor, values: torch.Tensor, across: torch.Tensor, bounds: Sequence[int], side: int, block: int
) -> torch.Tensor:
    """The merged matrix between the bases: shape (K, K), zero outside the diagonal blocks.

    Parameters
    ----------
    over, across : float64 tensor, shape (K, K)
        All components, of the left and of the right, in the shared bases.
    values : float64 tensor, shape (K,)
    bounds : sequence of int
        Where the components of each task begin and end.
    side : int
        The matrices count as of this size, padded with zeros, where shares of their entries are taken.
    block : int
        Size of a diagonal block.
    """
    import torch

    count = over.shape[0]
    kept = max(1, int(KEPT_SHARE * side * side))
    parts = []
    total = torch.zeros_like(over)
    for first, last in pairwise(bounds):
        if first == last:
            continue
        matrix = (over[:, first:last] * values[first:last]) @ across[:, first:last].T
        magnitudes = matrix.abs().reshape(-1)
        least = torch.topk(magnitudes, min(kept, magnitudes.shape[0])).values[-1] * (1 - TIED)
        matrix[matrix.abs() < least] = 0
        del magnitudes
        parts.append(matrix.to_sparse())
        total += matrix
    agreed, voters = torch.zeros_like(total), torch.zeros_like(total)
    for part in parts:
        matrix = part.to_dense()
        same = torch.sign(matrix) == torch.sign(total)
        agreed += matrix * same
        voters += same
    agreed /= voters.clamp(min=1)
    agreed[total == 0] = 0
    place = torch.arange(count, device=over.device) // block
    agreed[place[:, None] != place] = 0
    return agreed
