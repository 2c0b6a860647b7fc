"""What comes next is announced before its turn, in the order of its turn."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
from ml_dtypes import bfloat16

import mergepipe
from mergepipe.pipeline import graph
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import disk_bytes_read, schedule
from mergepipe.pipeline.upcoming import BUNDLES_AHEAD, Upcoming
from mergepipe.storage.direct import DirectReader
from mergepipe.storage.manifest import Segment
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks.blocks import SAMPLED_AHEAD
from mergepipe.tasks.nodes import TensorWork, Turn
from support.jobs import build_job, write_job


class Work:
    def __init__(self, number: int, log: list[tuple[str, int]]) -> None:
        self.number = number
        self.log = log

    def begin_sample(self) -> None:
        self.log.append(("sample", self.number))

    def begin(self) -> None:
        self.log.append(("begin", self.number))

    def is_at_hand(self) -> bool:
        return True

    def end(self) -> None:
        self.log.append(("end", self.number))


def test_a_few_bundles_are_in_sight() -> None:
    log: list[tuple[str, int]] = []
    works = Upcoming(lambda number: Work(number, log))
    bundles = [[0, 1], [2], [3, 4], [5], [6]]
    seen = []
    for position, bundle in enumerate(works.in_sight(iter(bundles))):
        seen.append(bundle)
        begun = [number for what, number in log if what == "begin"]
        assert begun == [number for one in bundles[: position + 1 + BUNDLES_AHEAD] for number in one]
        for number in bundle:
            assert works[number].number == number
            works.end(number)
            assert log[-1] == ("end", number)
            with pytest.raises(KeyError):
                works[number]
    assert seen == bundles
    told = [one for one in log if one[0] != "end"]
    assert told[:5] == [("sample", 0), ("sample", 1), ("sample", 2), ("begin", 0), ("begin", 1)]
    for number in range(6):
        assert told.index(("sample", number + 1)) < told.index(("begin", number)), "the next is sampled meanwhile"


@pytest.mark.parametrize("extra", [{}, {"scope": "model"}], ids=["tensors", "rounds"])
def test_the_reader_knows_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any]
) -> None:
    """Before anything of a tensor is asked for, those of the next bundles have been announced."""
    rows, count = 64, 6
    write_job(tmp_path, {f"{n}.weight": (rows, 1024) for n in range(count)}, **extra)
    build_job(tmp_path)
    monkeypatch.setattr(graph, "MAX_BUNDLE_BYTES", 1)
    announced: set[int] = set()
    asked: list[tuple[int, set[int]]] = []
    ahead, windows = DirectReader.ahead, DirectReader.windows

    def number(unit: Sequence[Sequence[Segment]]) -> int:
        """Of a tensor of the merge; -1 of the small one that is copied."""
        segment = unit[0][0]
        return segment.offset // (rows * 1024 * 2) if segment.length == rows * 1024 * 2 else -1

    def tell(self: DirectReader, units: Iterator[Sequence[Sequence[Segment]]]) -> None:
        listed = list(units)
        announced.update(map(number, listed))
        ahead(self, listed)

    def ask(self: DirectReader, unit: Sequence[Sequence[Segment]], *, last: bool) -> AbstractContextManager[list[Any]]:
        asked.append((number(unit), announced.copy()))
        return windows(self, unit, last=last)

    monkeypatch.setattr(DirectReader, "ahead", tell)
    monkeypatch.setattr(DirectReader, "windows", ask)
    mergepipe.run(tmp_path / "work", reader="direct")
    assert {one for one, _ in asked} >= set(range(count))
    for one, known in asked:
        assert one < 0 or known >= set(range(one, min(one + 1 + BUNDLES_AHEAD, count)))


def test_a_sweep_that_is_not_needed_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`multislerp` announces three passes over what can't be held, and mostly makes two."""
    write_job(tmp_path, {f"{n}.weight": (256, 1024) for n in range(4)}, method="multislerp")
    build_job(tmp_path)
    monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    monkeypatch.setattr("mergepipe.pipeline.reading.pool_bytes", lambda scheduled: 2**20)
    left: list[tuple[int, int, int]] = []
    close = DirectReader.close

    def look(self: DirectReader) -> None:
        # What a pass that is left out had on its way is all that was read beyond what was asked for.
        left.append((len(self._pieces), len(self._queue), self.bytes_loaded - self.bytes_read))
        close(self)

    monkeypatch.setattr(DirectReader, "close", look)
    mergepipe.run(tmp_path / "work", reader="direct")
    ((pieces, queue, beyond),) = left
    assert (pieces, queue) == (0, 0)
    assert beyond <= 4 * 2**20


def test_a_pass_begins_where_the_one_before_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be held is read back and forth, and the output made from the first unit to the last."""
    write_job(tmp_path, {"a.weight": (1024, 1024)})
    build_job(tmp_path)
    monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    monkeypatch.setattr("mergepipe.pipeline.reading.pool_bytes", lambda scheduled: 2**21)
    asked: list[int] = []
    loaded: list[float] = []
    windows, close = DirectReader.windows, DirectReader.close

    def ask(self: DirectReader, unit: Sequence[Sequence[Segment]], *, last: bool) -> AbstractContextManager[list[Any]]:
        if len(unit) == 3:
            asked.append(unit[0][0].offset)
        return windows(self, unit, last=last)

    def look(self: DirectReader) -> None:
        loaded.append(self.bytes_loaded / self.bytes_read)
        close(self)

    monkeypatch.setattr(DirectReader, "windows", ask)
    monkeypatch.setattr(DirectReader, "close", look)
    mergepipe.run(tmp_path / "work", reader="direct", workers=1)
    passes = [asked[start : start + 16] for start in range(0, len(asked), 16)]
    forward = sorted(passes[0])
    assert passes == [forward, forward[::-1], forward]
    assert loaded[0] < 0.9


def test_nothing_is_read_out_of_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two passes over a tensor, a worker does of the next one what has been read, and leaves the rest."""
    rows, count = 1024, 4
    write_job(tmp_path, {f"{n}.weight": (rows, 1024) for n in range(count)})
    build_job(tmp_path)
    monkeypatch.setattr(graph, "MAX_BUNDLE_BYTES", 1)
    monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    monkeypatch.setattr("mergepipe.pipeline.reading.pool_bytes", lambda scheduled: 2**21)
    asked: list[tuple[int, bool]] = []
    windows = DirectReader.windows

    def ask(self: DirectReader, unit: Sequence[Sequence[Segment]], *, last: bool) -> AbstractContextManager[list[Any]]:
        if len(unit) == 3:
            asked.append((unit[0][0].offset // (rows * 1024 * 2), self.holds(unit)))
        return windows(self, unit, last=last)

    monkeypatch.setattr(DirectReader, "windows", ask)
    mergepipe.run(tmp_path / "work", reader="direct", workers=1)
    assert len(asked) == count * 3 * 16
    last_of = {number: position for position, (number, _) in enumerate(asked)}
    order = sorted(last_of, key=lambda number: last_of[number])
    early = [
        held
        for earlier, later in itertools.pairwise(order)
        for number, held in asked[: last_of[earlier]]
        if number == later
    ]
    # The second of two bundles may be at work for a moment before the first is.
    assert early.count(False) <= 2


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("method", ["linear", "ties", "multislerp", "breadcrumbs", "rounds"])
def test_what_comes_next_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, *, streamed: bool
) -> None:
    """What a tensor says it will ask for next is what it asks for; where a sweep is not needed, nothing."""
    own = {"method": "ties", "scope": "model"} if method == "rounds" else {"method": method}
    write_job(tmp_path, {"a.weight": (1024, 1024), "b.weight": (300, 512)}, **own)
    build_job(tmp_path)
    if streamed:
        monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    asked: list[list[Sequence[Segment]]] = []
    foretold = 0
    windows, reduce, apply = DirectReader.windows, TensorWork.reduce, TensorWork.apply

    def ask(self: DirectReader, unit: Sequence[Sequence[Segment]], *, last: bool) -> AbstractContextManager[list[Any]]:
        asked.append(list(unit))
        return windows(self, unit, last=last)

    def watched(node: Callable[..., None], work: TensorWork, *arguments: Any) -> None:
        nonlocal foretold
        expected = [work._segments(blocks) for blocks in work._next_parts()]
        asked.clear()
        node(work, *arguments)
        assert asked == expected
        foretold += len(expected)

    monkeypatch.setattr(DirectReader, "windows", ask)
    monkeypatch.setattr(TensorWork, "reduce", partialmethod(lambda work, *more: watched(reduce, work, *more)))
    monkeypatch.setattr(TensorWork, "apply", partialmethod(lambda work, *more: watched(apply, work, *more)))
    mergepipe.run(tmp_path / "work", reader="direct", workers=1)
    assert foretold >= 2


def test_a_turn_only_moves_on() -> None:
    turn = Turn()
    for stage, unit in ((0, 1), (0, 3), (0, 2), (1, 0), (0, 4)):
        turn.reach(stage, unit)
    assert turn.at == (1, 0)


@pytest.mark.parametrize("method", ["linear", "ties", "scf_rkl"])
def test_a_plan_foretells_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Of what can't be held: a sample, each pass, less what is there where one turns into the next."""
    pool, found = 2**21, []
    recipe = write_job(tmp_path, {f"{n}.weight": (4096, 1024) for n in range(2)}, method=method, dtype=bfloat16)
    if method == "scf_rkl":
        recipe.write_text(re.sub(r" *parameters:\n *weight: 0.5\n", "", recipe.read_text()))
    build_job(tmp_path)
    monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    monkeypatch.setattr("mergepipe.pipeline.reading.pool_bytes", lambda scheduled: pool)
    close = DirectReader.close

    def look(self: DirectReader) -> None:
        found.append(self.bytes_loaded)
        close(self)

    monkeypatch.setattr(DirectReader, "close", look)
    mergepipe.run(tmp_path / "work", reader="direct")
    plan = Plan.from_json(Workspace(tmp_path / "work").read_plan())
    items = schedule(plan, Ceiling(plan.allowed, 2), gathered=[True] * len(plan.models))
    inputs, foretold = (
        sum(item.tensor.input_bytes() for item in items),
        sum(disk_bytes_read(one, pool) for one in items),
    )
    passes = {"linear": 1, "ties": 2, "scf_rkl": 3}[method]
    assert (passes - 0.35) * inputs < foretold <= (passes + 1 / 16) * inputs
    assert 0.93 * foretold <= found[0] <= 1.03 * foretold


def test_a_large_sample_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take the room of what is read before it: a few units of it are announced with the tensor before."""
    write_job(tmp_path, {f"{n}.weight": (20480, 1024) for n in range(2)}, dtype=bfloat16)
    build_job(tmp_path)
    monkeypatch.setattr("mergepipe.pipeline.execution.is_resident", lambda item, pool: False)
    announced: list[int] = []
    ahead = DirectReader.ahead

    def watch(self: DirectReader, units: Iterator[Sequence[Sequence[Segment]]]) -> None:
        listed = list(units)
        if listed and len(listed[0]) == 3:
            announced.append(len(listed))
        ahead(self, iter(listed))

    monkeypatch.setattr(DirectReader, "ahead", watch)
    mergepipe.run(tmp_path / "work", reader="direct")
    blocks = 20480 * 1024 // 65536
    early = -(-SAMPLED_AHEAD // 16)
    assert announced[:2] == [early, early]
    assert sorted(announced[2:]) == sorted([blocks // 16 - early, blocks, blocks] * 2)
