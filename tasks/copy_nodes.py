"""The nodes of a tensor that is taken over as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Reader
from mergepipe.tasks.method import Reduction
from mergepipe.tasks.nodes import Sink, Turn
from mergepipe.tasks.sources import TensorSource


class TensorCopy:
    """One tensor that is taken over as it is, byte for byte.

    Parameters
    ----------
    source : TensorSource
    units : sequence of (int, int)
        First element and one past the last of each unit.
    reader, sink, stop, report
        As for :class:`mergepipe.tasks.nodes.TensorWork`.
    """

    sweeps: tuple[Reduction, ...] = ()
    steps: tuple[str, ...] = ()
    sweep_units: tuple[tuple[int, int], ...] = ()

    def __init__(
        self,
        source: TensorSource,
        units: Sequence[tuple[int, int]],
        reader: Reader,
        sink: Sink,
        stop: Callable[[], None],
        report: Callable[[str, int], None],
    ) -> None:
        self.source = source
        self.units = tuple(units)
        self._itemsize = DTYPES[source.dtype].itemsize
        self._reader = reader
        self._sink = sink
        self._stop = stop
        self._report = report
        self._turn = Turn()

    def begin_sample(self) -> None:
        """Nothing is looked at before."""

    def begin(self) -> None:
        """Tell the reader what will be asked for."""
        self._reader.ahead([self._segments(unit)] for unit in self.units)

    def is_at_hand(self) -> bool:
        """Whether the reader has the next unit."""
        _, unit = self._turn.at
        return unit == len(self.units) or self._reader.holds([self._segments(self.units[unit])])

    def end(self) -> None:
        """Nothing is kept, so nothing to forget."""

    def _segments(self, unit: tuple[int, int]) -> Sequence[Segment]:
        return self.source.manifest.segments(self.source.name, *unit)

    def apply(self, unit: int, *_after: object) -> None:
        """Copy one unit."""
        self._turn.reach(0, unit + 1)
        start, stop = self.units[unit]
        nbytes = (stop - start) * self._itemsize
        with (
            self._sink.unit(start * self._itemsize, nbytes, partial(self._report, "apply", 2 * nbytes)) as out,
            self._reader.window(self._segments(self.units[unit]), last=True) as window,
        ):
            self._stop()
            out[:] = window
