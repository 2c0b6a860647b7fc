"""Row divergences and scores through torch: for a GPU, to the bit what :mod:`mergepipe.tasks.rows` finds on the CPU.

Every number is made of single additions, multiplications, comparisons and shifts in float64, each a torch operation of
its own, to which IEEE 754 leaves no freedom; the exponentials are the same polynomials, sums run over the same 64 lanes
in the same order, and the logarithms, one per row, are taken on the CPU from those sums. So a mask does not depend on
where it was made. The tests compare bits wherever there is a GPU; still work is never handed from one device to
another in the middle (:mod:`mergepipe.pipeline.devices`).

Blocks are staged in pinned memory that is used again and again, sent over, measured a batch at a time, and only a few
numbers per row and a histogram come back, or what lies in a window: :class:`Scorer`. Rows are whole within a block;
those of wider tensors are the CPU's.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from mergepipe.tasks import exponentials, points, row_sums, rows
from mergepipe.tasks.kernels import LANES
from mergepipe.tasks.method import Array
from mergepipe.tasks.score_lists import pack_rows
from mergepipe.tasks.squares import SQUARES, grid_of

if TYPE_CHECKING:
    import torch

STAGED_BYTES = 32 * 1024 * 1024
"""Of a lane's staging memory, unless a single block takes more."""

LANE_COUNT = 3
"""Batches in flight: some are staged while others are measured."""

PART_ELEMENTS = 1 << 22
"""Elements of a batch at the most. On the device it takes about a hundred bytes for each: 0.4 GiB for each lane."""


def grow(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`mergepipe.tasks.exponentials.grow`, for a float64 tensor."""
    import torch

    shifted = x * exponentials.LOG2E
    shifted += exponentials.ROUND
    whole = shifted - exponentials.ROUND
    r = x - whole * exponentials.LN2_HIGH
    r -= whole.mul_(exponentials.LN2_LOW)
    power = ((shifted.view(torch.int64) + 1023) << 52).view(torch.float64)
    square = r * r
    even, odd = (square * exponentials.SECOND[at] + exponentials.SECOND[at - 2] for at in (8, 9))
    for at in (4, 2, 0):
        even = even.mul_(square).add_(exponentials.SECOND[at])
        odd = odd.mul_(square).add_(exponentials.SECOND[at + 1])
    even += odd.mul_(r)
    return power, r, even.mul_(square)


def exp(x: torch.Tensor) -> torch.Tensor:
    """As :func:`mergepipe.tasks.exponentials.exp`, for a float64 tensor."""
    power, r, q = grow(x)
    r += q
    r *= power
    r += power
    return r


def small_expm1(x: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """As :func:`mergepipe.tasks.exponentials.small_expm1`."""
    terms = exponentials.SMALL
    even, odd = square * terms[4] + terms[2], square * terms[3] + terms[1]
    even = even.mul_(square).add_(terms[0])
    even += odd.mul_(x)
    h = even.mul_(square).add_(x * 0.03125)
    for _ in range(5):
        h *= h + 2.0
    return h


def raised(x: torch.Tensor) -> torch.Tensor:
    """As :func:`mergepipe.tasks.exponentials.raised`."""
    y = x * exponentials.RAISED[-1]
    for constant in exponentials.RAISED[-2:0:-1]:
        y += constant
        y *= x
    y += exponentials.RAISED[0]
    for _ in range(7):
        y *= y
    return y


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

    width = a.shape[1]
    found, squares = np.empty((len(a), rows.STATISTICS)), np.empty(len(a))
    reach, distance = (values.abs().amax(1).to(torch.float32).cpu().numpy().astype(float) for values in (a, b - a))
    kinds = _kinds(distance)
    kinds[~(reach <= row_sums.HEAVIEST)] = row_sums.DISTANT
    left = kinds == row_sums.DISTANT
    for kind in (row_sums.CLOSE, row_sums.LOOSE, row_sums.NEAR, row_sums.FAR):
        at = np.flatnonzero(kinds == kind)
        if at.size:
            sums = _sums(kind, _chosen(a, at), _chosen(b, at), reach[at], np.zeros(at.size), np.zeros(at.size))
            settled, own = np.empty(at.size, bool), np.empty((at.size, rows.STATISTICS))
            rows.finish_rows_once(sums, kinds[at], width, reverse, forward, own, settled)
            found[at], squares[at], left[at] = own, sums[:, -1], ~settled
    if left.any():
        at = np.flatnonzero(left)
        found[at], squares[at] = _measure_twice(_chosen(a, at), _chosen(b, at), reverse, forward)
    return found, squares


def _chosen(values: torch.Tensor, at: Array) -> torch.Tensor:
    """The rows that `at` lists; most often it is all."""
    import torch

    return values if len(at) == len(values) else values[torch.from_numpy(at).to(values.device)]


def _kinds(distance: Array) -> Array:
    """What rows are measured as, by their largest difference; what is not a number is distant."""
    most = (row_sums.CLOSE_DELTA, row_sums.LOOSE_DELTA, row_sums.NEAR_DELTA, row_sums.FAR_DELTA)
    return np.searchsorted(most, distance)


def _sums(kind: int, a: torch.Tensor, b: torch.Tensor, reach: Array, level: Array, shift: Array) -> Array:
    """What :func:`mergepipe.tasks.row_sums.add_up` finds for rows of a kind."""
    import torch

    width = a.shape[1]
    a, b = (torch.nn.functional.pad(values, (0, -width % LANES)) for values in (a, b))
    x, d = a.to(torch.float64), (b - a).to(torch.float64)
    weight = _weights(x, reach, level)
    weight[:, width:] = 0.0
    if kind in (row_sums.CLOSE, row_sums.LOOSE):
        square = d * d
        fourth = square * square
        first, second = weight * d, weight * square
        third = first * square
        terms = [weight, first, second, third]
        for term in range(row_sums.sums_of(kind) - 1 - len(terms)):
            terms.append(terms[term] * fourth)
        return _stacked([*terms, square], width)
    off = torch.from_numpy(shift).to(x.device)[:, None]
    if kind == row_sums.DISTANT:
        other = exp((x + d - off).clamp_(min=-exponentials.LIMIT))
        other[:, width:] = 0.0
    else:
        d -= off
        other = small_expm1(d, d * d) if kind == row_sums.NEAR else raised(d)
        other *= weight
    return _stacked([weight, weight * d, other, other * d, d, d * d], width)


def _weights(x: torch.Tensor, reach: Array, level: Array) -> torch.Tensor:
    import torch

    scale, rounds = np.ones_like(reach), np.zeros(len(reach), int)
    for _ in range(4):
        beyond = reach * scale > 1.0
        scale[beyond] *= 0.25
        rounds += beyond
    y = x * torch.from_numpy(scale).to(x.device)[:, None]
    weight = y * exponentials.ROOT[-1]
    for constant in exponentials.ROOT[-2:0:-1]:
        weight += constant
        weight *= y
    weight += exponentials.ROOT[0]
    for _ in range(4):
        weight *= weight
    for number in range(rounds.max(initial=0)):
        which = torch.from_numpy(rounds > number).to(x.device)
        square = weight[which] * weight[which]
        weight[which] = square * square
    beyond = ~(reach <= row_sums.HEAVIEST)
    if beyond.any():
        which = torch.from_numpy(beyond).to(x.device)
        off = torch.from_numpy(level[beyond]).to(x.device)[:, None]
        weight[which] = exp((x[which] - off).clamp_(min=-exponentials.LIMIT))
    return weight


def _stacked(terms: list[torch.Tensor], width: int) -> Array:
    import torch

    found: Array = torch.stack([stride_sums(term, width) for term in terms], 1).cpu().numpy()
    return found


def stride_sums(terms: torch.Tensor, width: int) -> torch.Tensor:
    """Sums along the last axis, of rows of a width that are filled up to whole lanes, in the order of the kernels.

    Four by four, stride by stride, and the lanes half on half in the end.
    """
    import torch

    whole = width // row_sums.STRIDE * row_sums.STRIDE
    # A sum that begins with a positive zero is never a negative one.
    lanes = torch.zeros(len(terms), LANES, dtype=terms.dtype, device=terms.device)
    for piece, quarter in ((terms[:, :whole], LANES), (terms[:, whole:], LANES // 4)):
        strides = piece.reshape(len(terms), -1, 4, quarter)
        fours = (strides[:, :, 0] + strides[:, :, 1]) + (strides[:, :, 2] + strides[:, :, 3])
        for number in range(fours.shape[1]):
            lanes[:, :quarter] += fours[:, number]
    half = LANES // 2
    while half:
        lanes = lanes[:, :half] + lanes[:, half : 2 * half]
        half //= 2
    return lanes[:, 0]


def _measure_twice(a: torch.Tensor, b: torch.Tensor, reverse: float, forward: float) -> tuple[Array, Array]:
    """The same of rows whose extremes have to be known first."""
    import torch

    width = a.shape[1]
    d = b - a
    padded = torch.nn.functional.pad(d, (0, -width % LANES)).to(torch.float64)
    extremes = torch.stack([
        a.amax(1), b.amax(1), stride_sums(padded, width), d.amin(1), d.amax(1), a.abs().amax(1),
        stride_sums(padded * padded, width),
    ], 1).to(torch.float64).cpu().numpy()  # fmt: skip
    with np.errstate(invalid="ignore"):
        mean = extremes[:, 2] / width
        kinds = _kinds(np.maximum(extremes[:, 4] - mean, mean - extremes[:, 3]))
    kinds = np.maximum(kinds, row_sums.NEAR)
    level = np.where(extremes[:, 5] > row_sums.HEAVIEST, extremes[:, 0], 0.0)
    sums = np.empty((len(a), row_sums.SUMS))
    for kind in np.unique(kinds).tolist():
        at = np.flatnonzero(kinds == kind)
        shift = extremes[:, 1] if kind == row_sums.DISTANT else mean
        sums[at] = _sums(kind, _chosen(a, at), _chosen(b, at), extremes[at, 5], level[at], shift[at])
    found = np.empty((len(a), rows.STATISTICS))
    rows.finish_rows(extremes, sums[:, None], width, reverse, forward, found)
    return found, extremes[:, -1].copy()


def score_delta(a: torch.Tensor, b: torch.Tensor, kl: torch.Tensor, always: bool) -> torch.Tensor:
    """As :func:`mergepipe.tasks.scores.score_delta`; `kl`, float64, shape (rows,), are the divergences."""
    import torch

    factor = torch.where(kl == 0.0, torch.ones_like(kl), kl) if always else kl
    scores = (b - a).abs().to(torch.float64) * factor[:, None]
    # The difference of a row without divergence may be infinite.
    return torch.where(factor[:, None] == 0.0, torch.zeros_like(scores), scores).to(a.dtype)


def score_points(
    a: torch.Tensor, b: torch.Tensor, found: torch.Tensor, reverse: float, forward: float, always: bool
) -> torch.Tensor:
    """As :func:`mergepipe.tasks.points.score_points`; `found`, float64, shape (rows, 3), are the statistics."""
    import torch

    difference = b - a
    largest = torch.maximum(a.abs(), difference.abs()).amax(1).to(torch.float32)
    within = largest <= points.LARGEST
    scores = torch.empty_like(a)
    for which, measure in ((within, _points), (~within, _huge_points)):
        if bool(which.any()):
            scores[which] = measure(a[which], difference[which], found[which], reverse, forward).to(a.dtype)
    still = difference.abs() if always else torch.zeros_like(difference)
    return torch.where(found[:, :1] == 0.0, still, scores)


def _points(a: torch.Tensor, d: torch.Tensor, found: torch.Tensor, reverse: float, forward: float) -> torch.Tensor:
    """Of rows without huge numbers."""
    import torch

    r = d.to(torch.float64) - found[:, 2:3]
    p = exp(a.to(torch.float64) - found[:, 1:2])
    power, rest, q = grow(r)
    growth = power * (rest + q) + (power - 1.0)
    small = reverse * (r * r + (r - 1.0) * q) + forward * q
    large = (reverse * (growth * (r - 1.0) + r) + forward * (growth - r)).clamp_(min=0.0)
    return p * torch.where(power == 1.0, small, large)


def _huge_points(a: torch.Tensor, d: torch.Tensor, found: torch.Tensor, reverse: float, forward: float) -> torch.Tensor:
    """Of others."""
    import torch

    limit = exponentials.LIMIT
    r, log_p = d.to(torch.float64) - found[:, 2:3], a.to(torch.float64) - found[:, 1:2]
    p, other = exp(log_p.clamp(min=-limit)), exp((log_p + r).clamp(min=-limit))
    power, _, q = grow(r.clamp(-limit, limit))
    small = p * (reverse * (r * r + (r - 1.0) * q) + forward * q)
    large = (reverse * (other * r - other + p) + forward * (other - p - p * r)).clamp_(min=0.0)
    return torch.where(power == 1.0, small, large)


def count_top(scores: torch.Tensor, counts: Array) -> None:
    """As :func:`mergepipe.tasks.select.count_top`: add to `counts`, int64, shape (bins,)."""
    import torch

    wide = scores.dtype == torch.float64
    keys = scores.reshape(-1).view(torch.int64 if wide else torch.int32)
    tops = (keys & (2**63 - 1 if wide else 2**31 - 1)) >> (48 if wide else 16)
    counts += torch.bincount(tops, minlength=len(counts)).cpu().numpy()


def _squares_where(above: torch.Tensor, deltas: torch.Tensor, divergences: Array) -> Array:
    """As :func:`mergepipe.tasks.squares.squares_above` of rows: int64, shape (SQUARES,)."""
    import torch

    values, squares = deltas * deltas, np.zeros(SQUARES, np.int64)
    grids = [grid_of(divergence) for divergence in divergences]
    places, bits = (np.array([grid[part] for grid in grids], np.int64) for part in (0, 2))
    rounding, most = (
        torch.tensor([[grid[part]] for grid in grids], dtype=torch.float64, device=values.device) for part in (1, 3)
    )
    by_row = above & (deltas.abs() < most)
    counted = (values + rounding).view(torch.int64) - torch.from_numpy(bits).to(values.device)[:, None]
    counted = torch.where(by_row, counted, 0)
    for shift, part in ((0, counted & 0x3FFFFFFF), (30, counted >> 30)):
        np.add.at(squares, places + shift, part.sum(dim=1).cpu().numpy())
    rounded = (values[above & ~by_row].view(torch.int64) + (1 << 21)) >> 22
    exponents = rounded >> 30
    found = torch.zeros(SQUARES, dtype=torch.int64, device=values.device)
    found.scatter_add_(0, exponents, (rounded & 0x3FFFFFFF) | ((exponents > 0).to(torch.int64) << 30))
    squares += found.cpu().numpy()
    return squares


def list_scores(
    primary: torch.Tensor, donor: torch.Tensor, scores: torch.Tensor, divergences: Array, low: int, high: int,
    tally: Array, where: Array,
) -> Array:  # fmt: skip
    """As :func:`mergepipe.tasks.score_lists.list_row`, of blocks of whole rows, float32, shape (rows, width).

    Parameters
    ----------
    primary, donor, scores : torch.Tensor
    divergences : float64 ndarray, shape (rows,)
    low, high : int
    tally : int64 ndarray, shape (2, SQUARES)
        Added to.
    where : float64 ndarray, shape (blocks, 2 * rows of a block + 1)
        Gets what `list_row` says of each row and, in the last place, where the block begins in what is returned.

    Returns
    -------
    float32 ndarray
        The list.
    """
    import torch

    keys = scores.view(torch.int32)
    inside, above = (keys >= low) & (keys < high), keys >= high
    tally[0, :2] += int((keys < low).sum()), int(inside.sum())
    deltas = donor - primary
    tally[1] += _squares_where(above, deltas.to(torch.float64), divergences)
    listed, each = deltas[inside].abs().cpu().numpy(), inside.sum(dim=1).cpu().numpy()
    blocks, most = len(where), where.shape[1] // 2
    rows_listed, packed = np.empty((2, len(each))), np.zeros((2, blocks * most))
    size = pack_rows(listed, each, rows_listed)
    packed[:, : len(each)] = rows_listed
    packed = packed.reshape(2, blocks, most)
    where[:, :most], where[:, most:-1] = packed
    sizes = (packed[0] + 2 * packed[1]).sum(axis=1)
    where[:, -1] = np.cumsum(sizes) - sizes
    found: Array = listed[:size]
    return found


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
