"""Iso-C and Iso-CTS: merged matrices whose singular values are all the same, their mean.

With equal singular values the singular vectors are anyone's choice, so there is no calibration (`svc`) of these.

Iso-C flattens the spectrum of the summed task vector. Iso-CTS keeps the leading part of that sum as the common
subspace, gives each task a share of the rest from what it has outside of it, and makes all of these directions
orthonormal.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergepipe.tasks.method import Job
from mergepipe.tasks.subspace.declare import matrix_shape
from mergepipe.tasks.subspace.factor import Factors
from mergepipe.tasks.subspace.frames import Frame, frame_floats, nearest
from mergepipe.tasks.subspace.panels import Made, Panels, Sources, Span, panel_floats, total, transposed_times
from mergepipe.tasks.subspace.route import factor_floats, route
from mergepipe.tasks.subspace.solver import HELD_PANELS, LowRank, recombine

if TYPE_CHECKING:
    import torch


def flat_steps(job: Job) -> tuple[str, ...]:
    """The sum is factored once."""
    return ("factor", "solve")


def flat_peak(job: Job) -> int:
    """float64 values that Iso-C holds at the peak."""
    shape = matrix_shape(job)
    factoring = factor_floats(shape, min(shape), route(shape, str(job.params["svd"])))
    return factoring + (HELD_PANELS + 1) * panel_floats(shape)


def start_flat(job: Job, sources: Sources, device: str) -> Flat:
    """A solver of Iso-C."""
    return Flat(job, sources, device)


class Flat(LowRank):
    """Solver of Iso-C."""

    found: Factors

    @property
    def factor_steps(self) -> int:
        """One, for the sum."""
        return 1

    def factor(self, number: int) -> None:
        """Decompose the sum of all task vectors."""
        self.found = self.decompose(total(self.sources), min(self.shape), number)

    def solve(self) -> None:
        """All singular values become their mean; those that are zero count, but have no direction to be given to."""
        mean = float(self.found.values.sum()) / min(self.shape)
        self.left, self.right = self.found.left, self.found.right
        self.left *= mean
        del self.found


def split(side: int, models: int, fraction: float) -> tuple[int, int]:
    """Directions of the common subspace, and of each task, among `side`.

    Examples
    --------
    >>> split(768, 8, 0.8), split(10, 3, 0.8)
    ((616, 19), (7, 1))
    """
    each = round((side - int(fraction * side)) / models)
    return side - each * models, each


def common_steps(job: Job) -> tuple[str, ...]:
    """The sum, then each task."""
    return ("factor",) * (job.models + 1) + ("solve",)


def common_peak(job: Job) -> int:
    """float64 values that Iso-CTS holds at the peak."""
    shape = matrix_shape(job)
    side = min(shape)
    way = route(shape, str(job.params["svd"]))
    common, each = split(side, job.models, float(job.params["common_fraction"]))
    kept = (sum(shape) + 1) * side
    tasks = common * shape[1] + factor_floats(shape, max(1, each), way)
    sides = frame_floats(max(shape), side, way) + side * side
    factoring = max(factor_floats(shape, max(1, common), way), tasks, sides)
    return kept + (HELD_PANELS + 1) * panel_floats(shape) + factoring


def start_common(job: Job, sources: Sources, device: str) -> Common:
    """A solver of Iso-CTS."""
    return Common(job, sources, device)


class Common(LowRank):
    """Solver of Iso-CTS."""

    def __init__(self, job: Job, sources: Sources, device: str) -> None:
        super().__init__(job, sources, device)
        self.common, self.each = split(min(self.shape), job.models, float(job.params["common_fraction"]))
        count = min(self.shape)
        self.lefts = self.like.new_empty(self.shape[0], count)
        self.rights = self.like.new_empty(self.shape[1], count)
        self.values = self.like.new_empty(count)
        self.filled = 0
        # The common directions are found first and stand last: columns in the order of the published code.
        self.shared = 0

    @property
    def factor_steps(self) -> int:
        """The sum, then one for each task vector."""
        return self.job.models + 1

    def factor(self, number: int) -> None:
        """The common directions first, then those that each task has outside of them."""
        if number == 0:
            if self.common:
                self._place(self.decompose(total(self.sources), self.common, 0), self.lefts.shape[1] - self.common)
            self.shared = sum(self.ranks)
            self.ranks.clear()
            return
        if not self.each:
            return
        found = self.decompose(self._outside(self.sources[number - 1]), self.each, number)
        self._place(found, self.filled)
        self.filled += found.rank

    def _place(self, found: Factors, first: int) -> None:
        last = first + found.rank
        self.lefts[:, first:last] = found.left
        self.rights[:, first:last] = found.right
        self.values[first:last] = found.values

    def _outside(self, source: Panels) -> Panels:
        """A task vector less its projection onto the common left directions."""
        first = self.lefts.shape[1] - self.common
        common = self.lefts[:, first : first + self.shared]
        inside = transposed_times(source, common)

        def make(span: Span) -> torch.Tensor:
            return source.panel(span).addmm_(common[span[0] : span[1]], inside.T, alpha=-1)

        return Made(self.shape, make)

    def solve(self) -> None:
        """Orthonormal directions, all with the mean of the singular values."""
        first = self.lefts.shape[1] - self.common
        chosen = [*range(self.filled), *range(first, first + self.shared)]
        left, right, values = self.lefts, self.rights, self.values
        if len(chosen) < left.shape[1]:
            left, right, values = left[:, chosen], right[:, chosen], values[chosen]
        self.lefts = self.rights = self.values = self.like
        frames = (
            nearest(left, "polar", self.route, self.rtol),
            nearest(right, "polar", self.route, self.rtol),
        )
        self.lost += len(chosen) - min(frame.rank for frame in frames)
        self.frames = tuple(Frame(self.like, None, frame.rank, frame.ratio, frame.repeated) for frame in frames)
        mean = float(values.mean()) if len(chosen) else 0.0
        self.left, self.right = recombine(frames[0], values.new_full((len(chosen),), mean), frames[1])
