"""Run a built job in this process and print the peak of its anonymous memory: ``python -m support.peak WORK JSON``.

A fresh process, so that imports and compilation count and nothing else does.
"""

from __future__ import annotations

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert match is not None
    return int(match[1]) * 1024


def main(work: str, options: dict[str, Any]) -> None:
    peak = 0
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    import mergepipe

    idle = anonymous()
    try:
        result = mergepipe.run(work, **options)
    finally:
        ended.set()
        watcher.join()
    print(json.dumps({"peak": peak, "before": idle, "told": result.manifest["peak_anonymous_bytes"]}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
