"""Tensors at work and those that come next: the reader hears of each before its turn.

A tensor is computed in less time than it is read in, mostly. Whoever tells the reader of it no sooner than a worker may
begin leaves the disk idle while the tensors before it are computed, and the workers while it is read.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, Protocol, TypeVar

BUNDLES_AHEAD = 2
"""Bundles that the reader knows of beside those at work."""


class Announced(Protocol):
    """What is told to a reader: see :class:`mergepipe.tasks.nodes.TensorWork`."""

    def begin_sample(self) -> None:
        """Tell the reader what will be asked for as soon as the tensor before has no work for some worker."""

    def begin(self) -> None:
        """Tell the reader what will be asked for after that."""

    def is_at_hand(self) -> bool:
        """Whether the reader has what is asked for next."""

    def end(self) -> None:
        """Tell the reader that nothing will be asked for any more."""


W = TypeVar("W", bound=Announced)


class Upcoming(Generic[W]):
    """The work on each tensor from when it comes into sight until it is done.

    Parameters
    ----------
    make : callable
        The work on a tensor, by its number. Called in the order of the bundles, by one thread at a time.
    """

    def __init__(self, make: Callable[[int], W]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._works: dict[int, W] = {}

    def in_sight(self, bundles: Iterable[list[int]]) -> Iterator[list[int]]:
        """The same bundles, of which a few more have been announced each time."""
        waiting: deque[list[int]] = deque()
        for bundle in bundles:
            self._open(bundle)
            self._begin(waiting[-1] if waiting else [])
            waiting.append(bundle)
            if len(waiting) > BUNDLES_AHEAD + 1:
                yield waiting.popleft()
        self._begin(waiting[-1] if waiting else [])
        yield from waiting

    def _open(self, bundle: list[int]) -> None:
        for number in bundle:
            work = self._make(number)
            with self._lock:
                self._works[number] = work
            work.begin_sample()

    def _begin(self, bundle: list[int]) -> None:
        for number in bundle:
            self[number].begin()

    def __getitem__(self, number: int) -> W:
        """The work on a tensor in sight."""
        with self._lock:
            return self._works[number]

    def end(self, number: int) -> None:
        """A tensor is done."""
        with self._lock:
            work = self._works.pop(number)
        work.end()
