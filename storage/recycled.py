"""Memory for chunks that are handed out and come back: fresh pages cost as much as the bytes that are put into them.

An array handed out here, and every view of it, keeps its memory alive; when the last of them is gone, the memory waits
for the next chunk of about its size.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]

SMALLEST_BYTES = 256 * 1024
"""Below this, the allocator's own recycling is as good."""

LARGEST_BYTES = 16 * 1024 * 1024
"""What is larger is given back at once."""


class Recycled:
    """Arrays of bytes, of which some that are not in use any more are kept for the next ones. Safe for threads.

    Parameters
    ----------
    kept : int, default 4
        Blocks of memory kept while nobody uses them, each of at most :data:`LARGEST_BYTES`.

    Examples
    --------
    >>> memory = Recycled()
    >>> array = memory.array(SMALLEST_BYTES)
    >>> address = array.ctypes.data
    >>> del array
    >>> memory.array(SMALLEST_BYTES).ctypes.data == address
    True
    """

    def __init__(self, kept: int = 4) -> None:
        self._idle: deque[U8] = deque(maxlen=kept)  # appending to a full one drops the block that came back first

    def array(self, nbytes: int) -> U8:
        """An array of `nbytes` bytes that nobody else uses; what is in it is undefined."""
        if not SMALLEST_BYTES <= nbytes <= LARGEST_BYTES:
            return np.empty(nbytes, np.uint8)
        return np.asarray(_Loan(self._take(nbytes), self._idle))[:nbytes]

    def _take(self, nbytes: int) -> U8:
        for _ in range(len(self._idle)):
            try:
                block = self._idle.pop()  # the last one back is the likeliest to be in the processor's cache
            except IndexError:  # another thread was faster
                break
            if nbytes <= block.nbytes <= 2 * nbytes:
                return block
            self._idle.appendleft(block)
        return np.empty(nbytes, np.uint8)


class _Loan:
    """What numpy takes for the owner of a block's memory; it goes when the last array over the block does."""

    def __init__(self, block: U8, idle: deque[U8]) -> None:
        self.__array_interface__ = block.__array_interface__
        self._block = block
        self._idle = idle

    def __del__(self) -> None:
        self._idle.append(self._block)
