"""What the machine, or the control group this process lives in, has to give: memory and processors."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")

LARGE_BYTES = 1024 * 1024
_M_MMAP_THRESHOLD = -3  # <malloc.h>


def cpu_count() -> int:
    """Processors this process may use."""
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def available_bytes() -> int:
    """Memory this process may still take: of the machine, or of its control groups where that is less."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        groups = Path("/proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        found, groups = None, ""
    machine = int(found[1]) * 1024 if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    return min([machine, *group_limits(groups, GROUPS)])


def group_limits(groups: str, root: Path) -> Iterator[int]:
    """What is left in each control group that limits this process, its parents included; both versions of cgroups.

    Parameters
    ----------
    groups : str
        Contents of `/proc/self/cgroup`.
    root : Path
        Where control groups are mounted.
    """
    for line in groups.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            mounts, names = [root, root / "unified"], ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            mounts = list(dict.fromkeys((root / "memory", root / controllers)))
        else:
            continue
        own = Path(path.lstrip("/"))
        for mount in mounts:
            for folder in (mount / own, *(mount / parent for parent in own.parents)):
                left = _left(folder, *names)
                if left is not None:
                    yield left


def give_back_large_blocks() -> None:
    """Have the C library return every large block to the system once it is freed, as long as this process lives.

    glibc raises the size from which it does so up to 32 MiB as such blocks come and go, and then keeps what several
    threads have freed: 325 MiB were measured beside 550 MiB in use, in a merge of whole matrices by four workers.
    Elsewhere, nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """Have numpy, if it is loaded in here for the first time, begin no threads for its BLAS.

    OpenBLAS begins one per processor as soon as it is loaded, and while they wait for their first work they spin:
    together a twentieth of a second of CPU in which nothing is done, and numpy multiplies nothing large here. Processes
    that this one starts see their environment as it was.
    """
    name = "OPENBLAS_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _left(folder: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    """Limit less use, not counting file pages that can be dropped; None where there is no limit."""
    try:
        limit = (folder / limit_name).read_text(encoding="utf-8").strip()
        used = int((folder / used_name).read_text(encoding="utf-8"))
        cache = re.search(rf"^{cache_name} (\d+)$", (folder / "memory.stat").read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    if not limit.isdigit():
        return None
    return max(0, int(limit) - used + (int(cache[1]) if cache else 0))
