"""Random masks that depend on nothing but what they are for: Philox-4x32-10, keyed by seed, model and tensor.

Element i of a tensor takes word ``i % 4`` of counter ``i // 4``, so that a mask is the same however the tensor is cut
and in whatever order its pieces are worked on.

References
----------
Salmon et al. 2011, Parallel Random Numbers: As Easy as 1, 2, 3, doi:10.1145/2063384.2063405.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array

ROUNDS = 10

STRIP = 1024
"""Words drawn at once: they stay in the first-level cache."""


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


@inlined
def _block(counter: Any, key: Any) -> Any:
    """The four words of one 64-bit counter."""
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    a, b, c, d = counter & low, counter >> half, np.uint64(0), np.uint64(0)
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
    for j in range(out.size // 4):
        drawn = _block(first + np.uint64(j), own)
        out[np.uintp(4 * j)] = drawn[0]
        out[np.uintp(4 * j + 1)] = drawn[1]
        out[np.uintp(4 * j + 2)] = drawn[2]
        out[np.uintp(4 * j + 3)] = drawn[3]


@kernel
def words(key: Any, start: int, out: Array) -> None:
    """The words of elements `start` to ``start + n`` under `key`, into `out`, uint32, shape (n,)."""
    strip = np.empty(STRIP, np.uint32)
    for begin in range(start // 4 * 4, start + out.size, STRIP):
        _blocks(begin // 4, key, strip)
        low, high = max(begin, start), min(begin + STRIP, start + out.size)
        out[low - start : high - start] = strip[low - begin : high - begin]


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
        0 to 2**32: the kept fraction times 2**32.
    """
    zero, strip = values.dtype.type(0), np.empty(STRIP, np.uint32)
    for begin in range(start // 4 * 4, start + values.size, STRIP):
        _blocks(begin // 4, key, strip)
        low, high = max(begin, start), min(begin + STRIP, start + values.size)
        kept, drawn = values[low - start : high - start], strip[low - begin : high - begin]
        for i in range(kept.size):
            kept[i] = kept[i] if np.int64(drawn[i]) < limit else zero
