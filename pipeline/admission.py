"""Who may start: a byte semaphore that serves in the order of asking.

Tensors whose method looks at a whole matrix take memory that is large and known. Each asks for it before its graph
starts, and gives it back when its graph is done. A large one that waits is not overtaken by smaller ones after it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Tickets:
    """The decisions, without threads: what waits, in order, and what is in.

    Parameters
    ----------
    capacity : int
        Bytes there are.

    Examples
    --------
    >>> tickets = Tickets(10)
    >>> tickets.ask("a", 6), tickets.ask("b", 6), tickets.ask("c", 1)  # c could go, but b was first
    (['a'], [], [])
    >>> tickets.give_back("a")
    ['b', 'c']
    """

    def __init__(self, capacity: int) -> None:
        self.free = capacity
        self._capacity = capacity
        self._waiting: deque[tuple[object, int]] = deque()
        self._inside: dict[object, int] = {}

    def ask(self, ticket: object, nbytes: int) -> list[object]:
        """Queue up; returns the tickets that may go in now. More than there is counts as all there is."""
        self._waiting.append((ticket, min(nbytes, self._capacity)))
        return self._admit()

    def give_back(self, ticket: object) -> list[object]:
        """Leave, or stop waiting; returns the tickets that may go in now."""
        self.free += self._inside.pop(ticket, 0)
        self._waiting = deque(item for item in self._waiting if item[0] != ticket)
        return self._admit()

    def _admit(self) -> list[object]:
        admitted = []
        while self._waiting and self._waiting[0][1] <= self.free:
            ticket, nbytes = self._waiting.popleft()
            self._inside[ticket] = nbytes
            self.free -= nbytes
            admitted.append(ticket)
        return admitted


class Admission:
    """The same for threads.

    Parameters
    ----------
    capacity : int
        Bytes there are.
    check : callable
        Raises if there is no point in waiting any more; asked a few times a second.
    """

    def __init__(self, capacity: int, check: Callable[[], None]) -> None:
        self._tickets = Tickets(max(0, capacity))
        self._admitted: set[object] = set()
        self._changed = threading.Condition()
        self._check = check

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Wait for `nbytes`, and give them back at the end."""
        ticket = object()
        with self._changed:
            self._admitted.update(self._tickets.ask(ticket, nbytes))
        try:
            with self._changed:
                while not self._changed.wait_for(lambda: ticket in self._admitted, timeout=0.2):
                    self._check()
            yield
        finally:
            with self._changed:
                self._admitted.discard(ticket)
                self._admitted.update(self._tickets.give_back(ticket))
                self._changed.notify_all()
