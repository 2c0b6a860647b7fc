"""MDA and TSV-M: the singular vectors of all tasks, side by side, replaced by the nearest frame.

TSV-M takes the nearest orthonormal vectors, MDA the nearest simplex equiangular tight frame; both put the singular
values back between a left and a right frame: ``update = lambda * frame(U) diag(s) frame(V).T``.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks.method import Job
from mergepipe.tasks.subspace.declare import matrix_shape
from mergepipe.tasks.subspace.frames import Frame, Target, frame_floats, nearest
from mergepipe.tasks.subspace.panels import Sources
from mergepipe.tasks.subspace.route import resolve_rank, route
from mergepipe.tasks.subspace.solver import PerTask, per_task_floats, recombine

if TYPE_CHECKING:
    import torch

SIGNS_AT_ONCE = 256
"""Columns whose signs are found at once, which bounds the memory of their magnitudes."""


def rank_of(job: Job) -> int:
    """Components kept of each task vector; refuses more of them than a simplex frame can have.

    Raises
    ------
    RecipeError
        If the rank is larger than the matrix, or K directions do not fit K - 1 dimensions of it.
    """
    rows, columns = matrix_shape(job)
    cap = job.params.get("rank_cap")
    rank = resolve_rank(job.params.get("rank", "auto"), (rows, columns), job.models, cap, job.name)
    count = rank * job.models
    mode, right = job.params.get("mode", "tsv"), job.params.get("right_align", "polar")
    for side, used in ((rows, mode != "tsv"), (columns, right == "etf" and mode != "projection")):
        if used and count > max(1, side + 1):
            message = (
                f"{job.models} models of rank {rank} are {count} directions, and '{job.name}' has room for a simplex "
                f"frame of {side + 1}: use rank: auto, or at most {max(1, (side + 1) // job.models)}"
            )
            raise RecipeError([Fault("$.parameters.rank", message)])
    return rank


def steps(job: Job) -> tuple[str, ...]:
    """One factor step for each model, then the solution."""
    return ("factor",) * job.models + ("solve",)


def peak(job: Job) -> int:
    """float64 values held at the peak."""
    rank = rank_of(job)
    shape = matrix_shape(job)
    count = rank * job.models
    way = route(shape, str(job.params["svd"]))
    projected = shape[0] * count if job.params.get("mode") == "projection" else 0
    solving = frame_floats(max(shape), count, way) + count * count + projected
    return per_task_floats(job, rank, solving)


def start(job: Job, sources: Sources, device: str) -> Directional:
    """A solver that has done nothing yet."""
    return Directional(job, sources, device, rank_of(job))


class Directional(PerTask):
    """Solver of MDA and TSV-M."""

    def solve(self) -> None:
        """Fix signs, find the frames, recombine."""
        params = self.job.params
        left, values, right = self.columns()
        _fix_signs(left, right, params.get("sign_rule", "none"))
        if params.get("mode", "tsv") == "projection":
            self._project(left, values, right)
            return
        target: Target = "etf" if params.get("mode", "tsv") == "etf" else "polar"
        first = nearest(left, target, self.route, self.rtol)
        del left
        second = nearest(right, params.get("right_align", "polar"), self.route, self.rtol)
        del right
        self._note((first, second), values.shape[0], (target, params.get("right_align", "polar")))
        self.left, self.right = recombine(first, values, second)

    def _project(self, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> None:
        """The weighted sum of the truncated task vectors, its columns projected on the simplex frame's span."""
        count = values.shape[0]
        frame = nearest(left.clone(), "etf", self.route, self.rtol)
        basis = frame.dense()
        if count > 1:
            basis *= math.sqrt((count - 1) / count)
        self._note((frame, Frame(right, None, count, 1.0)), count, ("etf", "none"))
        self.left, self.right = basis @ ((basis.T @ left) * values), right

    def _note(self, frames: tuple[Frame, Frame], count: int, targets: tuple[str, str]) -> None:
        self.lost += max(
            count - (target == "etf" and count > 1) - frame.rank for frame, target in zip(frames, targets, strict=True)
        )
        # Only numbers are kept of the frames.
        self.frames = tuple(Frame(self.like, None, frame.rank, frame.ratio, frame.repeated) for frame in frames)


def _fix_signs(left: torch.Tensor, right: torch.Tensor, rule: str) -> None:
    """Flip pairs of columns in place, so that the result does not depend on the signs that a library returns.

    'maxabs': the largest element of each left column, the first of equals, is positive. 'balanced': after that, column
    by column, flip where the inner product with the sum of the columns before is positive.
    """
    import torch

    if rule == "none" or not left.shape[1]:
        return
    for first in range(0, left.shape[1], SIGNS_AT_ONCE):
        part = left[:, first : first + SIGNS_AT_ONCE]
        signs = torch.sign(part.gather(0, part.abs().argmax(0, keepdim=True)))
        signs[signs == 0] = 1
        part *= signs
        right[:, first : first + SIGNS_AT_ONCE] *= signs
    if rule == "balanced":
        running = left[:, 0].clone()
        for j in range(1, left.shape[1]):
            if float(running @ left[:, j]) > 0:
                left[:, j].neg_()
                right[:, j].neg_()
            running += left[:, j]
