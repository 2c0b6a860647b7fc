"""A stack of matrices thinned matrix by matrix: a 3-D tensor whose slices along the first axis count as tensors.

A block of the tensor may reach over the end of a slice, and a slice may hold many blocks. What a block and a slice have
in common is a *piece*; pieces are a function of the shape alone, as blocks are. A reduction of the sparsifier is made
for each slice as if it were a tensor whose blocks are its pieces (:class:`PerSlice`). The state of slice e has the
names of an ordinary one behind ``_slice<e>_``; ``_slices`` says how many there are. Memory for histograms grows with
the number of slices, which the planner counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from mergepipe.tasks.blocks import BLOCK_ELEMENTS, block_bounds
from mergepipe.tasks.blocks import block_elements as longest_block
from mergepipe.tasks.guess import SAMPLE
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, Tile, values_left

COUNT = "_slices"

NAME_VALUES = 40
"""What the names of the entries that a sweep leaves of a slice take, in numbers of 8 bytes."""

GIVEN = ("_keep_rates", "metric")
"""What rounds may have left for slices: in the state of the tensor behind ``_by_slice_``, with a row for each."""


@dataclass(frozen=True, slots=True)
class SliceJob(Job):
    """One slice as its sparsifier sees it; its blocks are its pieces."""

    pieces: int = 1

    @property
    def blocks(self) -> int:
        """Number of pieces."""
        return self.pieces


@dataclass(frozen=True, slots=True)
class Piece:
    """What a block and a slice have in common.

    Attributes
    ----------
    of : int
        Number of the slice.
    index : int
        Number of the piece in its slice.
    place : int
        Number of the slice among those of the block.
    start, stop : int
        First element of the block that is in it, and one past the last.
    """

    of: int
    index: int
    place: int
    start: int
    stop: int


def is_stack(job: Job) -> bool:
    """Whether a tensor has slices of its own to speak of."""
    return len(job.shape) == 3 and job.size > 0


def slice_job(job: Job) -> SliceJob:
    """Any slice of a stack: all are alike."""
    inner = {field.name: getattr(job, field.name) for field in fields(Job)} | {"shape": job.shape[1:]}
    size = job.size // job.shape[0]
    if job.shape[-1] > BLOCK_ELEMENTS:
        return SliceJob(**inner, pieces=job.shape[1] * -(-job.shape[2] // BLOCK_ELEMENTS))
    return SliceJob(**inner, pieces=(size - 1) // longest_block(job.shape) + 2)


def _first_block(job: Job, number: int) -> int:
    """The block that holds the first element of a slice."""
    if job.shape[-1] > BLOCK_ELEMENTS:
        return number * job.shape[1] * -(-job.shape[2] // BLOCK_ELEMENTS)
    return number * (job.size // job.shape[0]) // longest_block(job.shape)


def pieces(job: Job, block: int) -> Iterator[Piece]:
    """The pieces of a block, in order."""
    size = job.size // job.shape[0]
    start, stop = block_bounds(job.shape, block)
    first = start // size
    for number in range(first, (stop - 1) // size + 1):
        begin, end = max(start, number * size), min(stop, (number + 1) * size)
        yield Piece(number, block - _first_block(job, number), number - first, begin - start, end - start)


def most_slices(job: Job) -> int:
    """How many slices a block may touch."""
    size = job.size // job.shape[0]
    return 1 if job.shape[-1] > BLOCK_ELEMENTS else min(job.shape[0], (longest_block(job.shape) - 1) // size + 2)


def part(tile: Tile, piece: Piece) -> Tile:
    """The piece of a tile; `start` stays that in the whole tensor."""
    where = slice(piece.start, piece.stop)
    base = None if tile.base is None else tile.base[where]
    return Tile(piece.index, tile.start + piece.start, base, tile.values[:, where], tile.scratch[:, where])


def state_of(state: State, number: int) -> State:
    """The state of one slice."""
    prefix = f"_slice{number}_"
    given = {name: state["_by_slice_" + name][number] for name in GIVEN if "_by_slice_" + name in state}
    return given | {name: state[prefix + name] for name in _names(state) if prefix + name in state}


def _names(state: State) -> list[str]:
    """Names that the state of some slice has: those of the first, and of those that took another way."""
    return [str(name) for name in state["_slice_names"]] if "_slice_names" in state else []


@dataclass(frozen=True, slots=True)
class PerSlice:
    """A reduction of a sparsifier, made for each slice."""

    inner: Reduction

    @property
    def name(self) -> str:
        """The reduction's own, and that it goes by slice."""
        return f"{self.inner.name} by slice"

    def needed(self, job: Job, state: State) -> bool:
        """Whether a slice needs it."""
        one = slice_job(job)
        return any(self.inner.needed(one, state_of(state, number)) for number in range(job.shape[0]))

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Counts for each slice; a row for each slice that a block may touch."""
        counts, row = self.inner.shapes(slice_job(job))
        return (
            None if counts is None else (job.shape[0], *counts),
            None if row is None else (most_slices(job), *row),
        )

    @property
    def reads(self) -> float:
        """As of the reduction itself, but for a sample, which is of all blocks."""
        return getattr(self.inner, "reads", 1.0)

    def leaves(self, job: Job) -> int:
        """For each slice what the sweep leaves of a tensor, and the names it goes by."""
        return job.shape[0] * _left_of_one(self.inner, job)

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add the pieces of one tile."""
        one = slice_job(job)
        for piece in pieces(job, tile.index):
            own = state_of(state, piece.of)
            if not self.inner.needed(one, own):
                continue
            counts = None if accumulator.counts is None else accumulator.counts[piece.of]
            rows = None if accumulator.blocks is None else np.zeros((one.pieces, *accumulator.blocks.shape[2:]))
            self.inner.update(one, own, Accumulator(counts, rows), part(tile, piece))
            if accumulator.blocks is not None and rows is not None:
                accumulator.blocks[tile.index, piece.place] = rows[piece.index]

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """New entries for the state of each slice, and what they come to for the tensor."""
        one, found = slice_job(job), dict(state)
        for number in range(job.shape[0]):
            own = state_of(state, number)
            if not self.inner.needed(one, own):
                continue
            counts = None if accumulator.counts is None else accumulator.counts[number]
            rows = None if accumulator.blocks is None else _gathered(job, one, number, accumulator.blocks)
            new = self.inner.combine(one, own, Accumulator(counts, rows))
            new.pop(SAMPLE, None)  # one for each slice is too much: where a guess misses, the sure way follows
            if "_threshold_found" in new or "thresholds" in new:
                new["histogram"] = np.zeros(0)  # it has told all it knows, and is large
            found |= {f"_slice{number}_{name}": value for name, value in new.items()}
        return _summed_up(job, found)


def _left_of_one(inner: Reduction, job: Job) -> int:
    return NAME_VALUES + 4 * job.models + values_left((inner,), slice_job(job))


def _gathered(job: Job, one: SliceJob, number: int, blocks: Array) -> Array:
    """The rows of a slice's pieces."""
    rows = np.zeros((one.pieces, *blocks.shape[2:]))
    first = _first_block(job, number)
    for block in range(first, min(first + one.pieces, len(blocks))):
        for piece in pieces(job, block):
            if piece.of == number:
                rows[piece.index] = blocks[block, piece.place]
    return rows


def _summed_up(job: Job, state: State) -> State:
    """The same with ``densities``, ``metric`` and ``drop_rates`` as means over the slices, once all have them."""
    names = sorted({name.split("_", 2)[2] for name in state if name.startswith("_slice") and name[6].isdigit()})
    new = {**state, COUNT: np.array(job.shape[0]), "_slice_names": np.array(names)}
    for name in ("densities", "metric", "drop_rates"):
        rows = [state.get(f"_slice{number}_{name}") for number in range(job.shape[0])]
        whole = [row for row in rows if row is not None]
        if len(whole) == len(rows):
            new[name] = np.mean(whole, axis=0)
    return new
