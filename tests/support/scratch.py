"""Where thousands of small files are written and synced: in memory, where there is some to write to."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MEMORY = Path("/dev/shm")
LEAST_BYTES = 512 * 1024 * 1024


def folder_in_memory() -> Path | None:
    """A folder in memory with room to work in, if there is one: containers may have one of 64 MB, or none."""
    if not os.access(MEMORY, os.W_OK | os.X_OK) or shutil.disk_usage(MEMORY).free < LEAST_BYTES:
        return None
    return MEMORY
