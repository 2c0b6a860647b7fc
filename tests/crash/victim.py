"""The process that suffers. It warms up once, then forks a child for every life it is asked to live.

One JSON object a line on stdin says what to do and which fault is to happen; one line on stdout says how it ended.
Run by :mod:`tests.crash.conftest`, with the tests folder on the path.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from faults import KINDS, Faults

import mergepipe
from mergepipe.errors import MergepipeError
from mergepipe.pipeline.commits import Committer
from mergepipe.storage.atomic import write_atomic
from mergepipe.tasks.nodes import TensorWork
from support.jobs import build_job, write_job


def live(task: dict[str, Any]) -> dict[str, Any]:
    """Do one task with its fault; does not return if that is a death."""
    kind = task["kind"] if task["kind"] in KINDS else "none"
    faults = Faults(kind, task["at"], task.get("seed", 0), Path(task["work"]) / "statistics")
    if task["kind"] == "rewritten":
        rewrite_at(faults, task["at"], Path(task["file"]), task["calls"])
    if task["kind"] == "raise":
        raise_at(task["at"])
    if task["kind"] == "later":
        threading.Thread(target=kill_after, args=(task["seconds"],), daemon=True).start()
    notes: list[str] = []
    try:
        if task["action"] == "write":
            write_atomic(task["file"], task["data"].encode())
        elif task["action"] == "build":
            mergepipe.build(task["recipe"], work=task["work"], **task["options"])
        else:
            mergepipe.run(task["work"], on_event=lambda event: notes.append(str(event)), **task["options"])
    except MergepipeError as error:
        return {"end": "error", "code": error.exit_code, "message": str(error), "calls": faults.calls}
    except Exception as error:
        return {"end": "bug", "code": 1, "message": repr(error), "calls": faults.calls}
    return {"end": "done", "code": 0, "message": "\n".join(notes), "calls": faults.calls}


def raise_at(number: int) -> None:
    """Let the n-th unit fail in its worker thread."""
    apply, lock, count = TensorWork.apply, threading.Lock(), 0

    def failing(self: TensorWork, unit: int, *after: object) -> None:
        nonlocal count
        with lock:
            count += 1
            if count == number:
                raise RuntimeError("a worker failed (injected)")
        apply(self, unit, *after)

    TensorWork.apply = failing  # type: ignore[method-assign]


def rewrite_at(faults: Faults, at: int, path: Path, calls: int) -> None:
    """At the n-th call have all values of an input zero; so many calls later they are as they were, and its time, too.

    With no number of calls they stay zero.
    """
    data, status = path.read_bytes(), path.stat()
    start = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 0

    def put(tail: bytes) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(tail)

    def restore() -> None:
        put(data[start:])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    faults.events[at] = lambda: put(bytes(len(data) - start))
    if calls:
        faults.events[at + calls] = restore


def kill_after(seconds: float) -> None:
    """Die at a moment that no call marks."""
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Fork, let the child do the task, and tell how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        code = 1
        try:
            os.write(writing, json.dumps(live(task)).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"end": "killed", "code": -os.WTERMSIG(status), "message": "", "calls": 0}
    return json.loads(text) if text else {"end": "bug", "code": 1, "message": "no answer", "calls": 0}


def main() -> None:
    # Every unit is committed on its own, so that a small job has many moments to die at.
    Committer.__init__.__kwdefaults__.update(max_bytes=1, max_seconds=0.01)
    with tempfile.TemporaryDirectory() as folder:
        write_job(Path(folder))
        mergepipe.run(build_job(Path(folder)))
    # A child that collects would write into every object it has from here, and copy the pages.
    gc.freeze()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
