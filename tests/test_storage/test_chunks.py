"""The chunk grid, against its definition."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergepipe.storage.chunks import MIB, chunk_lengths, chunk_shape, grid_shape
from mergepipe.storage.manifest import is_contiguous_grid

shapes = st.lists(st.integers(0, 40), max_size=4).map(tuple)
itemsizes = st.sampled_from([1, 2, 4, 8])
targets = st.integers(1, 4000)


@given(shapes, itemsizes, targets)
@example((3, 5003), 2, 2048)
@example((1009,), 2, 2048)
@example((), 8, 1)
@example((5, 0, 3), 4, 16)
def test_every_grid(shape: tuple[int, ...], itemsize: int, target: int) -> None:
    chunks = chunk_shape(shape, itemsize, target)
    assert is_contiguous_grid(shape, chunks)
    assert all(1 <= chunk <= max(size, 1) for chunk, size in zip(chunks, shape, strict=True))
    lengths = chunk_lengths(shape, chunks)
    assert sum(lengths) == math.prod(shape)
    assert len(lengths) == math.prod(grid_shape(shape, chunks))
    if 0 not in shape:
        assert math.prod(chunks) * itemsize <= max(target, itemsize)
        assert all(0 < length <= math.prod(chunks) for length in lengths)


@given(shapes, itemsizes, targets)
def test_chunks_are_runs_of_the_flat_tensor_in_order(shape: tuple[int, ...], itemsize: int, target: int) -> None:
    chunks = chunk_shape(shape, itemsize, target)
    flat = np.arange(math.prod(shape)).reshape(shape)
    start = 0
    for index, length in zip(np.ndindex(*grid_shape(shape, chunks)), chunk_lengths(shape, chunks), strict=True):
        part = flat[tuple(slice(i * chunk, (i + 1) * chunk) for i, chunk in zip(index, chunks, strict=True))]
        assert part.ravel().tolist() == list(range(start, start + length))
        start += length


@pytest.mark.parametrize(
    ("shape", "itemsize", "expected"),
    [
        ((4096, 4096), 2, (1024, 4096)),  # a divisor that fits exactly
        ((128256, 4096), 2, (1002, 4096)),  # a divisor close to the target: no padding
        ((32003, 4096), 2, (1024, 4096)),  # prime: the last chunk is padded
        ((4, 8 * MIB), 2, (1, 4 * MIB)),  # a row wider than a chunk is cut within
        ((10_000_000,), 4, (2_000_000,)),
        ((64, 2048, 768), 2, (2, 2048, 768)),  # a stack of small experts: full rows of the first dimension
        ((3, 14336, 4096), 2, (1, 1024, 4096)),  # of large ones: rows within one expert
        ((7,), 2, (7,)),
        ((), 2, ()),
        ((0, 5), 2, (1, 5)),
    ],
)
def test_examples(shape: tuple[int, ...], itemsize: int, expected: tuple[int, ...]) -> None:
    assert chunk_shape(shape, itemsize) == expected


def test_padding_only_where_the_divisors_are_bad() -> None:
    # 4 rows fit; 3 is the best divisor of 3 * 11 and makes three quarters of the target: no padding.
    assert chunk_shape((33, 100), 1, 400) == (3, 100)
    # 20 rows fit; the best divisor of 2 * 37 is 2, a tenth of the target: padded.
    assert chunk_shape((74, 100), 1, 2000) == (20, 100)


@pytest.mark.parametrize("shape", [(2**62, 0), (2**61 - 1,), (1, 2**61 - 1), (2**31 - 1, 2**31 - 1)])
def test_huge_dimensions_take_no_time(shape: tuple[int, ...]) -> None:
    started = time.perf_counter()
    chunk_shape(shape, 1, MIB)
    assert time.perf_counter() - started < 2
