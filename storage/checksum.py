"""crc32c: of bytes in memory, and of two pieces from the checksums of each.

A unit of the output has a checksum of its own in the journal, and is part of those that the file has, whose pieces
begin and end elsewhere. The bytes are gone over once: checksums of the parts between all these places are put together
by arithmetic on polynomials, which does not look at the bytes.
"""

from __future__ import annotations

from functools import cache, lru_cache

import google_crc32c
import numpy as np
import numpy.typing as npt

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, its highest power in the lowest bit, as in the checksums themselves."""

_ONE = 1 << 31
"""The polynomial 1."""


def crc32c(data: npt.NDArray[np.uint8]) -> int:
    """Checksum of a contiguous array, without a copy.

    Examples
    --------
    >>> hex(crc32c(np.frombuffer(b"123456789", np.uint8)))
    '0xe3069283'
    """
    return int(google_crc32c.value(data))


def joined(first: int, second: int, nbytes: int) -> int:
    """Checksum of two pieces, one after the other, from those of each; the second is `nbytes` long.

    Examples
    --------
    >>> first, second = (crc32c(np.frombuffer(piece, np.uint8)) for piece in (b"1234", b"56789"))
    >>> hex(joined(first, second, 5))
    '0xe3069283'
    """
    return _product(_shift(nbytes), first) ^ second


@lru_cache(1024)
def _shift(nbytes: int) -> int:
    """What a checksum is multiplied by as so many zero bytes follow: x to the power of eight times their number."""
    shift = _ONE
    for bit, power in enumerate(_powers()):
        if nbytes >> bit & 1:
            shift = _product(power, shift)
    return shift


@cache
def _powers() -> list[int]:
    """What 1, 2, 4 and so on zero bytes multiply a checksum by, for as many as fit a file."""
    powers = [_ONE >> 8]
    while len(powers) < 63:
        powers.append(_product(powers[-1], powers[-1]))
    return powers


def _product(one: int, other: int) -> int:
    """Product of two polynomials, over Castagnoli's."""
    product, bit = 0, _ONE
    while one:
        if one & bit:
            product ^= other
            one ^= bit
        bit >>= 1
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product
