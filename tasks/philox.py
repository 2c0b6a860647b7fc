"""Random masks that depend on nothing but what they are for: Philox-4x32-10, keyed by seed, model and tensor.

Element i of a tensor takes word ``i % 4`` of counter ``i // 4``, so that a mask is the same however the tensor is cut
and in whatever order its pieces are worked on. An element stays if its word is below a *limit*, the kept fraction times
2**32.

References
----------
Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mergepipe.tasks.blocks import Blocks, block_bounds, block_elements
from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array, Job, Tile

ROUNDS = 10

STRIP = 1024
"""Words drawn at once: they stay in the first-level cache. A power of two, so that all counters of a strip that begins
at a multiple of it have the same upper half."""

ALL = 2**32
"""The limit that every word is below."""

MOST = 8
"""Most models that marks have a bit for."""

BLOCKS_AT_ONCE = 2
"""Blocks that are marked before the marks are used: with what is made of them, they take less memory than tiles do."""


def mask_key(seed: int, position: int, name: str) -> int:
    """The 64-bit key of the mask of one model's tensor.

    The first 8 bytes, little-endian, of the SHA-256 of seed, `position` of the model among the models (0-based, the
    base not counted) and name of the tensor, joined by NUL.

    Examples
    --------
    >>> hex(mask_key(0, 1, "lm_head.weight"))
    '0xcf64bf74a1c44468'
    """
    text = "\0".join((str(seed), str(position), name))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


@dataclass(frozen=True, slots=True)
class Draw:
    """Which elements of a tensor stay, where chance alone decides.

    Attributes
    ----------
    keys : uint64 ndarray, shape (models,)
        From :func:`mask_key`.
    limits : int64 ndarray, shape (models,)
        0 to :data:`ALL`.
    """

    keys: Array
    limits: Array

    def drop(self, tile: Tile) -> None:
        """Zero what does not stay of `tile.values`, in place."""
        for row, key, limit in zip(tile.values, self.keys, self.limits, strict=True):
            if limit < ALL:
                drop_random(row, key, tile.start, limit)

    def marked(self, shape: tuple[int, ...], blocks: Blocks) -> Iterator[tuple[Blocks, slice, Array]]:
        """A unit a few blocks at a time.

        Yields
        ------
        blocks : (int, int)
            First block and one past the last.
        part : slice
            Their place in the unit.
        marks : uint8 ndarray
            As of :func:`mark`; valid until the next ones are asked for.
        """
        begin, step = block_bounds(shape, blocks[0])[0], block_elements(shape) * BLOCKS_AT_ONCE
        marks = np.empty(step, np.uint8)
        for first in range(*blocks, BLOCKS_AT_ONCE):
            after = min(first + BLOCKS_AT_ONCE, blocks[1])
            start, stop = block_bounds(shape, first)[0], block_bounds(shape, after - 1)[1]
            mark(self.keys, self.limits, start, marks[: stop - start])
            yield (first, after), slice(start - begin, stop - begin), marks[: stop - start]


def draw(job: Job, limits: Sequence[int] | Array, stream: str = "") -> Draw:
    """The draw for a tensor with a limit for each model; `stream` tells apart two draws for one tensor."""
    keys = [mask_key(job.seed, job.offset + k, job.name + stream) for k in range(job.models)]
    return Draw(np.array(keys, np.uint64), np.array(limits, np.int64))


@inlined
def _block(lower: Any, upper: Any, key: Any) -> Any:
    """The four words of one 64-bit counter, given as its halves."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = lower, upper, np.uint64(0), np.uint64(0)
    k, m = key & low, key >> half
    for _ in range(ROUNDS):
        left = a * np.uint64(0xD2511F53)
        right = c * np.uint64(0xCD9E8D57)
        a, b, c, d = (right >> half) ^ b ^ k, right & low, (left >> half) ^ d ^ m, left & low
        k = (k + np.uint64(0x9E3779B9)) & low
        m = (m + np.uint64(0xBB67AE85)) & low
    return a, b, c, d


@kernel
def _blocks(counter: int, key: Any, out: Array) -> None:
    """The words of counters from `counter` on, into `out`, uint32, shape (4 * k,): several counters side by side."""
    first, own = np.uint64(counter), np.uint64(key)
    lower, upper = first & np.uint64(0xFFFFFFFF), first >> np.uint64(32)
    for j in range(out.size // 4):
        drawn = _block(lower + np.uint64(j), upper, own)
        out[np.uintp(4 * j)] = drawn[0]
        out[np.uintp(4 * j + 1)] = drawn[1]
        out[np.uintp(4 * j + 2)] = drawn[2]
        out[np.uintp(4 * j + 3)] = drawn[3]


@kernel
def words(key: Any, start: int, out: Array) -> None:
    """The words of elements `start` to ``start + n`` under `key`, into `out`, uint32, shape (n,)."""
    strip = np.empty(STRIP, np.uint32)
    for begin in range(start // STRIP * STRIP, start + out.size, STRIP):
        _blocks(begin // 4, key, strip)
        low, high = max(begin, start), min(begin + STRIP, start + out.size)
        taken, drawn = out[low - start : high - start], strip[low - begin : high - begin]
        for i in range(taken.size):
            taken[i] = drawn[i]


@kernel
def _mark(counter: int, key: Any, limit: int, bit: int, out: Array) -> None:
    """Set a bit of the bytes of elements that stay: of counters from `counter` on, four bytes to a uint32 of `out`."""
    first, own, bound = np.uint64(counter), np.uint64(key), np.uint64(limit)
    lower, upper = first & np.uint64(0xFFFFFFFF), first >> np.uint64(32)
    none, one = np.uint64(0), np.uint64(1) << np.uint64(bit)
    two, three, four = one << np.uint64(8), one << np.uint64(16), one << np.uint64(24)
    for j in range(out.size):
        # A byte is made of a word where it is drawn: no words have to be brought in order.
        a, b, c, d = _block(lower + np.uint64(j), upper, own)
        left = (one if a < bound else none) | (two if b < bound else none)
        right = (three if c < bound else none) | (four if d < bound else none)
        out[j] |= np.uint32(left | right)


@kernel
def mark(keys: Array, limits: Array, start: int, out: Array) -> None:
    """Say for each element of a piece of a tensor which models keep it.

    Parameters
    ----------
    keys, limits
        As of :class:`Draw`, for up to :data:`MOST` models.
    start : int
        Flat index of the piece's first element in the tensor.
    out : uint8 ndarray, shape (n,)
        Overwritten: bit k is for model k.
    """
    strip = np.empty(STRIP // 4, np.uint32)
    marks = strip.view(np.uint8)
    always = np.uint32(0)
    for k in range(keys.size):
        if limits[k] >= ALL:
            always = np.uint32(always | (0x01010101 << k))
    for begin in range(start // STRIP * STRIP, start + out.size, STRIP):
        strip[:] = always
        for k in range(keys.size):
            if limits[k] < ALL:
                _mark(begin // 4, keys[k], limits[k], k, strip)
        low, high = max(begin, start), min(begin + STRIP, start + out.size)
        taken, drawn = out[low - start : high - start], marks[low - begin : high - begin]
        for i in range(taken.size):
            taken[i] = drawn[i]


@kernel
def drop_random(values: Array, key: Any, start: int, limit: int) -> None:
    """Zero the elements of `values`, shape (n,), whose word is not below `limit`. In place.

    Parameters
    ----------
    values : ndarray, shape (n,)
        A piece of a tensor.
    key : uint64
        From :func:`mask_key`.
    start : int
        Flat index of its first element in the tensor.
    limit : int
        0 to :data:`ALL`.
    """
    zero, strip = values.dtype.type(0), np.empty(STRIP // 4, np.uint32)
    marks = strip.view(np.uint8)
    for begin in range(start // STRIP * STRIP, start + values.size, STRIP):
        strip[:] = 0
        _mark(begin // 4, key, limit, 0, strip)
        low, high = max(begin, start), min(begin + STRIP, start + values.size)
        kept, stays = values[low - start : high - start], marks[low - begin : high - begin]
        for i in range(kept.size):
            kept[i] = kept[i] if stays[i] else zero
