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
def words(key: Any, start: int, out: Array) -> None:
    """The words of elements `start` to ``start + n`` under `key`, into `out`, uint32, shape (n,)."""
    for i in range(out.size):
        element = np.uint64(start + i)
        block = _block(element >> np.uint64(2), np.uint64(key))
        out[i] = block[element & np.uint64(3)]


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
    first = start // 4
    for counter in range(first, (start + values.size + 3) // 4):
        drawn = _block(np.uint64(counter), np.uint64(key))
        offset = counter * 4 - start
        for j in range(4):
            i = offset + j
            if 0 <= i < values.size and np.int64(drawn[j]) >= limit:
                values[i] = 0
