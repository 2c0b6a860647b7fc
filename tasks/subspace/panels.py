"""Panels: a matrix as runs of whole rows, in float64, made when asked for and as often as asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mergepipe.tasks.blocks import BLOCK_ELEMENTS

if TYPE_CHECKING:
    import torch

PANEL_ELEMENTS = 1 << 22
"""About the elements of a panel that is factored: 32 MiB."""

UNIT_ELEMENTS = 1 << 20
"""About the elements of a panel of the output, the unit of work and of resuming."""

Span = tuple[int, int]


def spans(shape: tuple[int, int], elements: int = PANEL_ELEMENTS) -> list[Span]:
    """First row and one past the last of each panel: whole blocks, about `elements` elements, of the shape alone.

    Examples
    --------
    >>> spans((1000, 4096))
    [(0, 1000)]
    >>> spans((5000, 4096))[:2], spans((3, 10_000_000))
    ([(0, 1024), (1024, 2048)], [(0, 1), (1, 2), (2, 3)])
    """
    rows, columns = shape
    block = max(1, BLOCK_ELEMENTS // max(1, columns))
    step = max(1, elements // (block * max(1, columns))) * block
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def blocks_of(shape: tuple[int, int], span: Span) -> Span:
    """The blocks that hold the rows `span`, which starts and ends as :func:`spans` do.

    Examples
    --------
    >>> blocks_of((5000, 4096), (1024, 2048)), blocks_of((3, 100_000), (1, 2))
    ((64, 128), (2, 4))
    """
    columns = shape[1]
    if columns > BLOCK_ELEMENTS:
        pieces = -(-columns // BLOCK_ELEMENTS)
        return span[0] * pieces, span[1] * pieces
    block = BLOCK_ELEMENTS // max(1, columns)
    return span[0] // block, -(-span[1] // block)


def rows_of(shape: tuple[int, int], blocks: Span) -> Span:
    """The reverse of :func:`blocks_of`.

    Examples
    --------
    >>> rows_of((5000, 4096), (64, 128)), rows_of((3, 100_000), (2, 4))
    ((1024, 2048), (1, 2))
    """
    rows, columns = shape
    if columns > BLOCK_ELEMENTS:
        pieces = -(-columns // BLOCK_ELEMENTS)
        return blocks[0] // pieces, blocks[1] // pieces
    block = BLOCK_ELEMENTS // max(1, columns)
    return blocks[0] * block, min(blocks[1] * block, rows)


def panel_floats(shape: tuple[int, int], elements: int = PANEL_ELEMENTS) -> int:
    """Elements of the largest panel."""
    return max((last - first for first, last in spans(shape, elements)), default=0) * shape[1]


class Panels(Protocol):
    """A matrix that is read panel by panel."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    def panel(self, span: Span) -> torch.Tensor:
        """Rows `span` as float64, shape (rows, columns), on the device of the work; the caller's own."""


@dataclass(frozen=True, slots=True)
class Made:
    """Panels that a function makes."""

    shape: tuple[int, int]
    make: Callable[[Span], torch.Tensor]

    def panel(self, span: Span) -> torch.Tensor:
        """Make one."""
        return self.make(span)


@dataclass(frozen=True, slots=True)
class Sources:
    """What a solver can read, each as often as it likes; nothing is made before it is asked for.

    Attributes
    ----------
    thinned : tuple of Panels
        The task vectors after their sparsifier, in recipe order.
    plain : tuple of Panels
        The task vectors as they are.
    merged : Panels or None
        What the method's own kernel makes of the thinned ones, at `lambda` 1 and without the base; for a method that
        asks for it (:attr:`mergepipe.tasks.method.WholeMatrix.merges`).
    carried : Panels or None
        What an earlier merge carried over.
    """

    thinned: tuple[Panels, ...]
    plain: tuple[Panels, ...]
    merged: Panels | None = None
    carried: Panels | None = None


def total(parts: Sequence[Panels]) -> Panels:
    """The sum of matrices of one shape, added up in order."""

    def make(span: Span) -> torch.Tensor:
        result = parts[0].panel(span)
        for part in parts[1:]:
            result += part.panel(span)
        return result

    return Made(parts[0].shape, make)


def times(panels: Panels, right: torch.Tensor) -> torch.Tensor:
    """``matrix @ right`` for `right` of shape (columns, k): shape (rows, k)."""
    result = right.new_empty(panels.shape[0], right.shape[1])
    for first, last in spans(panels.shape):
        result[first:last] = panels.panel((first, last)) @ right
    return result


def transposed_times(panels: Panels, left: torch.Tensor) -> torch.Tensor:
    """``matrix.T @ left`` for `left` of shape (rows, k): shape (columns, k), panels added up in order."""
    result = left.new_zeros(panels.shape[1], left.shape[1])
    for first, last in spans(panels.shape):
        result.addmm_(panels.panel((first, last)).T, left[first:last])
    return result


def gram(panels: Panels, like: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of the smaller side, on the device of `like`: (rows, rows) if there are fewer rows than columns.

    Of a wide matrix pairs of panels are multiplied, each panel read once for every one after it, so that two are held.
    """
    rows, columns = panels.shape
    if columns <= rows:
        result = like.new_zeros(columns, columns)
        for span in spans(panels.shape):
            panel = panels.panel(span)
            result.addmm_(panel.T, panel)
        return result
    result = like.new_empty(rows, rows)
    for first, last in spans(panels.shape):
        panel = panels.panel((first, last))
        result[first:last, first:last] = panel @ panel.T
        for start, stop in spans(panels.shape):
            if stop <= first:
                block = panel @ panels.panel((start, stop)).T
                result[first:last, start:stop] = block
                result[start:stop, first:last] = block.T
    return result


def multiply_rows(matrix: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``matrix @ factor`` for a square `factor`, in the memory of `matrix`, panel by panel."""
    if matrix.shape[1]:
        for first, last in spans((matrix.shape[0], matrix.shape[1])):
            matrix[first:last] = matrix[first:last] @ factor
    return matrix
