"""The difference of two checkpoints, tensor by tensor, read in small windows: what a fine-tune changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from mergepipe.pipeline.weights import Weights
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.readers import Reader
from mergepipe.tasks.method import Array
from mergepipe.tasks.subspace.panels import Made, Panels, Span

if TYPE_CHECKING:
    import torch

WINDOW = 1 << 18
"""Elements read at once."""

WINDOW_BYTES = 4 * 8 * WINDOW
"""What one thread takes for its windows at the most: both stored, both decoded."""


class Deltas:
    """Differences between two checkpoints that have the same tensors.

    Subtracted in float32, in float64 where either is F64.

    Parameters
    ----------
    base, other : Checkpoint
        Of an `InputModel`, what it stands for.
    reader : Reader
    check_stop : callable
        Raises if the work is to end; asked before each window.
    """

    def __init__(self, base: Checkpoint, other: Checkpoint, reader: Reader, check_stop: Callable[[], None]) -> None:
        self._checkpoints = (base, other)
        remedy = "repair the model, or leave the tensor out with --exclude"
        self._weights = tuple(Weights(one, reader, remedy) for one in (base, other))
        self._check_stop = check_stop

    def windows(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Array]:
        """Elements from `start` to `stop`, window by window; each array is the caller's until it asks for the next."""
        base, other = (checkpoint.tensors[name] for checkpoint in self._checkpoints)
        work = np.float64 if "F64" in (base.dtype, other.dtype) else np.float32
        last = prod(base.shape) if stop is None else stop
        below, values = (np.empty(min(WINDOW, last - start), work) for _ in range(2))
        for first in range(start, last, WINDOW):
            n = min(WINDOW, last - first)
            self._decode(0, name, first, below[:n], None)
            self._decode(1, name, first, values[:n], below[:n])
            yield values[:n]

    def values(self, name: str) -> Iterator[Array]:
        """All elements of the other checkpoint's own tensor, window by window."""
        entry = self._checkpoints[1].tensors[name]
        size = prod(entry.shape)
        out = np.empty(min(WINDOW, size), np.float64 if entry.dtype == "F64" else np.float32)
        for first in range(0, size, WINDOW):
            n = min(WINDOW, size - first)
            self._decode(1, name, first, out[:n], None)
            yield out[:n]

    def squared(self, name: str) -> float:
        """Sum of the squares of a difference; 0 only if the tensors are equal."""
        total = 0.0
        for window in self.windows(name):
            wide = window.astype(np.float64)
            total += float(wide @ wide)
        return total

    def panels(self, name: str, shape: tuple[int, int]) -> Panels:
        """A difference as a matrix of this shape, to be factored."""
        return Made(shape, partial(self._panel, name, shape[1]))

    def _panel(self, name: str, columns: int, span: Span) -> torch.Tensor:
        import torch

        panel = np.empty((span[1] - span[0]) * columns)
        filled = 0
        for window in self.windows(name, span[0] * columns, span[1] * columns):
            panel[filled : filled + window.size] = window
            filled += window.size
        return torch.from_numpy(panel.reshape(-1, columns))

    def release(self, name: str) -> None:
        """Let go of what was held to read a tensor of either."""
        for weights in self._weights:
            weights.release(name)

    def _decode(self, which: int, name: str, first: int, out: Array, base: Array | None) -> None:
        self._check_stop()
        self._weights[which].read(name, first, out, base)
