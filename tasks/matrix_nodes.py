"""The nodes of a tensor that its method looks at as a whole: read by panels, solved in steps, written by rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergepipe.tasks.method import Array, MatrixSolver
from mergepipe.tasks.nodes import TensorWork
from mergepipe.tasks.subspace.declare import thin
from mergepipe.tasks.subspace.panels import Made, Sources, blocks_of, rows_of

if TYPE_CHECKING:
    import torch

TakePanel = Callable[[tuple[int, int], int, Array], None]
"""Fills an array with the elements of some blocks, the first of which begins at a given element."""


class MatrixWork(TensorWork):
    """A tensor whose method looks at the whole matrix: sweeps of its sparsifier, the solver's steps, then its rows.

    What the solver found goes with the state, but the solver itself is not kept: where a run goes on with some rows,
    the steps are taken again.

    Parameters
    ----------
    device : str
        Where the solver works, as torch names it.
    others
        As for :class:`TensorWork`; `units` are those of :func:`mergepipe.tasks.subspace.panels.spans`.
    """

    def __init__(self, *arguments: Any, device: str = "cpu", **options: Any) -> None:
        super().__init__(*arguments, **options)
        matrix = self.method.whole(self.job)
        assert matrix is not None, "the scheduler asks before"
        self._matrix = matrix
        self._shape = (self.job.shape[0], self.job.shape[1])
        self._device = device
        self._solver: MatrixSolver | None = None
        self._alone: dict[int, TensorWork] = {}
        self._panels: set[tuple[int, int]] = set()
        self.steps = matrix.steps(self.job) if self.units else ()

    def begin_sample(self) -> None:
        """Nothing to announce, either."""

    def begin(self) -> None:
        """Nothing to announce: panels are read as often as the solver asks for them."""

    def is_at_hand(self) -> bool:
        """Always: nothing is announced that could be on its way."""
        return True

    def end(self) -> None:
        """Let the solver's memory go, and what the reader kept for it."""
        self._solver = None
        for work in (self, *self._alone.values()):
            self._reader.forget(segments for blocks in self._panels for segments in work._segments(blocks))
        self._release()

    def take_step(self, number: int, *_after: object) -> None:
        """Take one step of the solver."""
        self._stop()
        if self._solver is None:
            self._solver = self._matrix.start(self.job, self._panels_of_all(), self._device)
        self._solver.step(number)
        if number == len(self.steps) - 1:
            self.state = {**self.state, **self._solver.findings()}
            if self._on_state is not None:
                self._on_state(self.state)
        self._report(self.steps[number], 0)

    def apply(self, unit: int, *_after: object) -> None:
        """Put some rows of the update on the base and write them."""
        self._stop()
        assert self._solver is not None, "steps come before"
        blocks = self.units[unit]
        start, stop = self._bounds(blocks)
        merged = self._buffers.get("rows", (stop - start,), np.float64)
        if self._matrix.onto_base:
            self._read_base(start, stop, merged)
        else:
            merged.fill(0)
        self._solver.add_update(rows_of(self._shape, blocks), merged.reshape(-1, self._shape[1]))
        with self._unit_of_output(start, stop, self._input_bytes(blocks)) as out:
            self._encode(merged, start, out)

    def _read_base(self, start: int, stop: int, out: Array) -> None:
        """Elements `start` to `stop` of the base, float64."""
        assert self.base is not None, "these methods need one"
        segments = self.base.manifest.segments(self.base.name, start, stop)
        with self._reader.window(segments, last=True) as window:
            self.base.decode(self._aligned(0, window), start, out)

    def _panels_of_all(self) -> Sources:
        """Everything that a solver may ask for."""

        def made(take: TakePanel) -> Made:
            return Made(self._shape, partial(self._panel, take))

        models = range(self.job.models)
        return Sources(
            thinned=tuple(made(partial(self._thinned, k)) for k in models),
            plain=tuple(made(partial(self._plain, k)) for k in models),
            merged=made(self._merged) if self._matrix.merges else None,
            carried=None if self.carried is None else made(self._carried),
        )

    def _panel(self, take: TakePanel, span: tuple[int, int]) -> torch.Tensor:
        """Rows `span` of what `take` reads, float64, on the device of the work."""
        import torch

        self._stop()
        blocks = blocks_of(self._shape, span)
        self._panels.add(blocks)
        start, stop = self._bounds(blocks)
        # What goes to another device goes in the working type, and is widened there.
        rows = np.empty(stop - start, np.float64 if self._device == "cpu" else self.job.work)
        take(blocks, start, rows)
        return torch.from_numpy(rows.reshape(-1, self._shape[1])).to(self._device).to(torch.float64)

    def _thinned(self, model: int, blocks: tuple[int, int], start: int, rows: Array) -> None:
        """The thinned task vector of one model: a sparsifier's mask takes all models at once."""
        if self.job.sparsify == "none":
            self._plain(model, blocks, start, rows)
            return
        for tile in self._tiles(blocks, last=not self._resident):
            thin(self.job, self.state, tile)
            rows[tile.start - start :][: tile.values.shape[1]] = tile.values[model]

    def _plain(self, model: int, blocks: tuple[int, int], start: int, rows: Array) -> None:
        """The task vector of one model, which alone is read."""
        for tile in self._single(model)._tiles(blocks, last=not self._resident):
            rows[tile.start - start :][: tile.values.shape[1]] = tile.values[0]

    def _merged(self, blocks: tuple[int, int], start: int, rows: Array) -> None:
        """What the method's kernel adds to the base at a `lambda` of 1."""
        job = replace(self.job, params={**self.job.params, "lambda": 1.0})
        out = self._buffers.get("merged", (self._longest(),), job.work)
        for tile in self._tiles(blocks, last=not self._resident):
            assert tile.base is not None, "these methods need one"
            tile.base.fill(0)
            n = tile.values.shape[1]
            self.method.kernel(job, self.state, tile, out[:n])
            rows[tile.start - start :][:n] = out[:n]

    def _carried(self, blocks: tuple[int, int], start: int, rows: Array) -> None:
        """What was carried over."""
        assert self.carried is not None, "asked before"
        segments = self.carried.manifest.segments(self.carried.name, start, start + rows.shape[0])
        with self._reader.window(segments, last=not self._resident) as window:
            stored = self._aligned(len(self.sources) - 1, window)
            self.carried.decode(stored, start, rows)

    def _single(self, model: int) -> TensorWork:
        """The same tensor as if only one model was merged."""
        if model not in self._alone:
            job = replace(self.job, models=1, model_params=self.job.model_params[model : model + 1])
            self._alone[model] = TensorWork(
                job, self.method, self.base, self.models[model : model + 1], self.out.name, (), self._reader,
                self._sink, self._buffers, self._stop, self._report, state={},
            )  # fmt: skip
        return self._alone[model]
