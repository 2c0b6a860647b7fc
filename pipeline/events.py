"""What happens during a build or a run, as small records. Nothing below `cli/` prints; listeners get these.

A listener is any callable that takes one event. It is called from several threads, one call at a time. An OSError of a
listener is the end of its listening, not of the work.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """Something the user should know, said once."""

    text: str


@dataclass(frozen=True, slots=True)
class CopyProgress:
    """`build --store copy` has written `nbytes` more of `total` bytes of a model."""

    model: str
    nbytes: int
    total: int


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """`build` has fetched a file of `nbytes` of the `total` bytes that are missing of a model of the hub."""

    model: str
    nbytes: int
    total: int


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run begins: `total_bytes` are to be read and written in all sweeps together, `done_bytes` of them are done.

    It may take `allowed_bytes` of memory.
    """

    total_bytes: int
    tensors: int
    done_bytes: int = 0
    allowed_bytes: int = 0


@dataclass(frozen=True, slots=True)
class UnitFinished:
    """One unit of one tensor is done: `stage` is the name of a sweep, or "apply"; `nbytes` were read or written."""

    tensor: str
    stage: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class TensorFinished:
    """All units of a tensor are done."""

    name: str


@dataclass(frozen=True, slots=True)
class ShardSealed:
    """An output file is complete and checked."""

    file: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The output is complete."""

    output: str
    seconds: float


Event = Note | CopyProgress | DownloadProgress | RunStarted | UnitFinished | TensorFinished | ShardSealed | RunFinished
Listener = Callable[[Event], None]


class Announcer:
    """Passes events on to one listener, one at a time.

    A listener that can't write any more (its terminal is gone, the program behind its pipe has ended) hears nothing
    further: the work goes on without it.
    """

    def __init__(self, listener: Listener | None) -> None:
        self._listener = listener
        self._lock = threading.Lock()

    def __call__(self, event: Event) -> None:
        """Tell the listener, if there is one."""
        with self._lock:
            if self._listener is not None:
                try:
                    self._listener(event)
                except OSError as error:
                    self._listener = None
                    logger.info("the listener is told no more: %s", error)
