"""Memory that is handed out and comes back."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from mergepipe.storage.recycled import LARGEST_BYTES, SMALLEST_BYTES, Recycled

SIZE = SMALLEST_BYTES


def test_a_view_keeps_the_memory_from_others() -> None:
    memory = Recycled()
    views: list[Callable[[np.ndarray], object]] = [
        lambda array: array[16:],
        lambda array: array.view(np.uint16).reshape(2, -1)[1:],
        lambda array: array.data,
        lambda array: np.frombuffer(array, np.float32),
    ]
    for view in views:
        kept = view(memory.array(SIZE))
        before = bytes(memoryview(kept).cast("B"))  # type: ignore[arg-type]
        other = memory.array(SIZE)
        other[:] = ~other
        assert bytes(memoryview(kept).cast("B")) == before  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, LARGEST_BYTES + 1])
def test_what_is_small_or_large_is_not_kept(size: int) -> None:
    memory = Recycled()
    for _ in range(3):
        assert memory.array(size).nbytes == size
    assert not memory._idle


def test_only_about_its_size_is_used_again() -> None:
    memory = Recycled()
    address = memory.array(4 * SIZE).ctypes.data
    assert memory.array(4 * SIZE + 1).ctypes.data != address
    small = memory.array(SIZE)
    assert not address <= small.ctypes.data < address + 4 * SIZE
    again = memory.array(2 * SIZE)
    assert (again.nbytes, again.ctypes.data) == (2 * SIZE, address)


def test_few_blocks_are_kept() -> None:
    memory = Recycled(kept=2)
    arrays = [memory.array(SIZE) for _ in range(5)]
    del arrays
    assert len(memory._idle) == 2


def test_threads_never_share() -> None:
    memory, wrong = Recycled(), []

    def work(number: int) -> None:
        for _ in range(200):
            array = memory.array(SIZE)
            array[:] = number
            if not (array == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
