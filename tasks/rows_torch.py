"""Row divergences and scores through torch: for a GPU, to the bit what :mod:`mergepipe.tasks.rows` finds on the CPU.

Every number is made of single additions, multiplications, comparisons and shifts in float64, each a torch operation of
its own, to which IEEE 754 leaves no freedom; the exponentials are the same polynomials, sums run over the same 64 lanes
in the same order, and the logarithms, one per row, are taken on the CPU from those sums. So a mask does not depend on
where it was made. The tests compare bits wherever there is a GPU; still work is never handed from one device to
another in the middle (:mod:`mergepipe.pipeline.devices`).

Blocks are staged in pinned memory that is used again and again, sent over, measured a batch at a time, and only a few
numbers per row and a histogram come back: :class:`Scorer`. Rows are whole within a block; those of wider tensors are
the CPU's.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from mergepipe.tasks import rows
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array

if TYPE_CHECKING:
    import torch

STAGED_BYTES = 32 * 1024 * 1024
"""Of a lane's staging memory, unless a single block takes more."""

LANE_COUNT = 3
"""Batches in flight: some are staged while others are measured."""

PART_ELEMENTS = 1 << 22
"""Elements of a batch at the most. On the device it takes about a hundred bytes for each: 0.4 GiB for each lane."""


def expm1(x: torch.Tensor) -> torch.Tensor:
    """exp(x) - 1 for a float64 tensor, which is not kept: bit for bit that of :mod:`mergepipe.tasks.rows`."""
    import torch

    x = x.clamp(-rows._LIMIT, rows._LIMIT)
    shifted = x * rows._LOG2E
    shifted += rows._ROUND
    whole = shifted - rows._ROUND
    r = x - whole * rows._LN2_HIGH
    r -= whole.mul_(rows._LN2_LOW)
    tail = r * (1 / 6227020800.0)
    tail += 1 / 479001600.0
    for constant in (39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0):
        tail *= r
        tail += 1 / constant
    tail *= r
    tail += 0.5
    tail *= r * r
    tail += r
    power = ((shifted.view(torch.int64) + 1023) << 52).view(torch.float64)
    tail *= power
    power -= 1.0
    tail += power
    return tail


def lane_sums(terms: torch.Tensor) -> torch.Tensor:
    """Sums along the last axis of float64 terms, in the order of the kernels: 64 lanes, then lane after lane."""
    width = terms.shape[-1]
    steps = -(-width // LANES)
    lanes = terms[..., :LANES].clone()
    for step in range(1, steps):
        piece = terms[..., step * LANES : (step + 1) * LANES]
        lanes[..., : piece.shape[-1]] += piece
    total = lanes[..., 0].clone()
    for lane in range(1, lanes.shape[-1]):
        total += lanes[..., lane]
    # A sum that begins with a positive zero is never a negative one.
    total += 0.0
    return total


def measure_rows(a: torch.Tensor, b: torch.Tensor, reverse: float, forward: float) -> tuple[Array, Array]:
    """The statistics of rows, as :func:`mergepipe.tasks.rows.measure_rows` finds them.

    Parameters
    ----------
    a, b : tensor, shape (rows, width)
        Primary and donor, in the working type.
    reverse, forward : float
        Weights of the two directions.

    Returns
    -------
    found : float64 ndarray, shape (rows, 3)
        :data:`mergepipe.tasks.rows.STATISTICS`.
    squares : float64 ndarray, shape (rows,)
        Sums of squares of the differences.
    """
    import torch

    found, squares = np.empty((len(a), rows.STATISTICS)), np.empty(len(a))
    left = np.ones(len(a), bool)
    if rows.measured_close(a.element_size(), a.shape[1]):
        close = (a.abs().amax(1) <= rows.CLOSE_WEIGHT) & ((b - a).abs().amax(1) <= rows.CLOSE_DELTA)
        which = close.cpu().numpy()
        if which.any():
            moments = _moments(a[close], b[close]).cpu().numpy()
            settled, own = np.empty(len(moments), bool), np.empty((len(moments), rows.STATISTICS))
            rows.finish_close_rows(moments, reverse, forward, own, settled)
            at = np.flatnonzero(which)[settled]
            found[at], squares[at], left[at] = own[settled], moments[settled, -1], False
    if left.any():
        # Most often it is none of them or all.
        rest = slice(None) if left.all() else torch.from_numpy(left).to(a.device)
        found[left], squares[left] = _measure_others(a[rest], b[rest], reverse, forward)
    return found, squares


def _moments(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """:data:`mergepipe.tasks.rows.MOMENTS` of close rows."""
    import torch

    spare = -a.shape[1] % rows.STRIDE
    a, b = (torch.nn.functional.pad(values, (0, spare)) for values in (a, b))
    x, d = a.to(torch.float64), (b - a).to(torch.float64)
    weight = x * rows._ROOT[-1]
    for constant in rows._ROOT[-2:0:-1]:
        weight += constant
        weight *= x
    weight += rows._ROOT[0]
    for _ in range(4):
        weight *= weight
    square = d * d
    fourth = square * square
    first, second = weight * d, weight * square
    third = first * square
    raised = (term * fourth for term in (weight, first, second, third))
    terms = (weight, first, second, third, *raised, d, square)
    sums = torch.stack([_stride_sums(term) for term in terms], 1)
    sums[:, 0] -= spare
    return sums


def _stride_sums(terms: torch.Tensor) -> torch.Tensor:
    """Sums along the last axis in the order of moments: four by four, stride by stride, and lanes half on half."""
    strides = terms.reshape(len(terms), -1, 4, LANES)
    fours = (strides[:, :, 0] + strides[:, :, 1]) + (strides[:, :, 2] + strides[:, :, 3])
    # A sum that begins with a positive zero is never a negative one.
    lanes = fours[:, 0] + 0.0
    for number in range(1, fours.shape[1]):
        lanes += fours[:, number]
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]


def _measure_others(a: torch.Tensor, b: torch.Tensor, reverse: float, forward: float) -> tuple[Array, Array]:
    """The same of rows that are not close."""
    import torch

    width = a.shape[1]
    x = a.to(torch.float64)
    d = (b - a).to(torch.float64)
    moved = x + d
    extremes = torch.stack([
        x.amax(1), moved.amax(1), lane_sums(d), d.amin(1), d.amax(1), lane_sums(d * d),
    ], 1)  # fmt: skip
    mean = extremes[:, 2] / width
    far = torch.maximum(extremes[:, 4] - mean, mean - extremes[:, 3]) > rows.FAR
    sums = torch.empty(len(x), rows.SUMS, dtype=torch.float64, device=x.device)
    near = ~far
    if bool(far.any()):
        sums[near] = _near(x[near], d[near], extremes[near])
        sums[far] = _far(x[far], moved[far], d[far], extremes[far])
    else:
        sums = _near(x, d, extremes)
    measured = extremes.cpu().numpy()
    found = np.empty((len(x), rows.STATISTICS))
    rows.finish_rows(measured, sums.cpu().numpy()[:, None], width, reverse, forward, found)
    return found, measured[:, 5].copy()


def _near(x: torch.Tensor, d: torch.Tensor, extremes: torch.Tensor) -> torch.Tensor:
    import torch

    e = d - (extremes[:, 2] / d.shape[1])[:, None]
    weight = expm1(x - extremes[:, 0, None])
    weight += 1.0
    growth = expm1(e)
    sums = [lane_sums(weight), lane_sums(weight * growth)]
    growth += 1.0
    growth *= weight
    growth *= e
    sums.append(lane_sums(growth))
    weight *= e
    sums.append(lane_sums(weight))
    return torch.stack(sums, 1)


def _far(x: torch.Tensor, moved: torch.Tensor, d: torch.Tensor, extremes: torch.Tensor) -> torch.Tensor:
    import torch

    weight = expm1(x - extremes[:, 0, None])
    weight += 1.0
    other = expm1(moved - extremes[:, 1, None])
    other += 1.0
    sums = [lane_sums(weight), lane_sums(other)]
    other *= d
    sums.append(lane_sums(other))
    weight *= d
    sums.append(lane_sums(weight))
    return torch.stack(sums, 1)


def score_delta(a: torch.Tensor, b: torch.Tensor, kl: torch.Tensor, always: bool) -> torch.Tensor:
    """As :func:`mergepipe.tasks.rows.score_delta`; `kl`, float64, shape (rows,), are the divergences."""
    import torch

    factor = torch.where(kl == 0.0, torch.ones_like(kl), kl) if always else kl
    scores = (b - a).abs().to(torch.float64) * factor[:, None]
    # The difference of a row without divergence may be infinite.
    return torch.where(factor[:, None] == 0.0, torch.zeros_like(scores), scores).to(a.dtype)


def score_points(
    a: torch.Tensor, b: torch.Tensor, found: torch.Tensor, reverse: float, forward: float, always: bool
) -> torch.Tensor:
    """As :func:`mergepipe.tasks.rows.score_points`; `found`, float64, shape (rows, 3), are the statistics."""
    import torch

    kl, normaliser, moved = found[:, :1], found[:, 1:2], found[:, 2:3]
    difference = b - a
    r = difference.to(torch.float64) - moved
    log_p = a.to(torch.float64) - normaliser
    p = expm1(log_p)
    p += 1.0
    q = expm1(log_p + r)
    q += 1.0
    series = torch.zeros_like(r)
    for term in rows._series(reverse, forward).tolist():
        series *= r
        series += term
    near = p * (r * r * series)
    far = (reverse * (q * r - q + p) + forward * (q - p - p * r)).clamp_(min=0.0)
    scores = torch.where(r.abs() <= rows.SERIES, near, far).to(a.dtype)
    still = difference.abs() if always else torch.zeros_like(difference)
    return torch.where(kl == 0.0, still, scores)


def count_top(scores: torch.Tensor, counts: Array) -> None:
    """As :func:`mergepipe.tasks.select.count_top`: add to `counts`, int64, shape (bins,)."""
    import torch

    wide = scores.dtype == torch.float64
    keys = scores.reshape(-1).view(torch.int64 if wide else torch.int32)
    tops = (keys & (2**63 - 1 if wide else 2**31 - 1)) >> (48 if wide else 16)
    counts += torch.bincount(tops, minlength=len(counts)).cpu().numpy()


class Lane:
    """Staging memory for one batch, and the stream that it is sent and measured on.

    Attributes
    ----------
    staged : ndarray, shape (tensors, capacity)
        Primary and donors of some blocks, one after the other; in the working type.
    """

    def __init__(self, device: str, nbytes: int) -> None:
        import torch

        self.device = device
        on_gpu = device.startswith("cuda")
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def stage(self, tensors: int, elements: int, work: np.dtype[Any]) -> Array:
        """Room for `elements` of each of some tensors; undefined contents."""
        flat: Array = self._bytes.numpy()[: tensors * elements * work.itemsize].view(work)
        return flat.reshape(tensors, elements)

    def send(self, values: Array) -> torch.Tensor:
        """Values of the staging memory, on the device."""
        import torch

        return torch.from_numpy(values).to(self.device, non_blocking=True)

    def working(self) -> AbstractContextManager[object]:
        """Everything that is asked of the device inside the block goes to this lane's stream."""
        import torch

        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


class Scorer:
    """A device that measures rows for several threads, a few batches at a time.

    Parameters
    ----------
    device : str
        As torch names it.
    nbytes : int
        Staging memory of a lane, from :func:`lane_bytes`.
    """

    def __init__(self, device: str, nbytes: int) -> None:
        self.device = device
        self._free: queue.SimpleQueue[Lane] = queue.SimpleQueue()
        for _ in range(LANE_COUNT):
            self._free.put(Lane(device, nbytes))

    @contextmanager
    def lane(self) -> Iterator[Lane]:
        """Wait for a lane, and give it back."""
        lane = self._free.get()
        try:
            with lane.working():
                yield lane
        finally:
            self._free.put(lane)


def lane_bytes(tensors: int, block: int, itemsize: int) -> int:
    """Staging memory for batches of a tensor of `block` elements to the block; a batch is one block at least.

    Examples
    --------
    >>> lane_bytes(2, 65536, 4) == STAGED_BYTES, lane_bytes(200, 65536, 4) == 200 * 65536 * 4
    (True, True)
    """
    return max(STAGED_BYTES, tensors * block * itemsize)


def batch_blocks(tensors: int, block: int, itemsize: int) -> int:
    """Blocks of a batch.

    Examples
    --------
    >>> batch_blocks(2, 65536, 4), batch_blocks(200, 65536, 4)
    (64, 1)
    """
    return max(1, min(STAGED_BYTES // itemsize // tensors, PART_ELEMENTS) // max(1, block))


def block_energies(squares: Array, per_block: int) -> Array:
    """Sums of squares of blocks from those of their rows, added up one row after another."""
    found = np.empty(math.ceil(len(squares) / per_block))
    for number in range(len(found)):
        found[number] = np.cumsum(squares[number * per_block : (number + 1) * per_block])[-1]
    return found
