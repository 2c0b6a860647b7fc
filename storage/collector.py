"""The garbage collector, paused while millions of lasting records are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep the cyclic collector from running meanwhile; reference counts free memory as ever.

    Plans and manifests hold no cycles, and the collector would go through all of their records again and again: a
    third of the time of a build of 45,000 tensors. Left as it was found, so this nests; a thread that makes cycles
    meanwhile keeps them until the end.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
