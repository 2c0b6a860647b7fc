"""Pieces on their way to the disk: all are written, nobody waits needlessly, memory is bounded, failures are told."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mergepipe.storage.outgoing import U8, WRITING_THREADS, Outgoing
from mergepipe.storage.writer import PAGE

PLACES = WRITING_THREADS + 2


@pytest.fixture
def errors() -> list[BaseException]:
    return []


@pytest.fixture
def outgoing(errors: list[BaseException]) -> Iterator[Outgoing]:
    outgoing = Outgoing(PLACES, errors.append)
    yield outgoing
    outgoing.close()


def test_everything_is_written_as_it_was_filled(outgoing: Outgoing) -> None:
    sizes = [1, PAGE, 3 * PAGE + 5, 17, 2 * PAGE]
    written: dict[int, bytes] = {}

    def fill(number: int) -> None:
        nbytes = sizes[number % len(sizes)]
        at = number * 8 % PAGE

        def write(data: U8) -> None:
            assert data.ctypes.data % PAGE == at, "it lies in memory as it will lie in the file"
            written[number] = data.tobytes()

        with outgoing.piece(number, nbytes, at, write) as data:
            assert data.shape == (nbytes,)
            data[:] = number

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(fill, range(200)))
    outgoing.drain()
    assert written == {number: bytes([number]) * sizes[number % len(sizes)] for number in range(200)}


def test_whoever_fills_does_not_wait_for_the_disk(outgoing: Outgoing, errors: list[BaseException]) -> None:
    disk = threading.Event()
    for number in range(PLACES):
        with outgoing.piece(number, 10, 0, lambda data: assert_waited(disk)):
            pass
    disk.set()
    outgoing.drain()
    assert not errors, "a write that keeps the thread that fills waits for the disk in vain"


def test_there_are_no_more_pieces_than_places(outgoing: Outgoing, errors: list[BaseException]) -> None:
    disk, filled = threading.Event(), threading.Semaphore(0)
    places = set()

    def fill(number: int) -> None:
        with outgoing.piece("weight", PAGE, 0, lambda data: assert_waited(disk)) as data:
            places.add(data.ctypes.data)
        filled.release()

    with ThreadPoolExecutor(1) as pool:
        done = pool.map(fill, range(3 * PLACES))
        for _ in range(PLACES):
            assert filled.acquire(timeout=10)
        assert not filled.acquire(timeout=0.05), "one too many"
        disk.set()
        list(done)
    outgoing.drain()
    assert len(places) <= PLACES
    assert not errors


def test_done_comes_after_the_last_write(outgoing: Outgoing, errors: list[BaseException]) -> None:
    disk, log = threading.Event(), list[str]()

    def write(data: U8) -> None:
        assert_waited(disk)
        log.append("written")

    for _ in range(3):
        with outgoing.piece("weight", 10, 0, write):
            pass
    outgoing.when_written("weight", lambda: log.append("done"))
    outgoing.when_written("bias", lambda: log.append("nothing to write"))
    assert log == ["nothing to write"]
    disk.set()
    outgoing.drain()
    assert log == ["nothing to write", "written", "written", "written", "done"]
    assert not errors


def test_a_block_that_fails_writes_nothing(outgoing: Outgoing, errors: list[BaseException]) -> None:
    for _ in range(2 * PLACES):
        with pytest.raises(ValueError, match="no result"), outgoing.piece("weight", 10, 0, errors.append):  # type: ignore[arg-type]
            raise ValueError("no result")
    outgoing.drain()
    assert not errors


def test_a_write_that_fails_is_told_and_is_never_done(outgoing: Outgoing, errors: list[BaseException]) -> None:
    log: list[str] = []

    def write(data: U8) -> None:
        if data[0] == 1:
            raise OSError("no room")

    for owner in range(3):
        for _ in range(PLACES):
            with outgoing.piece(owner, 10, 0, write) as data:
                data[:] = owner
        outgoing.when_written(owner, lambda owner=owner: log.append(str(owner)))  # type: ignore[misc]
    outgoing.drain()
    assert sorted(log) == ["0", "2"]
    assert [str(error) for error in errors] == ["no room"] * PLACES, "places of failed writes are used again"


def test_what_fails_when_all_is_written_is_told(outgoing: Outgoing, errors: list[BaseException]) -> None:
    def fail() -> None:
        raise OSError("cannot seal")

    with outgoing.piece("weight", 10, 0, lambda data: None):
        pass
    outgoing.when_written("weight", fail)
    outgoing.drain()
    assert [str(error) for error in errors] == ["cannot seal"]


def test_closing_writes_what_was_filled() -> None:
    written: list[int] = []
    outgoing = Outgoing(PLACES, written.append)  # type: ignore[arg-type]
    for number in range(PLACES):
        with outgoing.piece("weight", 10, 0, lambda data: written.append(int(np.sum(data, dtype=np.int64)))) as data:
            data[:] = number
    outgoing.close()
    assert sorted(written) == [10 * number for number in range(PLACES)]


def assert_waited(disk: threading.Event) -> None:
    assert disk.wait(10)
