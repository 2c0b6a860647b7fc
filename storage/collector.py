"""The garbage collector, kept from what lasts: millions of records, and what modules are made of."""

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


@contextmanager
def imports_that_stay() -> Iterator[None]:
    """Keep the cyclic collector from running while modules are imported, and from ever looking at what they are.

    For a process of our own, which would go through 100,000 objects twice before it reads a byte. Whatever is there in
    the end is never looked at for cycles again; so this happens once in a process.
    """
    with paused_collector():
        yield
        if not gc.get_freeze_count():
            gc.freeze()
