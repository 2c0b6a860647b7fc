"""`mergepipe` with somebody looking: ``python -m benchmarks.watched FILE run -w FOLDER``.

Every few milliseconds each thread is asked which function it is in, and the kernel what processor time the thread took
since. Compiled loops and system calls give the interpreter free, so what they take is seen as the function that called
them; a piece of Python that doesn't is seen with a few milliseconds' delay. What was seen is written to FILE as JSON
when the command has ended.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections import Counter
from pathlib import Path, PurePath
from types import FrameType
from typing import Any, Self

# The modules of the command line are imported where they are used: their import is a part of what is looked at.

INTERVAL_S = 0.005

KINDS = {
    "disk": (
        "storage/direct.py:_read_direct",
        "storage/readers.py:read_into",
        "storage/readers.py:_populate",
        "storage/writer.py:_write_all",
        "storage/writer.py:sync",
    ),
    "kernels": ("tasks/jit.py:__call__",),
    "hashing": ("storage/digest.py:_take", "storage/digest.py:put"),
}
"""Functions that wait for the disk, that run compiled loops, and that hash."""

WAITING = ("threading.py", "thread.py", "queue.py", "selectors.py")
"""Modules of the standard library in which threads wait for one another."""

_KIND_OF = {function: kind for kind, functions in KINDS.items() for function in functions}


class Watch:
    """What the threads of this process do, from the start to the end of a block.

    Attributes
    ----------
    instants : list of dict
        Of each moment: `at`, seconds since the beginning; `seen`, how many threads were at something, and `cpu_s`, the
        processor time that was taken since the moment before, both by kind: one of :data:`KINDS`, "dask", "waiting"
        for another thread, or "rest".
    """

    def __init__(self) -> None:
        self.instants: list[dict[str, Any]] = []
        self._used: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(INTERVAL_S):
            kinds = {thread: kind_of(frame) for thread, frame in sys._current_frames().items()}
            seen: Counter[str] = Counter()
            cpu_s: Counter[str] = Counter()
            for thread in threading.enumerate():
                if thread is not self._thread and thread.ident in kinds and thread.native_id is not None:
                    seen[kinds[thread.ident]] += 1
                    cpu_s[kinds[thread.ident]] += self._since(thread.native_id)
            self.instants.append({"at": time.perf_counter() - self._began, "seen": seen, "cpu_s": cpu_s})

    def _since(self, thread: int) -> float:
        """Processor time of a thread since it was asked before; 0 once it has ended."""
        try:
            used = int(Path(f"/proc/self/task/{thread}/schedstat").read_bytes().split()[0]) * 1e-9
        except (FileNotFoundError, ProcessLookupError):
            return 0.0
        before, self._used[thread] = self._used.get(thread, 0.0), used
        return used - before


def kind_of(frame: FrameType) -> str:
    """What a thread does, by the function that it is in."""
    path = PurePath(frame.f_code.co_filename)
    if path.name in WAITING:
        return "waiting"
    if "dask" in path.parts:
        return "dask"
    return _KIND_OF.get(f"{path.parent.name}/{path.name}:{frame.f_code.co_name}", "rest")


def main() -> None:
    """Run the command that the arguments after the first say, and end with its exit code."""
    file, *arguments = sys.argv[1:]
    sys.argv = ["mergepipe", *arguments]
    with Watch() as watch:
        from mergepipe.cli import main as cli

        gc.set_threshold(cli.OBJECTS_BETWEEN_COLLECTIONS)
        code = cli.main()
    Path(file).write_text(json.dumps(watch.instants), encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
