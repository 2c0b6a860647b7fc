"""The threads that feed bundles to Dask, and how they end: all done, one failed, or asked to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from mergepipe.errors import Interrupted


class Drivers:
    """Hands bundles out to a few threads.

    Parameters
    ----------
    stop : threading.Event
        Set from outside to end the work, and from inside when something failed.
    how_to_go_on : str
        What to tell a user who stopped the run.
    """

    def __init__(self, stop: threading.Event, how_to_go_on: str) -> None:
        self._stop = stop
        self._how_to_go_on = how_to_go_on
        self._errors: list[BaseException] = []
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    @property
    def stopping(self) -> bool:
        """Whether the work is to end."""
        return self._stop.is_set()

    def check_stop(self) -> None:
        """Raise :class:`Interrupted` if the work is to end."""
        if self._stop.is_set():
            raise Interrupted(f"interrupted; what was done is kept, {self._how_to_go_on}")

    def fail(self, error: BaseException) -> None:
        """Whatever fails ends the work; the first error is the one to report."""
        with self._lock:
            if not isinstance(error, Interrupted):
                self._errors.append(error)
        self._stop.set()

    def raise_failure(self) -> None:
        """Raise the first error there was, if any; else :class:`Interrupted` if the work is to end."""
        if self._errors:
            raise self._errors[0]
        self.check_stop()

    def drive(self, bundles: Iterator[list[int]], run: Callable[[list[int]], None], threads: int) -> None:
        """Run every bundle, and wait for them in a way that Ctrl-C can interrupt.

        Parameters
        ----------
        bundles : iterator of list of int
            Asked by one thread at a time; may wait.
        run : callable
            Carries one bundle out; called from several threads.
        threads : int

        Raises
        ------
        Interrupted
            If the work was stopped; whatever a bundle raised, if one failed.
        """
        drivers = [
            threading.Thread(target=self._work, args=(bundles, run), name=f"mergepipe-driver-{n}")
            for n in range(threads)
        ]
        for driver in drivers:
            driver.start()
        try:
            for driver in drivers:
                while driver.is_alive():
                    driver.join(0.1)
        except KeyboardInterrupt:
            self._stop.set()
            for driver in drivers:
                driver.join()
        self.raise_failure()

    def _work(self, bundles: Iterator[list[int]], run: Callable[[list[int]], None]) -> None:
        while not self._stop.is_set():
            try:
                with self._turn:
                    bundle = next(bundles, [])
                if not bundle:
                    return
                run(bundle)
            except BaseException as error:
                self.fail(error)
