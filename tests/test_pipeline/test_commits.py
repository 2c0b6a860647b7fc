"""A record follows its bytes, and once a promise could not be kept nothing is promised any more."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mergepipe.errors import InputChangedError, Interrupted
from mergepipe.pipeline.commits import LOOKS, Committer, DoneUnit
from mergepipe.storage.journal import Journal, Record


class Spy(Journal):
    """A journal that keeps the order of syncs and appends."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.happened: list[Any] = []

    def append(self, records: Any) -> None:
        records = list(records)
        self.happened.append(records)
        super().append(records)

    def sync(self, shard: int) -> None:
        self.happened.append(shard)


@pytest.fixture
def journal(tmp_path: Path) -> Spy:
    return Spy(tmp_path / "journal.log")


def unchanged() -> None:
    """Inputs that stay as they are."""


def units(record: Record) -> list[list[int]]:
    found: list[list[int]] = record["units"]
    return found


def test_the_record_comes_after_the_sync(journal: Spy) -> None:
    committer = Committer(journal, journal.sync, pytest.fail, unchanged, max_seconds=60)
    committer.add(DoneUnit(4, 1, 0, 8, 77))
    committer.add(DoneUnit(2, 0, 8, 16, 78))
    committer.add(DoneUnit(4, 1, 8, 16, 79))
    assert journal.happened == []
    committer.commit()
    assert journal.happened[:2] == [0, 1]
    assert units(journal.happened[2][0]) == [[4, 0, 8, 77], [2, 8, 16, 78], [4, 8, 16, 79]]
    committer.commit()
    assert len(journal.happened) == 3, "nothing new, nothing recorded"
    committer.close()


def test_commits_by_bytes_and_by_time(journal: Spy) -> None:
    committer = Committer(journal, journal.sync, pytest.fail, unchanged, max_bytes=100, max_seconds=60)
    committer.add(DoneUnit(0, 0, 0, 100, 0))
    wait_for(lambda: len(journal.happened) == 2)
    committer.close()
    committer = Committer(journal, journal.sync, pytest.fail, unchanged, max_bytes=1000, max_seconds=0.01)
    committer.add(DoneUnit(0, 0, 100, 101, 0))
    wait_for(lambda: len(journal.happened) == 4)
    committer.close()


def test_close_commits_what_is_pending(journal: Spy) -> None:
    committer = Committer(journal, journal.sync, pytest.fail, unchanged, max_seconds=60)
    committer.add(DoneUnit(0, 0, 0, 1, 0))
    committer.close()
    assert len(journal.happened) == 2


def test_nothing_is_promised_after_a_failure(journal: Spy) -> None:
    failures: list[BaseException] = []
    broken = threading.Event()

    def sync(shard: int) -> None:
        if not broken.is_set():
            broken.set()
            raise OSError(5, "Input/output error")

    committer = Committer(journal, sync, failures.append, unchanged, max_bytes=1, max_seconds=60)
    committer.add(DoneUnit(0, 0, 0, 1, 0))
    wait_for(lambda: bool(failures))
    committer.add(DoneUnit(0, 0, 1, 2, 0))
    for promise in (committer.commit, lambda: committer.record({"type": "sealed"})):
        with pytest.raises(Interrupted):
            promise()
    committer.close()
    assert journal.happened == []
    assert isinstance(failures[0], OSError)


def test_nothing_is_recorded_once_an_input_changed(journal: Spy) -> None:
    """Neither units nor what was found out, nor anything after the file is as it was again."""
    changed, failures = threading.Event(), list[BaseException]()

    def look() -> None:
        if changed.is_set():
            raise InputChangedError("it changed")

    committer = Committer(journal, journal.sync, failures.append, look, max_seconds=60)
    committer.add(DoneUnit(0, 0, 0, 1, 0))
    committer.commit()
    before = list(journal.happened)
    changed.set()
    committer.add_record({"type": "round"})
    committer.add(DoneUnit(0, 0, 1, 2, 0))
    with pytest.raises(InputChangedError):
        committer.commit()
    changed.clear()
    committer.add(DoneUnit(0, 0, 2, 3, 0))
    for promise in (committer.commit, lambda: committer.record({"type": "sealed"})):
        with pytest.raises(Interrupted):
            promise()
    committer.close()
    assert journal.happened == before


def test_looking_at_many_inputs_takes_little_of_the_time(journal: Spy) -> None:
    """Commits wait where a look at the inputs takes long."""
    looks: list[float] = []

    def look() -> None:
        looks.append(time.monotonic())
        time.sleep(0.02)

    committer = Committer(journal, journal.sync, pytest.fail, look, max_bytes=1, max_seconds=60)
    committer.add(DoneUnit(0, 0, 0, 1, 0))
    wait_for(lambda: len(journal.happened) == 2)
    committer.add(DoneUnit(0, 0, 1, 2, 0))
    wait_for(lambda: len(journal.happened) == 4)
    assert looks[1] - looks[0] >= 0.02 * LOOKS
    committer.close()


def wait_for(condition: Any, timeout_s: float = 10) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
