"""Coordinate fusion: score every element of a donor, and put the donor's value where the score is high enough.

What `scf_rkl` and `arcee_fusion` share. A *stage* fuses some donors into one primary: all of them at once where the
winner takes an element, one after another where donors are folded in, each into what the stages before it left. A
stage sweeps the tensor for the statistics of its rows (one sweep, fused with the first count; two and a count where a
row is wider than a block), then for the exact threshold of the scores, which are computed anew in each sweep and never
kept: :mod:`mergepipe.tasks.fusion_sweeps`. Where that would read a tensor once more, it guesses:
:mod:`mergepipe.tasks.fusion_guess`. With ``scope: model`` the threshold is that of all tensors together, from rounds
over the model. What later stages and the kernel need of a stage is its row statistics and its threshold.

The state: ``thresholds``, ``densities`` (fraction of elements taken of each donor), ``row_kl`` (mean divergence of the
rows) and ``kept_norms`` (norm of the differences taken over that of all), float64, shape (models,); and per stage,
which goes by its first donor, ``_rows_<first>``: float64, (donors, rows, 1 or 3), and ``_energy_<first>``, (donors,).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.tasks import kernels, points, rows, scores
from mergepipe.tasks.blocks import Blocks, block_bounds
from mergepipe.tasks.method import Array, Job, State, StoredKernel, Tile

SCRATCH_ROWS = 3
"""Scores, the primary as earlier stages left it, and the best score so far or differences."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The parameters of `scf_rkl`, which documents them, and what of them `arcee_fusion` fixes."""

    direction: str = "reverse"
    importance: str = "delta_kl"
    threshold: str = "quantile"
    quantile: float = 0.9
    scale: float = 1.0
    multi: str = "winner"
    tie_rule: str = "keep"
    zero_kl: str = "skip"
    scope: str = "tensor"

    @property
    def directions(self) -> tuple[float, float]:
        """Weights of the reverse and of the forward divergence."""
        return {"reverse": (1.0, 0.0), "forward": (0.0, 1.0), "sym": (0.5, 0.5)}[self.direction]

    @property
    def columns(self) -> int:
        """Statistics kept of a row."""
        return 1 if self.by_row else rows.STATISTICS

    @property
    def ranks(self) -> int:
        """Order statistics that the threshold is made of."""
        return 1 if self.threshold == "quantile" else 3

    @property
    def always(self) -> bool:
        """Whether rows without divergence have scores."""
        return self.zero_kl == "abs"

    @property
    def by_row(self) -> bool:
        """Whether a score is the difference times something of the row."""
        return self.importance == "delta_kl"

    def wanted(self, size: int) -> list[int]:
        """Their ascending ranks among `size` scores.

        Examples
        --------
        >>> Settings(quantile=0.5).wanted(12), Settings(threshold="iqr").wanted(12)
        ([6], [2, 5, 8])
        """
        if self.threshold == "quantile":
            return [min(size - 1, math.floor(self.quantile * size + 1e-6))]
        return [int(p * (size - 1)) for p in (0.25, 0.5, 0.75)]

    def never_takes(self, job: Job) -> bool:
        """Whether no element of the tensor is ever taken: rows of one element have no divergence."""
        return rows.row_width(job) == 1 and self.zero_kl == "skip"


@dataclass(frozen=True, slots=True)
class Stage:
    """Donors `first` to `stop` into what the donors before `first` left of the primary."""

    settings: Settings
    first: int
    stop: int

    @property
    def donors(self) -> range:
        """Their numbers."""
        return range(self.first, self.stop)

    @property
    def word(self) -> str:
        """For the names of its sweeps, from the second stage on."""
        return f" ({self.first + 1})" if self.first else ""

    @property
    def rows(self) -> str:
        """Name of its row statistics in the state."""
        return f"_rows_{self.first}"

    @property
    def selection(self) -> str:
        """Name of its selection."""
        return f"scores_{self.first}"

    @property
    def energy(self) -> str:
        """Name of the sums of squares of its differences in the state."""
        return f"_energy_{self.first}"


def stages(job: Job, settings: Settings) -> tuple[Stage, ...]:
    """One for all donors, or one for each."""
    if settings.multi == "winner":
        return (Stage(settings, 0, job.models),)
    return tuple(Stage(settings, k, k + 1) for k in range(job.models))


def score_rows(settings: Settings, primary: Array, donor: Array, width: int, found: Array, out: Array) -> None:
    """The scores of a donor's elements into `out`; `found` holds the statistics of their rows."""
    if settings.by_row:
        scores.score_delta(primary, donor, width, found, settings.always, out)
    else:
        points.score_points(primary, donor, width, found, *settings.directions, settings.always, out)


def score(stage: Stage, job: Job, state: State, tile: Tile, primary: Array, donor: int) -> Array:
    """The scores of a donor's elements, shape (n,), in the first row of the scratch."""
    which, width = rows.rows_of(job, tile.start, primary.size)
    found = state[stage.rows][donor - stage.first, which]
    score_rows(stage.settings, primary, tile.values[donor], width, found, tile.scratch[0])
    out: Array = tile.scratch[0]
    return out


def settled_score(stage: Stage, job: Job, state: State, tile: Tile, primary: Array, donor: int) -> Array:
    """The same, less the ties that lie too late to be taken."""
    own = score(stage, job, state, tile, primary, donor)
    before = state.get(f"_ties_{stage.first}")
    if before is not None:
        stay, seen = int(state["_stay"][donor]), before[tile.index : tile.index + 2, donor - stage.first]
        if 0 <= stay < seen[1]:
            kernels.drop_late_ties(own, float(state["thresholds"][donor]), max(0, stay - int(seen[0])))
    return own


def _fuse(stage: Stage, job: Job, state: State, tile: Tile, out: Array) -> None:
    """Put the donors of a finished stage into `out`, which holds the primary."""
    best = tile.scratch[2]
    best[:] = 0
    # Of several donors each moves the primary itself, not what an earlier one made of it.
    primary = out if len(stage.donors) == 1 else tile.base
    assert primary is not None
    for donor in stage.donors:
        own = settled_score(stage, job, state, tile, primary, donor)
        least = float(state["thresholds"][donor])
        scores.take(tile.values[donor], own, least, stage.settings.scale, best, primary, out)


def primary_of(stage: Stage, job: Job, state: State, tile: Tile) -> Array:
    """What a stage takes for the primary: the base, or in the scratch what the stages before it left of it."""
    assert tile.base is not None
    if stage.first == 0:
        return tile.base
    out: Array = tile.scratch[1]
    out[:] = tile.base
    for before in stages(job, stage.settings)[: stage.first]:
        _fuse(before, job, state, tile, out)
    return out


def statistics_of(stage: Stage, job: Job, state: State, blocks: Blocks) -> Array:
    """Row statistics of a run of blocks: float64, shape (donors, rows, 1 or 3)."""
    width = rows.row_width(job)
    first, stop = block_bounds(job.shape, blocks[0])[0] // width, block_bounds(job.shape, blocks[1] - 1)[1] // width
    found: Array = np.ascontiguousarray(state[stage.rows][:, first:stop])
    return found


def stored(settings: Settings, job: Job, state: State) -> StoredKernel | None:
    """The kernel from bits to bits, for one stage of rows that fit a block, with no tie left to break."""
    one, *others = stages(job, settings)
    if others or not settings.by_row or rows.is_wide(job) or settings.never_takes(job) or "_ties_0" in state:
        return None
    if job.models > scores.AT_ONCE:
        return None
    width, least = rows.row_width(job), scores.rounded_up(state["thresholds"])
    always, scale = settings.always, None if settings.scale == 1.0 else settings.scale

    def run(bits: Sequence[Array], out: Array, blocks: Blocks) -> bool:
        found = statistics_of(one, job, state, blocks)
        return scores.take_stored(bits[0], tuple(bits[1:]), width, found, always, least, scale, out)

    return run


def apply(settings: Settings, job: Job, state: State, tile: Tile, out: Array) -> None:
    """The kernel."""
    assert tile.base is not None
    out[:] = tile.base
    if not settings.never_takes(job):
        for stage in stages(job, settings):
            _fuse(stage, job, state, tile, out)
