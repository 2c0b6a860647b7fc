"""SVC after a method that knows nothing of matrices: its merged update is factored whole and calibrated.

The kernel of the method makes the update panel by panel, as often as it is read; what comes out is calibrated against
the task vectors as they are (:mod:`mergepipe.tasks.subspace.calibrate`), and `lambda` scales the result. Tensors that
are no matrices, and all where `svc` is not set, go the method's own way.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mergepipe.tasks.method import Job, WholeMatrix
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.subspace.calibrate import calibrated
from mergepipe.tasks.subspace.declare import SVC, matrix_shape
from mergepipe.tasks.subspace.factor import Factors
from mergepipe.tasks.subspace.panels import Sources, panel_floats
from mergepipe.tasks.subspace.route import factor_floats, route
from mergepipe.tasks.subspace.solver import HELD_PANELS, LowRank

SVC_EXCLUDE = Parameter(
    "svc_exclude", "patterns", "matrices that `svc` leaves as they are", default=("embed_tokens", "lm_head")
)
PARAMETERS = (SVC, SVC_EXCLUDE)
"""What a method declares that lets its update be calibrated."""

SVD, RTOL = "exact", 1e-10


def is_calibrated(job: Job) -> bool:
    """Whether the update of this tensor is to be calibrated."""
    asked = job.params["svc"] is not None and len(job.shape) == 2 and job.size > 0
    return asked and not any(re.search(pattern, job.name) for pattern in job.params["svc_exclude"])


def steps(job: Job) -> tuple[str, ...]:
    """The update is factored once."""
    return ("factor", "calibrate")


def peak(job: Job) -> int:
    """float64 values held at the peak."""
    shape = matrix_shape(job)
    side = min(shape)
    factoring = factor_floats(shape, side, route(shape, SVD))
    # Both factors; of one task vector its part along each direction, the squares of that, and their product.
    calibrating = sum(shape) * side + 4 * max(shape) * side
    return max(factoring, calibrating) + (HELD_PANELS + 1) * panel_floats(shape)


def start(job: Job, sources: Sources, device: str) -> Calibrated:
    """A solver that has done nothing yet."""
    return Calibrated(replace(job, params={"svd": SVD, "rtol": RTOL, **job.params}), sources, device)


class Calibrated(LowRank):
    """Solver of the post-step."""

    found: Factors

    def __init__(self, job: Job, sources: Sources, device: str) -> None:
        super().__init__(job, sources, device)
        assert sources.merged is not None, "asked for by the declaration"
        self.merged = sources.merged

    @property
    def factor_steps(self) -> int:
        """One, for the update."""
        return 1

    def factor(self, number: int) -> None:
        """Decompose the merged update; what it has no part in is no loss."""
        self.found = self.decompose(self.merged, min(self.shape), number)
        self.lost = 0

    def step(self, number: int) -> None:
        """Factor, or calibrate and scale."""
        if number < self.factor_steps:
            self.factor(number)
            return
        self.solve()
        self.left *= float(self.job.params["lambda"])
        self.sources = self.originals = ()

    def solve(self) -> None:
        """New singular values."""
        found, alpha = self.found, float(self.job.params["svc"])
        self.left, self.right = found.left, found.right
        if found.rank:
            self.left *= calibrated(found.left, found.values, found.right, self.originals, alpha)
        del self.found


CALIBRATED = WholeMatrix(is_calibrated, steps, start, peak, merges=True)
"""How such a method works on the matrices that are calibrated."""
