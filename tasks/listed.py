"""Room for what a sweep lists element by element, because counting says too little about it.

How much there will be depends on the weights, so room is kept for the most there may be, and only what is used is ever
touched. Tensors at work take from one :class:`Room`: lists of two of them hardly overlap, and a sweep whose list does
not fit goes without.
"""

from __future__ import annotations

import threading

import numpy as np

from mergepipe.tasks.method import Array


class Room:
    """How many numbers all lists of a run may hold together.

    Examples
    --------
    >>> room = Room(10)
    >>> room.take(7), room.take(7), room.give(7), room.take(7)
    (True, False, None, True)
    """

    def __init__(self, numbers: int) -> None:
        self._free = numbers
        self._lock = threading.Lock()

    def take(self, numbers: int) -> bool:
        """Whether there is room for so many more; it is taken then."""
        with self._lock:
            if numbers > self._free:
                return False
            self._free -= numbers
            return True

    def give(self, numbers: int) -> None:
        """Give some back."""
        with self._lock:
            self._free += numbers


class Listed:
    """The list of one sweep: float32 numbers, run behind run, in whatever order threads put them.

    Parameters
    ----------
    most : int
        Numbers that it may hold.
    room : Room
        Where it takes them from.
    """

    def __init__(self, most: int, room: Room) -> None:
        self.values = np.empty(most, np.float32)
        self._room = room
        self._used = 0
        self._failed = False
        self._lock = threading.Lock()

    @property
    def most(self) -> int:
        """Numbers that it may hold."""
        return self.values.size

    def put(self, run: Array) -> int:
        """Copy a run of numbers, float32, shape (n,); where it begins now, -1 if there is no room for it.

        A list that is not complete is of no use: from then on it takes no more, and holds no room.

        Examples
        --------
        >>> one = Listed(4, Room(10))
        >>> one.put(np.ones(3, np.float32)), one.put(np.ones(2, np.float32)), one.put(np.zeros(1, np.float32))
        (0, -1, -1)
        """
        with self._lock:
            start = self._used
            if self._failed or start + run.size > self.most or not self._room.take(run.size):
                self._failed = True
                self._give_back()
                return -1
            self._used = start + run.size
        self.values[start : start + run.size] = run
        return start

    def close(self) -> None:
        """Give the room back; the numbers are gone."""
        with self._lock:
            self._give_back()
            self.values = np.empty(0, np.float32)

    def _give_back(self) -> None:
        self._room.give(self._used)
        self._used = 0
