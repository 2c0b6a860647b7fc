"""Earlier bundles go first, so that files fill up from their beginning."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import mergepipe
from mergepipe.pipeline import graph
from mergepipe.pipeline.workers import Workers, always
from mergepipe.storage.digest import Digest, Held
from mergepipe.storage.writer import ShardWriter
from support.jobs import build_job, write_job

MIB = 1 << 20


def test_the_lowest_rank_goes_first() -> None:
    begun: list[str] = []
    gate = threading.Event()
    with Workers(1) as workers:
        blocked = workers.ranked(0).submit(gate.wait)
        later = [workers.ranked(7).submit(begun.append, f"late {n}") for n in range(3)]
        early = [workers.ranked(2).submit(begun.append, f"early {n}") for n in range(3)]
        gate.set()
        for future in (blocked, *later, *early):
            future.result(10)
    assert begun == ["early 0", "early 1", "early 2", "late 0", "late 1", "late 2"]


def test_a_later_bundle_waits_for_what_it_needs_while_an_earlier_one_is_at_work() -> None:
    at_hand = threading.Event()
    done: list[str] = []
    with Workers(1) as workers, ExitStack() as at_work:
        first = at_work.enter_context(workers.ranked(1))
        with workers.ranked(2, at_hand.is_set) as second, workers.ranked(3) as third:
            late = [second.submit(done.append, f"second {n}") for n in range(2)]
            third.submit(done.append, "third").result(10)
            first.submit(done.append, "first").result(10)
            assert done == ["third", "first"]
            at_hand.set()
            late[0].result(10)
            late[1].result(10)
            at_hand.clear()
            late.append(second.submit(done.append, "at its end"))
            time.sleep(0.02)
            assert not late[2].done()
            at_work.close()
            late[2].result(10)  # the second is the earliest now
    assert done == ["third", "first", "second 0", "second 1", "at its end"]


def test_a_look_that_fails_is_left_to_the_task() -> None:
    def at_hand() -> bool:
        raise OSError("no answer")

    with Workers(1) as workers, workers.ranked(1), workers.ranked(2, at_hand) as second:
        assert second.submit(divmod, 7, 2).result(10) == (3, 1)


def test_whoever_is_free_looks_again() -> None:
    """Of many that wait one looks; when that one has found something to do, another looks in its place."""
    at_hand, gate = [threading.Event(), threading.Event()], threading.Event()
    with Workers(3) as workers, ExitStack() as at_work:
        _, second, third = (
            at_work.enter_context(workers.ranked(rank, is_there))
            for rank, is_there in ((1, always), (2, at_hand[0].is_set), (3, at_hand[1].is_set))
        )
        blocked, last = second.submit(gate.wait, 10), third.submit(divmod, 7, 2)
        at_hand[0].set()
        while not blocked.running():
            time.sleep(0.001)
        at_hand[1].set()
        assert last.result(10) == (3, 1)
        gate.set()
        assert blocked.result(10)


def test_what_a_task_raises_is_for_whoever_waits() -> None:
    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError):
            workers.ranked(0).submit(divmod, 1, 0).result(10)
        assert workers.ranked(0).submit(divmod, 7, 2).result(10) == (3, 1), "the threads live on"


def test_closing_cancels_what_waits_and_waits_for_the_rest() -> None:
    workers = Workers(1)
    begun, gate, done = threading.Event(), threading.Event(), []

    def work() -> None:
        begun.set()
        gate.wait(10)
        done.append(True)

    workers.ranked(0).submit(work)
    waiting = workers.ranked(0).submit(done.append, False)
    begun.wait(10)
    threading.Timer(0.05, gate.set).start()
    workers.close()
    assert done == [True]
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="gone"):
        workers.ranked(0).submit(done.append, False)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_hardly_anything_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Tensors several times as large as what may wait for its turn, two of them at work at any time."""
    shapes = {f"{n}.weight": (4096, 4096) for n in range(4)}
    write_job(tmp_path, shapes=shapes, method=method)
    build_job(tmp_path)
    digests: list[Digest] = []
    begin = Digest.__init__

    def noted(self: Digest, *args: Any, **more: Any) -> None:
        digests.append(self)
        begin(self, *args, **more)

    monkeypatch.setattr(Digest, "__init__", noted)
    mergepipe.run(tmp_path / "work", workers=2)
    assert sum(digest.position for digest in digests) >= 128 * MIB
    assert sum(digest.bytes_back for digest in digests) <= 32 * MIB


def test_one_late_unit_is_all_that_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that came meanwhile had to be let go unhashed; they are read back soon, not when their tensor is done."""
    write_job(tmp_path, shapes={"weight": (2048, 2048)}, method="linear")
    build_job(tmp_path)
    written: list[int] = []
    digests: list[Digest] = []
    write, begin = ShardWriter.write, Digest.__init__
    late = threading.Event()

    def delayed(self: ShardWriter, offset: int, data: Any) -> int:
        if len(written) == 2 and not late.is_set():
            late.set()
            while len(written) < 10:
                time.sleep(0.001)
        written.append(offset)
        if len(written) > 10:
            time.sleep(0.02)
        return write(self, offset, data)

    def noted(self: Digest, *args: Any, **more: Any) -> None:
        digests.append(self)
        begin(self, *args, **more)

    monkeypatch.setattr(graph, "MAX_BUNDLE_BYTES", 1)  # the integers that lie first come first
    monkeypatch.setattr(ShardWriter, "write", delayed)
    monkeypatch.setattr(Digest, "__init__", noted)
    monkeypatch.setattr("mergepipe.pipeline.shards.Held", lambda: Held(256 * 1024))
    monkeypatch.setattr("mergepipe.pipeline.shards.BACKLOG_BYTES", 256 * 1024)
    mergepipe.run(tmp_path / "work", workers=2)
    assert late.is_set()
    assert 0 < sum(digest.bytes_back for digest in digests) < 4 * MIB, "of 8 MiB"
