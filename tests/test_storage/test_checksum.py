"""crc32c, and the checksum of two pieces from those of each."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.storage.checksum import crc32c, joined


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_the_checksum_of_two_pieces(first: bytes, second: bytes) -> None:
    crcs = [google_crc32c.value(piece) for piece in (first, second)]
    assert joined(*crcs, len(second)) == google_crc32c.value(first + second)


@pytest.mark.parametrize("nbytes", [1, 4096, 2**20 - 1, 2**23, 2**23 + 8])
def test_long_pieces(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).integers(0, 256, nbytes + 77, np.uint8)
    assert joined(crc32c(data[:77]), crc32c(data[77:]), nbytes) == crc32c(data)


def test_pieces_longer_than_any_memory() -> None:
    """Zeros after a checksum multiply it: twice as many, twice."""
    half = joined(0x12345678, 0, 2**40 + 5)
    assert joined(half, 0, 2**40 + 5) == joined(0x12345678, 0, 2**41 + 10)
