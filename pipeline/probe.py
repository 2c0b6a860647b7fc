"""Which way of reading suits the disk, and the page cache, that a run finds: measured on a sample of its inputs.

Nobody can tell from a path whether a disk wants many reads at once (NVMe), few (a spinning disk, some networks), or
whether the inputs lie in the page cache, where no disk is needed at all. So before a long run each way reads windows of
its own, spread over all inputs, in turns. A disk shared with others is noisy: another way than the usual one has to win
by a margin, in every turn. What is read, and into which units, changes no byte of a result.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from mergepipe.storage.checkpoint import FileInfo
from mergepipe.storage.direct import IO_THREADS, PAGE, SLACK_BYTES, DirectReader
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import MmapReader

WINDOW_BYTES = 2 * 1024 * 1024
WINDOWS = 16
"""What a way reads in one turn."""

TURNS = 2
ENOUGH_SECONDS = 1.0
"""After a turn that ends so late there is no other."""

WORTH = 32
"""Inputs are probed only if they are so many times larger than the sample."""

MARGIN = 1.25
MAPPED_MARGIN = 2.0
"""Through the page cache nothing is read while a worker computes."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to read.

    Attributes
    ----------
    direct : bool
        Past the page cache.
    depth : int
        Reads that the disk sees at once.
    """

    direct: bool
    depth: int

    def __str__(self) -> str:
        return f"{self.depth} at once {'past' if self.direct else 'through'} the page cache"


USUAL = Way(True, IO_THREADS)
MOST_DEPTH = 16
OTHER_DEPTHS = (1, MOST_DEPTH)


def fastest(files: Sequence[FileInfo], workers: int, most: int) -> tuple[Way, str]:
    """Measure the ways to read.

    Parameters
    ----------
    files : sequence of FileInfo
        The inputs.
    workers : int
        Threads that compute, and that read if pages are mapped.
    most : int
        Reads at once that there is memory for.

    Returns
    -------
    Way
    str
        What to tell the user: that way, and the rates of all; empty where the inputs are too small to be measured.
    """
    ways = [USUAL, *(Way(True, depth) for depth in OTHER_DEPTHS if depth <= most), Way(False, workers)]
    samples = sample(files, len(ways))
    if not samples:
        return USUAL, ""
    began = time.perf_counter()
    rates: list[list[float]] = [[] for _ in ways]
    for turn in samples:
        for way, windows, found in zip(ways, turn, rates, strict=True):
            found.append(WINDOW_BYTES * len(windows) / _seconds(way, windows))
        if time.perf_counter() - began > ENOUGH_SECONDS:
            break
    best = choose(ways, rates)
    told = ", ".join(f"{way} {sum(found) / len(found) / 1e9:.2f}" for way, found in zip(ways, rates, strict=True))
    return best, f"inputs are read {best}; GB/s of a sample: {told}"


def choose(ways: Sequence[Way], rates: Sequence[Sequence[float]]) -> Way:
    """The way to take: the first one, unless another was faster by its margin in every turn.

    Examples
    --------
    >>> ways = [Way(True, 4), Way(True, 16), Way(False, 2)]
    >>> choose(ways, [[1.0, 1.0], [1.5, 1.2], [1.9, 1.9]])  # none by its margin in both
    Way(direct=True, depth=4)
    >>> choose(ways, [[1.0, 1.0], [1.5, 1.3], [6.0, 7.0]])
    Way(direct=False, depth=2)
    """
    best, gain = ways[0], 1.0
    for way, found in zip(ways[1:], rates[1:], strict=True):
        gains = [rate / usual for rate, usual in zip(found, rates[0], strict=True)]
        if min(gains) >= (MARGIN if way.direct else MAPPED_MARGIN) and min(gains) > gain:
            best, gain = way, min(gains)
    return best


def sample(files: Sequence[FileInfo], ways: int) -> list[list[list[Segment]]]:
    """Windows spread over all files, none of them twice: for each turn and each way its own.

    Empty if the files are too small for it. Windows begin at multiples of a page.
    """
    count = TURNS * ways * WINDOWS
    total = sum(info.size for info in files)
    if total < WORTH * count * WINDOW_BYTES:
        return []
    ends = list(itertools.accumulate(info.size for info in files))
    windows = []
    for number in range(count):
        at = total * number // count
        file = next(index for index, end in enumerate(ends) if at < end)
        start = at - (ends[file] - files[file].size)
        start = min(start, files[file].size - WINDOW_BYTES) // PAGE * PAGE
        if start >= 0:  # not of a file that is smaller than a window
            windows.append(Segment(files[file].path, start, WINDOW_BYTES))
    turns = [windows[turn::TURNS] for turn in range(TURNS)]
    shares = [[turn[way::ways] for way in range(ways)] for turn in turns]
    return shares if all(share for turn in shares for share in turn) else []


def _seconds(way: Way, windows: Sequence[Segment]) -> float:
    read = _read_past if way.direct else _read_mapped
    return read(way.depth, windows)


def _read_past(depth: int, windows: Sequence[Segment]) -> float:
    # The same arena for all, whose pages are as fresh for each.
    with DirectReader(WINDOWS * (WINDOW_BYTES + SLACK_BYTES), threads=depth) as reader:
        return _timed(lambda: _walk(reader, windows))


def _walk(reader: DirectReader, windows: Sequence[Segment]) -> None:
    reader.ahead([[[window]] for window in windows])
    for window in windows:
        with reader.window([window], last=True):
            pass


def _read_mapped(threads: int, windows: Sequence[Segment]) -> float:
    with MmapReader() as reader, ThreadPoolExecutor(threads) as pool:

        def look(window: Segment) -> None:
            with reader.window([window], last=False):  # the run needs these pages yet
                pass

        return _timed(lambda: list(pool.map(look, windows)))


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
