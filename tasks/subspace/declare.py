"""What the methods of this package declare alike: parameters, which tensors they take, and what the others get."""

from __future__ import annotations

import re

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.method import Array, Job, Reduction, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS

LAMBDA = Parameter("lambda", "number", "factor on the merged task vector", default=1.0)
RANK = Parameter(
    "rank", "rank", "components kept of each task vector: auto is the smaller side divided by the number of models",
    default="auto",
)  # fmt: skip
RANK_CAP = Parameter("rank_cap", "integer", "no more components than this", default=None, minimum=1)
SVD = Parameter(
    "svd", "choice",
    "exact: whole up to 4,194,304 elements, by Gram matrices beyond; full, gram: always so; randomized: seeded, where "
    "less than a quarter of all components is wanted",
    default="exact", choices=("exact", "full", "gram", "randomized"),
)  # fmt: skip
EXACT_SVD = Parameter(
    "svd", "choice", "exact: whole up to 4,194,304 elements, by Gram matrices beyond; full, gram: always so",
    default="exact", choices=("exact", "full", "gram"),
)  # fmt: skip
INCLUDE = Parameter("include", "patterns", "tensors to work on; if empty, all that are not excluded", default=())
EXCLUDE = Parameter(
    "exclude", "patterns", "tensors that are not worked on as matrices", default=("embed_tokens", "lm_head")
)
EXCLUDED_FROM = Parameter(
    "excluded_from", "choice", "what these take: the base and the mean of the task vectors, or the base alone",
    default="average", choices=("average", "base"),
)  # fmt: skip
SELECTION = (INCLUDE, EXCLUDE, EXCLUDED_FROM)
"""What a method declares that lets tensors be left out."""

SVC = Parameter(
    "svc", "number",
    "calibrate the merged singular values to the task vectors' shares in them, counting those below this as this; not "
    "set: no calibration",
    default=None, minimum=0, open_minimum=True,
)  # fmt: skip
RTOL = Parameter(
    "rtol", "number", "singular values of at most this share of the largest count as zero", default=1e-10,
    minimum=0, maximum=1, open_maximum=True,
)  # fmt: skip


def is_matrix(job: Job) -> bool:
    """Whether a tensor is worked on as a whole matrix: two dimensions, not empty, not excluded."""
    return len(job.shape) == 2 and job.size > 0 and not _excluded(job)


def _excluded(job: Job) -> bool:
    include = job.params.get("include", ())
    outside = bool(include) and not any(re.search(pattern, job.name) for pattern in include)
    return outside or any(re.search(pattern, job.name) for pattern in job.params["exclude"])


def matrix_shape(job: Job) -> tuple[int, int]:
    """Rows and columns of a job that :func:`is_matrix`."""
    rows, columns = job.shape
    return rows, columns


def reductions(job: Job) -> tuple[Reduction, ...]:
    """Those of the job's sparsifier."""
    return SPARSIFIERS[job.sparsify].reductions(job)


def add_mean(job: Job, state: State, tile: Tile, out: Array) -> None:
    """The kernel for all other tensors: base + lambda * mean of the thinned task vectors; or the base."""
    assert tile.base is not None
    if job.params["excluded_from"] == "base" and _excluded(job):
        out[:] = tile.base
        return
    thin(job, state, tile)
    weights = np.ones(job.models, job.work)
    kernels.sum_many(tile.values, weights, float(job.models), out)
    kernels.put_on_base(tile.base, float(job.params["lambda"]), out)


def thin(job: Job, state: State, tile: Tile) -> None:
    """Sparsify `tile.values` in place."""
    SPARSIFIERS[job.sparsify].mask(job, state, tile)
