"""Reading past the page cache: the right bytes, a hard budget, nothing kept too long, nobody starved."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, ShortReadError
from mergepipe.storage import direct
from mergepipe.storage.direct import PAGE, SLACK_BYTES, TOUCHED_AT_ONCE, Arena, DirectReader, supports_direct
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Reader

SIZE = 300_003
UNIT = 64 * 1024


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    contents = {str(folder / name): rng.integers(0, 256, SIZE, np.uint8).tobytes() for name in "abc"}
    for path, content in contents.items():
        Path(path).write_bytes(content)
    return contents


@pytest.fixture
def reader() -> Iterator[DirectReader]:
    with DirectReader(8 * (UNIT + SLACK_BYTES)) as reader:
        yield reader


def units_of(path: str, count: int = 4) -> list[list[list[Segment]]]:
    """Units of one window each, at odd places of a file."""
    return [[[Segment(path, 100 + number * UNIT, UNIT)]] for number in range(count)]


def announced_keys(units: list[list[list[Segment]]]) -> list[list[tuple[Segment, ...]]]:
    """As the reader's queue has them."""
    return [[tuple(segments) for segments in unit] for unit in units]


def list_of(reader: DirectReader, unit: list[list[Segment]]) -> list[np.ndarray]:
    with reader.windows(unit, last=True) as windows:
        return [window.copy() for window in windows]


def wait_for_line(reader: DirectReader, length: int) -> None:
    """Wait until so many calls wait for room."""
    deadline = time.monotonic() + 10
    while len(reader._line) < length:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def settle(reader: DirectReader) -> None:
    """Wait until nothing is being read."""
    deadline = time.monotonic() + 10
    while any(not piece.loading.done() for piece in list(reader._pieces.values())):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@given(st.data())
def test_any_segments(files: dict[str, bytes], data: st.DataObject) -> None:
    drawn = data.draw(
        st.lists(st.tuples(st.sampled_from(sorted(files)), st.integers(0, SIZE), st.integers(0, SIZE)), max_size=3)
    )
    segments = [Segment(path, min(a, b), abs(a - b)) for path, a, b in drawn]
    expected = b"".join(files[s.path][s.offset : s.offset + s.length] for s in segments)
    # The last of these budgets is too small for most windows.
    with DirectReader(data.draw(st.sampled_from([4 * SIZE, 64 * PAGE]))) as reader:
        with reader.window(segments, last=data.draw(st.booleans())) as window:
            assert window.dtype == np.uint8
            assert window.tobytes() == expected
            assert not window.flags.writeable
            assert window.ctypes.data % 8 == 0 or not expected
        assert reader.bytes_read == len(expected)


def test_it_is_a_reader(reader: DirectReader) -> None:
    wanted: Reader = reader
    assert wanted.bytes_read == 0


def test_a_window_at_an_odd_offset_can_be_viewed_as_any_type(files: dict[str, bytes], reader: DirectReader) -> None:
    path = next(iter(files))
    with reader.window([Segment(path, 3, 16)], last=False) as window:
        assert window.view("<f8").flags.aligned
        assert window.view("<u2").tobytes() == files[path][3:19]


def test_the_unaligned_end_of_a_file(files: dict[str, bytes], reader: DirectReader) -> None:
    path = next(iter(files))
    with reader.window([Segment(path, SIZE - 5000, 5000)], last=True) as window:
        assert window.tobytes() == files[path][-5000:]


def test_a_filesystem_that_refuses(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, reader: DirectReader
) -> None:
    monkeypatch.setattr(direct, "_set_direct", lambda fd: False)
    path = next(iter(files))
    assert not supports_direct(path)
    with reader.window([Segment(path, 10, UNIT)], last=True) as window:
        assert window.tobytes() == files[path][10 : 10 + UNIT]


def test_a_file_that_is_too_short(tmp_path: Path, reader: DirectReader) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 100)
    with pytest.raises(ShortReadError, match=r"short' is 100 bytes long, expected at least 101"):
        reader.window([Segment(str(path), 1, 100)], last=True).__enter__()
    path.write_bytes(b"x" * 101)
    with reader.window([Segment(str(path), 1, 100)], last=True) as window:
        assert window.tobytes() == b"x" * 100, "the failure is not kept"


def test_things_that_are_no_files(tmp_path: Path, reader: DirectReader) -> None:
    with pytest.raises(CheckpointNotFoundError):
        reader.window([Segment(str(tmp_path / "nothing"), 0, 1)], last=True).__enter__()
    with pytest.raises(CheckpointError, match="not a regular file"):
        reader.window([Segment(str(tmp_path), 0, 1)], last=True).__enter__()


def test_what_is_kept_stays_when_its_read_is_reported_late(
    files: dict[str, bytes], reader: DirectReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for a read may have used it before the thread that made it goes on."""
    given_back, reported = threading.Event(), threading.Event()
    load, loaded = DirectReader._load, DirectReader._loaded

    def slow(self: DirectReader, piece: Any) -> Any:
        time.sleep(0.05)  # or the report would be made before anybody waits
        return load(self, piece)

    def late(self: DirectReader, piece: Any, future: Any) -> None:
        assert given_back.wait(10)
        loaded(self, piece, future)
        reported.set()

    monkeypatch.setattr(DirectReader, "_load", slow)
    monkeypatch.setattr(DirectReader, "_loaded", late)
    unit = units_of(next(iter(files)))[0]
    reader.ahead([unit])
    with reader.windows(unit, last=False):
        pass
    given_back.set()
    assert reported.wait(10)
    with reader.windows(unit, last=True):
        pass
    assert reader.bytes_loaded == UNIT
    assert not reader._pieces


def test_what_is_kept_is_read_once(files: dict[str, bytes], reader: DirectReader) -> None:
    units = units_of(next(iter(files)))
    reader.ahead(units)
    for last in (False, False, True):
        for unit in units:
            with reader.windows(unit, last=last):
                pass
    assert reader.bytes_read == 3 * reader.bytes_loaded == 3 * 4 * UNIT
    assert not reader._pieces
    assert reader._arena.free == reader._arena.size


def test_reading_ahead_stays_within_the_budget(files: dict[str, bytes]) -> None:
    first, second, _ = sorted(files)
    units = units_of(first) + units_of(second)
    with DirectReader(3 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead(units)
        settle(reader)
        assert len(reader._pieces) == 3
        for unit in units:
            with reader.windows(unit, last=True) as (window,):
                (segment,) = unit[0]
                assert window.tobytes() == files[segment.path][segment.offset : segment.offset + UNIT]
        assert reader.bytes_loaded == len(units) * UNIT


def test_two_passes_are_two_announcements(files: dict[str, bytes]) -> None:
    """The second pass is read ahead as well, though the first asks for the same windows while it waits in the queue."""
    units = units_of(next(iter(files)))
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead(units + units)
        for number in range(2 * len(units)):
            settle(reader)
            assert len(reader._pieces) == min(2, 2 * len(units) - number), "as many as there is room for"
            with reader.windows(units[number % len(units)], last=True):
                pass
        assert reader.bytes_loaded == 2 * len(units) * UNIT
        assert not reader._pieces
        assert not reader._queue


def test_a_window_in_use_is_kept_for_the_next_pass(files: dict[str, bytes], reader: DirectReader) -> None:
    unit = units_of(next(iter(files)), 1)
    with reader.windows(unit[0], last=True):
        reader.ahead(unit)
    with reader.windows(unit[0], last=True):
        pass
    assert reader.bytes_loaded == UNIT
    assert not reader._pieces


def test_what_has_to_give_way_is_read_ahead_again(files: dict[str, bytes]) -> None:
    first, second, _ = sorted(files)
    announced, urgent = units_of(first, 3), units_of(second, 1)[0]
    with DirectReader(3 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead(announced)
        settle(reader)
        with reader.windows(urgent, last=True):
            assert reader._queue == deque(announced_keys(announced[2:]))
        settle(reader)
        assert not reader._queue
        assert len(reader._pieces) == 3
        for unit in announced:
            with reader.windows(unit, last=True):
                pass
        assert not reader._pieces


def test_a_pass_that_does_not_come_leaves_nothing_behind(files: dict[str, bytes]) -> None:
    """Its windows are neither read for nothing nor kept, wherever they are: in the queue, on the way, or there."""
    first, second, _ = sorted(files)
    one, other = units_of(first), units_of(second)
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead([*one, *one, *other])  # the second pass over the first file will be left out
        for unit in one:
            with reader.windows(unit, last=True):
                pass
        reader.skip(one)
        settle(reader)
        assert not any(unit in announced_keys(one) for piece in reader._pieces.values() for unit in piece.expected)
        assert all(unit in announced_keys(other) for unit in reader._queue)
        before = reader.bytes_loaded
        for unit in other:
            with reader.windows(unit, last=True):
                pass
        assert not reader._pieces
        assert reader.bytes_loaded <= before + len(other) * UNIT
        assert reader.bytes_loaded <= (len(one) + 2 + len(other)) * UNIT, "two of the second pass had been read"


def test_what_is_forgotten_on_its_way_is_dropped_when_it_comes(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()
    read = DirectReader._read_direct

    def late(self: DirectReader, segment: Segment, memory: direct.U8) -> direct.U8:
        assert may_read.wait(10)
        return read(self, segment, memory)

    monkeypatch.setattr(DirectReader, "_read_direct", late)
    units = units_of(next(iter(files)), 2)
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead(units)
        reader.forget(segments for unit in units for segments in unit)
        may_read.set()
        deadline = time.monotonic() + 10
        while reader._pieces:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert reader._arena.free == reader._arena.size


def test_a_unit_may_ask_for_a_window_twice(files: dict[str, bytes]) -> None:
    first, second, _ = sorted(files)
    unit = [[Segment(first, 0, UNIT)], [Segment(first, 0, UNIT)]]
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead([unit])
        settle(reader)
        with reader.windows([*units_of(second, 1)[0], *units_of(second, 2)[1]], last=True):
            assert len(reader._queue) == 1, "it gave way, once"
        with reader.windows(unit, last=True) as windows:
            assert windows[0].tobytes() == windows[1].tobytes() == files[first][:UNIT]
        assert not reader._pieces
        assert not reader._queue


def test_who_waits_longest_gets_the_room(files: dict[str, bytes]) -> None:
    """Two units hold all memory; of two that wait, the first is served first, though the second would fit sooner."""
    path = next(iter(files))
    served: list[str] = []
    large = [[Segment(path, number * UNIT, UNIT)] for number in (2, 3)]

    def ask(name: str, unit: list[list[Segment]]) -> None:
        with reader.windows(unit, last=True):
            served.append(name)

    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader, ThreadPoolExecutor(2) as pool:
        with reader.window([Segment(path, 0, UNIT)], last=True):
            with reader.window([Segment(path, UNIT, UNIT)], last=True):
                waiting = [pool.submit(ask, "large", large)]
                wait_for_line(reader, 1)
                waiting.append(pool.submit(ask, "small", [[Segment(path, 4 * UNIT, UNIT // 2)]]))
                wait_for_line(reader, 2)
            time.sleep(0.02)
            assert not served, "there is room for the second, but it is not its turn"
        for one in waiting:
            one.result(timeout=10)
    assert served == ["large", "small"]


def test_what_is_there_is_given_to_whoever_asks(files: dict[str, bytes]) -> None:
    """It takes no room, so nobody has to wait in line for it."""
    path = next(iter(files))
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader, ThreadPoolExecutor(1) as pool:
        unit = [[Segment(path, 0, UNIT)]]
        with reader.windows(unit, last=False):
            large = [[Segment(path, number * UNIT, UNIT)] for number in (2, 3)]
            waiting = pool.submit(lambda: [window.size for window in list_of(reader, large)])
            wait_for_line(reader, 1)
            with reader.windows(unit, last=True):
                assert not waiting.done()
        assert waiting.result(timeout=10) == [UNIT, UNIT]


def test_it_tells_what_it_holds(files: dict[str, bytes]) -> None:
    path = next(iter(files))
    units = [[[Segment(path, number * UNIT, UNIT)] for number in pair] for pair in ((0, 1), (1, 2), (3, 4))]
    with DirectReader(3 * (UNIT + SLACK_BYTES)) as reader:
        assert not any(map(reader.holds, units))
        reader.ahead(units[:1])
        assert [reader.holds(unit) for unit in units] == [True, False, False], "on its way is enough, half of it is not"
        with reader.windows(units[1], last=False):
            assert [reader.holds(unit) for unit in units] == [True, True, False]
        reader.forget(units[1])
        assert not any(map(reader.holds, units))


def test_a_unit_that_never_fits_is_in_nobody_s_way(files: dict[str, bytes]) -> None:
    path = next(iter(files))
    large = [[Segment(path, number * UNIT, UNIT)] for number in range(3)]
    with DirectReader(2 * (UNIT + SLACK_BYTES)) as reader:
        reader.ahead([large, [[Segment(path, 3 * UNIT, UNIT)]]])
        assert reader.holds(large), "there is nothing to wait for"
        assert reader.holds([[Segment(path, 3 * UNIT, UNIT)]])
        assert [window.size for window in list_of(reader, large)] == [UNIT] * 3
        with reader.window([Segment(path, 3 * UNIT, UNIT)], last=True) as window:
            assert window.tobytes() == files[path][3 * UNIT : 4 * UNIT]
        assert not reader._queue


def test_what_is_forgotten_makes_room(files: dict[str, bytes], reader: DirectReader) -> None:
    units = units_of(next(iter(files)))
    reader.ahead(units)
    settle(reader)
    reader.forget(segments for unit in units for segments in unit)
    assert reader._arena.free == reader._arena.size


def test_kept_windows_give_way_to_what_is_needed_now(files: dict[str, bytes]) -> None:
    first, second, _ = sorted(files)
    with DirectReader(4 * (UNIT + SLACK_BYTES)) as reader:
        for unit in units_of(first):
            with reader.windows(unit, last=False):
                pass
        everything = [segments for unit in units_of(second) for segments in unit]
        with reader.windows(everything, last=True) as windows:
            assert b"".join(window.tobytes() for window in windows) == files[second][100 : 100 + 4 * UNIT]


def test_a_unit_is_not_in_its_own_way(files: dict[str, bytes]) -> None:
    """Two small kept windows split the arena so that the large one fits only when they go."""
    path = next(iter(files))
    small = [[Segment(path, number * PAGE, PAGE)] for number in range(6)]
    with DirectReader(6 * PAGE) as reader:
        for segments in small:
            with reader.window(segments, last=False):
                pass
        reader.forget(small[number] for number in (0, 1, 3, 4))
        with reader.windows([small[2], small[5], [Segment(path, 10 * PAGE, 4 * PAGE)]], last=True) as windows:
            assert [window.nbytes for window in windows] == [PAGE, PAGE, 4 * PAGE]


def test_many_threads_in_a_tight_budget(files: dict[str, bytes]) -> None:
    """Units of three windows, room for little more than one: all get their turn and their bytes."""
    paths = sorted(files)

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(60):
            start = int(rng.integers(SIZE - 20_000))
            groups = [[Segment(path, start, 20_000)] for path in paths]
            if rng.integers(2):
                reader.ahead([groups])
            with reader.windows(groups, last=bool(rng.integers(2))) as windows:
                for path, window in zip(paths, windows, strict=True):
                    assert window.tobytes() == files[path][start : start + 20_000]

    with DirectReader(4 * (20_000 + SLACK_BYTES)) as reader, ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, seed) for seed in range(6)]:
            done.result(timeout=60)


def test_closing_while_reading_ahead(files: dict[str, bytes]) -> None:
    reader = DirectReader(8 * (UNIT + SLACK_BYTES))
    reader.ahead(units_of(next(iter(files))))
    before = threading.active_count()
    reader.close()
    assert threading.active_count() <= before


@given(st.lists(st.integers(1, 5), max_size=40))
def test_the_arena_hands_out_disjoint_pieces_and_heals(sizes: list[int]) -> None:
    arena = Arena(32 * PAGE)
    held: list[tuple[int, int]] = []
    for pages in sizes:
        start = arena.take(pages * PAGE)
        if start is None:
            held and arena.give(*held.pop(len(held) // 2))
            continue
        assert all(start + pages * PAGE <= other or other + length <= start for other, length in held)
        held.append((start, pages * PAGE))
        assert arena.free == arena.size - sum(length for _, length in held)
    for piece in held:
        arena.give(*piece)
    assert arena.take(arena.size) == 0


def test_touching_fresh_memory_leaves_what_is_there() -> None:
    arena = Arena(3 * TOUCHED_AT_ONCE)
    arena.touch(PAGE)
    arena.bytes[:TOUCHED_AT_ONCE] = 7
    for stop in (PAGE, TOUCHED_AT_ONCE + PAGE, arena.size):
        arena.touch(stop)
    assert (arena.bytes[:TOUCHED_AT_ONCE] == 7).all()
    assert not arena.bytes[TOUCHED_AT_ONCE:].any()
