"""RobustMerge (CoPA-Merging): LoRA adapters merged into one, pair by pair.

Of each A and each B the `mask_ratio` largest magnitudes stay. Each row i of A then has a scale for each model,
``S_i = sum_j |A_ij| / sum_j |masked A_ij|``, and scales below the ``1 - att_ratio`` quantile of a pair are raised to
it. With masked factors A and B of T models,

    A = lambda * sum_t A_t        B = lambda * sum_t B_t S_t / sum_t S_t        (S over the columns of B)

and everything that is no pair, such as a bias or a head saved whole, is averaged.

The scales of a pair are found in A and used in B, so they are a round: all A are read before any B is made.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mergepipe.tasks import kernels
from mergepipe.tasks.blocks import BLOCK_ELEMENTS, block_bounds
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.kept_norms import KeptNorms
from mergepipe.tasks.method import (
    Accumulator,
    Array,
    Job,
    MergeMethod,
    Paper,
    Reduction,
    Round,
    Shared,
    State,
    Tile,
    values_left,
)
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.sparsify import SPARSIFIERS

_SIDE = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")


def side_of(name: str) -> str | None:
    """'A' or 'B' for a factor of a pair, None for anything else in an adapter.

    Examples
    --------
    >>> side_of("m.q_proj.lora_A.weight"), side_of("m.wte.lora_embedding_B"), side_of("m.q_proj.lora_B.bias")
    ('A', 'B', None)
    """
    found = _SIDE.search(name)
    return found[1] if found else None


def partner_of(name: str) -> str:
    """Name of the other factor.

    Examples
    --------
    >>> partner_of("m.q_proj.lora_B.weight"), partner_of("m.wte.lora_embedding_A")
    ('m.q_proj.lora_A.weight', 'm.wte.lora_embedding_B')
    """
    found = _SIDE.search(name)
    assert found is not None, "a factor of a pair"
    at = found.start(1)
    return name[:at] + ("B" if found[1] == "A" else "A") + name[at + 1 :]


def _masked(job: Job) -> Job:
    """The job as the trim sees it."""
    one = {"density": job.params["mask_ratio"], "tie_rule": "keep", "rescale": False}
    return replace(job, sparsify="magnitude", sparsify_params=(one,) * job.models)


def _thin(job: Job, state: State, tile: Tile) -> None:
    SPARSIFIERS["magnitude"].mask(_masked(job), state, tile)


@dataclass(frozen=True, slots=True)
class OfMask:
    """A sweep of the trim, which knows the job with the trim's parameters only."""

    inner: Reduction

    @property
    def name(self) -> str:
        """The sweep's own."""
        return self.inner.name

    def needed(self, job: Job, state: State) -> bool:
        """As for the trim."""
        return self.inner.needed(_masked(job), state)

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """As for the trim."""
        return self.inner.shapes(_masked(job))

    @property
    def reads(self) -> float:
        """As for the trim, but for a sample, which is of all blocks."""
        return getattr(self.inner, "reads", 1.0)

    def leaves(self, job: Job) -> int:
        """As for the trim."""
        return values_left((self.inner,), _masked(job))

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """As for the trim."""
        self.inner.update(_masked(job), state, accumulator, tile)

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """As for the trim."""
        return self.inner.combine(_masked(job), state, accumulator)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    if side_of(job.name) is None:
        return ()
    return tuple(OfMask(inner) for inner in SPARSIFIERS["magnitude"].reductions(_masked(job)))


def _own_reductions(job: Job) -> tuple[Reduction, ...]:
    """The mask's, and how much of each norm it keeps: adapters are small, a read more is soon done."""
    return (*_reductions(job), *((KeptNorms(_thin),) if side_of(job.name) else ()))


@kernel
def _sum_rows(values: Array, start: int, width: int, out: Array) -> None:
    """Magnitudes of each row added up: `values`, shape (models, n), begin at element `start`; `out` at its row."""
    first = start // width
    for k in range(values.shape[0]):
        row = values[k]
        for i in range(row.size):
            out[(start + i) // width - first, k] += abs(np.float64(row[i]))


@dataclass(frozen=True, slots=True)
class RowScales:
    """``_row_scales``: float64, shape (models, rows), of an A; nothing of other tensors."""

    name: str = "scales of rows"

    def needed(self, job: Job, state: State) -> bool:
        """For an A that has elements."""
        return side_of(job.name) == "A" and job.size > 0

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Sums of the rows that a block touches, before and after the mask."""
        if not self.needed(job, {}):
            return None, None
        width = job.size // job.shape[0]
        touched = min(job.shape[0], min(job.size, BLOCK_ELEMENTS) // width + 2)
        return None, (2, touched, job.models)

    def leaves(self, job: Job) -> int:
        """A scale per model and row of an A."""
        return job.models * job.shape[0] if side_of(job.name) == "A" else 0

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile."""
        assert accumulator.blocks is not None
        width = job.size // job.shape[0]
        _sum_rows(tile.values, tile.start, width, accumulator.blocks[tile.index, 0])
        _thin(job, state, tile)
        _sum_rows(tile.values, tile.start, width, accumulator.blocks[tile.index, 1])

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """Fold the rows in block order, divide, and raise the small ones."""
        assert accumulator.blocks is not None
        rows, width = job.shape[0], job.size // job.shape[0]
        sums = np.zeros((2, rows, job.models))
        for index, block in enumerate(accumulator.blocks):
            first = block_bounds(job.shape, index)[0] // width
            last = min(rows, first + block.shape[1])
            sums[:, first:last] += block[:, : last - first]
        scales = [row_scales(sums[0, :, k], sums[1, :, k], job.params["att_ratio"]) for k in range(job.models)]
        return {"_row_scales": np.stack(scales)}


def row_scales(before: Array, after: Array, att_ratio: float) -> Array:
    """Scales of the rows of one A, from the sums of its magnitudes before and after the mask, shape (rows,).

    A row of which nothing is left has no scale of its own and takes the bound.

    Examples
    --------
    >>> row_scales(np.array([2.0, 3.0, 4.0, 5.0, 6.0]), np.array([1.0, 1.0, 1.0, 1.0, 0.0]), 0.2).tolist()
    [4.0, 4.0, 4.0, 5.0, 4.0]
    """
    scales = np.divide(before, after, out=np.zeros(before.shape), where=after > 0)
    at = min(max(math.ceil((1 - att_ratio) * scales.size - 1e-9) - 1, 0), scales.size - 1)
    found: Array = np.maximum(scales, np.sort(scales)[at])
    return found


@dataclass(frozen=True, slots=True)
class PairScales:
    """``_scales``: float64, shape (models, columns), for each B: what its A has left of each row."""

    name: str = "scales of pairs"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """The mask's, then the sums of rows; nothing is read of tensors that are no A."""
        return (*(_reductions(job) if side_of(job.name) == "A" else ()), RowScales())

    def counts(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def values(self, job: Job, state: State) -> Array | None:
        """The scales of an A."""
        return state.get("_row_scales")

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """Hand the scales of each A to its B; shorter ones are padded, pairs may differ in rank."""
        found = {job.name: scales for job, scales in zip(jobs, values, strict=True) if scales is not None}
        longest = max((scales.shape[1] for scales in found.values()), default=1)
        each = np.zeros((len(jobs), jobs[0].models, longest))
        for position, job in enumerate(jobs):
            scales = found.get(partner_of(job.name)) if side_of(job.name) == "B" else None
            if scales is not None:
                each[position, :, : scales.shape[1]] = scales
        return Shared(each={"_scales": each})


def _rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    return (PairScales(),)


@kernel
def _weigh(values: Array, shares: Array, start: int, step: int, scale: float, out: Array) -> None:
    """In float64, rounded once; element e counts by `shares`, shape (models, columns), of column e // step."""
    columns = shares.shape[1]
    for i in range(out.size):
        column = ((start + i) // step) % columns
        total = 0.0
        for k in range(values.shape[0]):
            total += shares[k, column] * np.float64(values[k][i])
        out[i] = scale * total


def _apply(job: Job, state: State, tile: Tile, out: Array) -> None:
    side, scale = side_of(job.name), float(job.params["lambda"])
    if side is None:
        kernels.sum_many(tile.values, np.ones(job.models, job.work), float(job.models), out)
        return
    _thin(job, state, tile)
    shares = np.ones((job.models, 1))
    step = job.size
    if side == "B":
        scales = state["_scales"][:, : job.shape[1]]
        total = scales.sum(0)
        # Where no model has a scale, every A is zero there: a plain mean.
        shares = np.where(total > 0, scales / np.where(total > 0, total, 1), 1 / job.models)
        step = math.prod(job.shape[2:])
    _weigh(tile.values, np.ascontiguousarray(shares), tile.start, step, scale, out)


METHOD = MergeMethod(
    name="robustmerge",
    title="RobustMerge (CoPA-Merging)",
    summary="merges LoRA adapters into one: keeps the large factors and rescales directions that the mask weakened",
    base="ignored",
    space="weights",
    parameters=(
        Parameter(
            "mask_ratio", "number", "fraction of each A and B that is kept, the largest magnitudes", default=0.2,
            minimum=0, maximum=1, open_minimum=True,
        ),
        Parameter(
            "att_ratio", "number", "fraction of a pair's scales that stay above the bound which raises the others",
            default=0.2, minimum=0, maximum=1,
        ),
        Parameter("lambda", "number", "factor on A and on B", default=2.0),
    ),
    kernel=_apply,
    reductions=_own_reductions,
    rounds=_rounds,
    rounds_read=("mask_ratio", "att_ratio"),
    takes="adapters",
    paper=Paper(
        "RobustMerge: Parameter-Efficient Model Merging for MLLMs with Direction Robustness",
        "https://arxiv.org/abs/2502.17159",
    ),
)  # fmt: skip
