"""The threads that compute. They take what comes first in the output before what comes later.

Two bundles are at work at once, so that nobody waits where one of them has to know all of a tensor before it goes on.
If both had the same share, half of the output would be made long before its turn: its checksums would have to wait for
it to be read back, and the inputs of two tensors would want room at once. So the later bundle fills gaps only, and only
with what is at hand: whoever had something read out of turn would wait for it, and have it put in the place of what the
earlier bundle is about to ask for again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

AHEAD = 2
"""Tasks per worker that a bundle keeps waiting, so that it has one ready whenever a worker is."""

LOOK_AGAIN_S = 0.002
"""How long a worker waits for what a later bundle needs, before it looks again whether it is at hand."""

Task = tuple[Future[Any], Callable[[], Any]]


def always() -> bool:
    """Of a bundle that does not wait for what it needs."""
    return True


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
        self._waiting: dict[int, deque[Task]] = {}
        self._bundles: dict[int, Callable[[], bool]] = {}
        self._changed = threading.Condition()
        self._looking = False
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

    def ranked(self, rank: int, at_hand: Callable[[], bool] = always) -> Ranked:
        """These threads as Dask takes them for a bundle.

        Parameters
        ----------
        rank : int
            The lower, the earlier its tasks are taken; no two bundles at work have the same.
        at_hand : callable
            Whether what its next task needs is there. It is asked while an earlier bundle is at work, often, with a
            lock held. Where it raises, a task is taken all the same: the same will be raised to whoever waits for it.
        """
        return Ranked(self, rank, at_hand)

    def begin(self, rank: int, at_hand: Callable[[], bool]) -> None:
        """A bundle is at work."""
        with self._changed:
            self._bundles[rank] = at_hand

    def end(self, rank: int) -> None:
        """A bundle is done, and another one may be the earliest."""
        with self._changed:
            del self._bundles[rank]
            self._changed.notify_all()

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
            self._waiting.setdefault(rank, deque()).append((future, body))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Cancel what waits, and wait for what is at work."""
        with self._changed:
            self._closed = True
            dropped = [future for tasks in self._waiting.values() for future, _ in tasks]
            self._waiting.clear()
            self._changed.notify_all()
        for future in dropped:
            future.cancel()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while (task := self._next()) is None and not self._closed:
                    self._wait()
                if task is None:
                    return
                if self._waiting:
                    self._changed.notify()
            future, body = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                found = body()
            except BaseException as error:  # it is for whoever waits for the result
                future.set_exception(error)
            else:
                future.set_result(found)
            del future, body, task  # nothing of it is to live until the next task comes

    def _wait(self) -> None:
        """Until something may have changed; where a task waits for what it needs, one of those who wait looks again."""
        if not self._waiting or self._looking:
            self._changed.wait()
            return
        self._looking = True
        self._changed.wait(LOOK_AGAIN_S)
        self._looking = False

    def _next(self) -> Task | None:
        """Take a task of the earliest bundle, or of a later one that has what it needs at hand."""
        earliest = min([*self._bundles, *self._waiting], default=0)
        for rank in sorted(self._waiting):
            if rank == earliest or self._is_at_hand(rank):
                tasks = self._waiting[rank]
                task = tasks.popleft()
                if not tasks:
                    del self._waiting[rank]
                return task
        return None

    def _is_at_hand(self, rank: int) -> bool:
        try:
            return self._bundles.get(rank, always)()
        except Exception:  # a worker that ended here would be missed by all; the task will raise it to its owner
            return True


class Ranked:
    """What Dask asks of an executor; a bundle is at work inside its ``with`` block."""

    def __init__(self, workers: Workers, rank: int, at_hand: Callable[[], bool]) -> None:
        self._workers = workers
        self._rank = rank
        self._at_hand = at_hand
        self._max_workers = AHEAD * workers.count  # by this name Dask reads how many tasks to hand over at once

    def __enter__(self) -> Self:
        self._workers.begin(self._rank, self._at_hand)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._workers.end(self._rank)

    def submit(self, body: Callable[..., Any], *args: Any) -> Future[Any]:
        """Have ``body(*args)`` done."""
        return self._workers.submit(self._rank, lambda: body(*args))
