"""What a run really took: seconds, bytes as the kernel counts them, peak anonymous memory."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self


def anonymous_bytes() -> int:
    """Anonymous memory of this process now; 0 where the kernel does not say."""
    try:
        match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    except OSError:
        return 0
    return int(match[1]) * 1024 if match else 0


def disk_bytes() -> tuple[int, int]:
    """Bytes this process has read from and written to disks so far; (0, 0) where the kernel does not say."""
    try:
        text = Path("/proc/self/io").read_text(encoding="utf-8")
    except OSError:
        return 0, 0
    counts = {key: int(value) for key, value in re.findall(r"(\w+): (\d+)", text)}
    return counts.get("read_bytes", 0), counts.get("write_bytes", 0)


class Meter:
    """Samples this process while the `with` block runs.

    Attributes
    ----------
    seconds : float
        Wall time of the block.
    disk_read, disk_written : int
        Bytes, as the kernel counts them.
    peak_anonymous : int
        Largest anonymous memory seen, in bytes; sampled every `interval_s`.
    """

    def __init__(self, interval_s: float = 0.05) -> None:
        self.seconds = 0.0
        self.disk_read = self.disk_written = self.peak_anonymous = 0
        self._interval_s = interval_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mergepipe-meter", daemon=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._disk = disk_bytes()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self.seconds = time.monotonic() - self._started
        read, written = disk_bytes()
        self.disk_read, self.disk_written = read - self._disk[0], written - self._disk[1]

    def _watch(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                self.peak_anonymous = max(self.peak_anonymous, anonymous_bytes())
            if self._ended.wait(self._interval_s):
                return
