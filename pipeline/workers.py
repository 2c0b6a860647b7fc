"""The threads that compute. They take what comes first in the output before what comes later.

Two bundles are at work at once, so that nobody waits where one of them has to know all of a tensor before it goes on.
If both had the same share, half of the output would be made long before its turn: its checksums would have to wait for
it to be read back, and the inputs of two tensors would want room at once. So the later bundle fills gaps only.
"""

from __future__ import annotations

import heapq
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

AHEAD = 2
"""Tasks per worker that a bundle keeps waiting, so that it has one ready whenever a worker is."""


class Workers:
    """A fixed number of threads.

    Parameters
    ----------
    count : int

    Examples
    --------
    >>> with Workers(2) as workers:
    ...     [workers.ranked(rank).submit(pow, rank, 2).result() for rank in (2, 1)]
    [4, 1]
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._waiting: list[tuple[int, int, Future[Any], Callable[[], Any]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, name=f"mergepipe-worker-{n}") for n in range(count)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ranked(self, rank: int) -> Ranked:
        """These threads as Dask takes them for a bundle: the lower its rank, the earlier its tasks are taken."""
        return Ranked(self, rank)

    def submit(self, rank: int, body: Callable[[], Any]) -> Future[Any]:
        """Have a task done.

        Raises
        ------
        RuntimeError
            If the threads are closed.
        """
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the workers are gone")
            heapq.heappush(self._waiting, (rank, next(self._order), future, body))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what waits, and wait for what is at work."""
        with self._changed:
            self._closed = True
            dropped = [future for _, _, future, _ in self._waiting]
            self._waiting.clear()
            self._changed.notify_all()
        for future in dropped:
            future.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                _, _, future, body = heapq.heappop(self._waiting)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = body()
            except BaseException as error:  # it is for whoever waits for the result
                future.set_exception(error)
            else:
                future.set_result(found)
            del future, body  # nothing of it is to live until the next task comes


class Ranked:
    """What Dask asks of an executor."""

    def __init__(self, workers: Workers, rank: int) -> None:
        self._workers = workers
        self._rank = rank
        self._max_workers = AHEAD * workers.count  # by this name Dask reads how many tasks to hand over at once

    def submit(self, body: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have ``body(*args)`` done."""
        return self._workers.submit(self._rank, lambda: body(*args))
