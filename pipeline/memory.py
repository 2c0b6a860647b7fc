"""The memory model: one pure function says what a unit needs, and everything about the ceiling follows from it.

Four words: *allowed* is the ceiling the user gave, *reserved* what the interpreter and its libraries take before any
work, *projected* what the units in flight will take by this model, *measured* what the kernel counted. Only anonymous
memory counts: pages of mapped input files can be dropped at any time.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from mergepipe.errors import MemoryBudgetError, UsageError
from mergepipe.tasks.blocks import BLOCK_ELEMENTS

MIB = 1024 * 1024
RESERVED_BYTES = 256 * MIB
"""Interpreter, libraries, compiled kernels, what the allocator keeps and 32 MiB of output that waits to be hashed: at
most 213 MiB were measured in fresh processes beyond what units take and what waits (88 MiB before any work, 116 MiB
where the kernels had to be compiled)."""

TORCH_BYTES = 160 * MIB
"""What torch takes beside that, once imported and at work on one thread of each worker; measured and rounded up."""

CUDA_BYTES = 768 * MIB
"""What a CUDA context and its libraries take of this machine's own memory; generous, since drivers differ."""

DEFAULT_ALLOWED = 512 * MIB
"""Ceiling of element-wise methods where none is given."""

TENSORS_IN_FLIGHT = 2
"""Tensors worked on at once, so that one's last reduction does not leave workers idle."""

UNITS_BEHIND = 2
"""Units of output that wait for the disk beside those at work, so that no worker does."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str | int) -> int:
    """A number of bytes: 8589934592, "8GiB" (binary) or "5GB" (decimal); the B may be missing.

    Raises
    ------
    UsageError
        If it is no size above zero.

    Examples
    --------
    >>> parse_bytes("8GiB"), parse_bytes("5GB"), parse_bytes("100 MiB"), parse_bytes(4096)
    (8589934592, 5000000000, 104857600, 4096)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?\s*", str(text), re.IGNORECASE)
    value = int(float(match[1]) * _UNITS[(match[2] or "").lower()]) if match else 0
    if value <= 0:
        raise UsageError(f"'{text}' is no size: write a number of bytes such as 512MiB, 8GiB or 5GB")
    return value


@dataclass(frozen=True, slots=True)
class UnitShape:
    """What the memory of one unit depends on.

    Attributes
    ----------
    elements : int
        Elements of the tensor that the unit covers.
    inputs : int
        Tensors read at once: the models, and the base if there is one.
    input_itemsize, output_itemsize, work_itemsize : int
        Bytes per element as stored (the widest input), as written, and in the working type.
    scratch_rows : int
        Rows of working memory per tile, the method's and the sparsifier's.
    gathered : bool
        True if inputs are gathered into buffers rather than mapped.
    """

    elements: int
    inputs: int
    input_itemsize: int
    output_itemsize: int
    work_itemsize: int
    scratch_rows: int
    gathered: bool


def projected_bytes(unit: UnitShape) -> int:
    """Anonymous memory of one unit in flight: gathered inputs + output + tiles + scratch.

    Examples
    --------
    >>> unit = UnitShape(elements=4 * 2**20, inputs=4, input_itemsize=2, output_itemsize=2, work_itemsize=4,
    ...                  scratch_rows=2, gathered=False)
    >>> projected_bytes(unit) == 4 * 2**20 * 2 + (4 + 1 + 2) * 65536 * 4
    True
    """
    inputs = unit.elements * unit.inputs * unit.input_itemsize if unit.gathered else 0
    output = output_bytes(unit)
    tile = min(unit.elements, BLOCK_ELEMENTS)
    tiles = (unit.inputs + 1 + unit.scratch_rows) * tile * unit.work_itemsize
    return inputs + output + tiles


def output_bytes(unit: UnitShape) -> int:
    """Memory of what a unit makes, as it is written."""
    return unit.elements * unit.output_itemsize


@dataclass(frozen=True, slots=True)
class MatrixShape:
    """What the memory of a whole-matrix tensor depends on.

    Attributes
    ----------
    held : int
        float64 values of its solver at the peak: inputs as panels, factors and scratch.
    unit_elements : int
        Elements of a unit of its output.
    output_itemsize : int
        Bytes per element as written.
    unit_bytes : int
        What a worker takes to decode a unit and to reduce it.
    panel_bytes : int
        What a window onto a panel takes at the most; the steps of a tensor read one at a time.
    kept : int
        Bytes of accumulators of the reductions before it.
    """

    held: int
    unit_elements: int
    output_itemsize: int
    unit_bytes: int
    panel_bytes: int
    kept: int


def matrix_bytes(matrix: MatrixShape, workers: int) -> int:
    """Anonymous memory of one whole-matrix tensor in flight: solver + panel + accumulators + units at work and written.

    Examples
    --------
    >>> matrix = MatrixShape(held=10**8, unit_elements=10**6, output_itemsize=2, unit_bytes=10**6,
    ...                      panel_bytes=10**7, kept=0)
    >>> units = 2 * (10**6 * (8 + 2) + 10**6) + UNITS_BEHIND * 10**6 * 2
    >>> matrix_bytes(matrix, workers=2) == 8 * 10**8 + 10**7 + units
    True
    """
    output = matrix.unit_elements * matrix.output_itemsize
    units = workers * (matrix.unit_elements * 8 + output + matrix.unit_bytes) + UNITS_BEHIND * output
    return 8 * matrix.held + matrix.panel_bytes + matrix.kept + units


@dataclass(frozen=True, slots=True)
class TensorShape:
    """What the memory of one tensor's reductions depends on.

    Attributes
    ----------
    counts : int
        Integers counted by its largest sweep, per worker and once more for the sum.
    blocks : int
        float64 partials kept for all its blocks.
    held : int
        Bytes of what adjustments of its inputs need: scales of 8-bit weights, factors of adapters.
    listed : int
        float32 numbers that a sweep lists one by one, at the most; all tensors at work list no more together.
    """

    counts: int
    blocks: int
    held: int = 0
    listed: int = 0


def accumulator_bytes(tensor: TensorShape, workers: int) -> int:
    """Anonymous memory of one tensor's accumulators.

    Examples
    --------
    >>> accumulator_bytes(TensorShape(counts=3 * 32768, blocks=0), workers=2) == 3 * 3 * 32768 * 8
    True
    """
    return (workers + 1) * tensor.counts * 8 + tensor.blocks * 8


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A memory ceiling, and what is left of it for work."""

    allowed: int
    workers: int
    reserved: int = RESERVED_BYTES

    def blocks_per_unit(self, unit: UnitShape, tensor: TensorShape, wanted: int, block: int, what: str) -> int:
        """How many blocks a unit may have so that all workers stay under the ceiling; `wanted` blocks at most.

        Parameters
        ----------
        unit : UnitShape
            Of a unit of one block; its `elements` are ignored.
        tensor : TensorShape
        wanted : int
            Blocks that the chunk size asks for.
        block : int
            Elements of one block.
        what : str
            Name of the tensor, for the error.

        Raises
        ------
        MemoryBudgetError
            If not even one block fits; names the tensor and the smallest ceiling that would do.
        """
        kept = self.kept(tensor)
        blocks = max(1, wanted)
        while True:
            need = self.units_bytes(replace(unit, elements=blocks * block)) + kept
            if need <= self.allowed - self.reserved:
                return blocks
            if blocks == 1:
                smallest = -(-(need + self.reserved) // MIB)
                who, fewer = f"{self.workers} workers need", ", or use fewer --workers"
                if self.workers == 1:
                    who, fewer = "one worker needs", ""
                raise MemoryBudgetError(
                    f"'{what}' does not fit the memory ceiling: {who} {need / MIB:,.0f} MiB "
                    f"beside the {self.reserved / MIB:,.0f} MiB that the program itself takes, "
                    f"{self.allowed / MIB:,.0f} MiB are allowed; the smallest ceiling that would do is "
                    f"--memory {smallest}MiB{fewer}"
                )
            blocks = max(1, blocks // 2)

    def kept(self, tensor: TensorShape) -> int:
        """What tensors in flight keep while their units run; each worker may be at one with adjustments of its own."""
        accumulators = TENSORS_IN_FLIGHT * accumulator_bytes(tensor, self.workers)
        return accumulators + (self.workers + 1) * tensor.held + 4 * tensor.listed

    def units_bytes(self, unit: UnitShape) -> int:
        """What all workers' units of this shape take, and those that are made and not written yet."""
        return self.workers * projected_bytes(unit) + UNITS_BEHIND * output_bytes(unit)

    def smallest(self, unit: UnitShape, tensor: TensorShape, block: int) -> int:
        """Bytes that a tensor takes, beside what is reserved, when its units are single blocks."""
        kept = self.kept(tensor)
        return self.units_bytes(replace(unit, elements=block)) + kept

    def projected(self, unit: UnitShape, tensor: TensorShape) -> int:
        """Anonymous memory of the whole process at its peak, while units of this shape run."""
        kept = self.kept(tensor)
        return self.reserved + self.units_bytes(unit) + kept

    def pool_bytes(self, unit: UnitShape, tensor: TensorShape) -> int:
        """What a direct reader may take beside the units of this shape, `gathered` as they are: all that is left."""
        return self.allowed - self.projected(replace(unit, gathered=False), tensor)

    def streamed_bytes(self, unit: UnitShape) -> int:
        """What units of this shape take in a direct reader's pool: those at work, and one that is read ahead.

        Examples
        --------
        >>> unit = UnitShape(4 * 2**20, 4, 2, 0, 0, 0, gathered=True)
        >>> Ceiling(512 * MIB, workers=2).streamed_bytes(unit) // MIB
        96
        """
        return (self.workers + 1) * unit.inputs * unit.elements * unit.input_itemsize


def most_workers(wanted: int, has_room: Callable[[int], bool]) -> int:
    """The most workers, up to those that are wanted, that there is room for; one where there is room for none.

    Examples
    --------
    >>> most_workers(48, lambda workers: workers * 10 <= 256), most_workers(48, lambda workers: False)
    (25, 1)
    """
    if has_room(wanted):
        return wanted
    return max(1, bisect_left(range(1, wanted), True, key=lambda workers: not has_room(workers)))


def blocks_in(nbytes: int, itemsize: int, block: int) -> int:
    """Blocks that make up about `nbytes` bytes.

    Examples
    --------
    >>> blocks_in(8 * 2**20, 2, 65536)
    64
    """
    return max(1, math.ceil(nbytes / itemsize / block))
