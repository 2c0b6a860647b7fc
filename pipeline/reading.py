"""How a run reads its inputs: past the page cache or through it, in which units, with which checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.inputs import all_direct
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.probe import MOST_DEPTH, USUAL, fastest
from mergepipe.pipeline.schedule import ScheduledTensor, pool_bytes, schedule
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.direct import IO_THREADS, DirectReader
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader, Reader

ReaderKind = Literal["auto", "mmap", "direct"]


@dataclass(frozen=True, slots=True)
class Reading:
    """How to read, and a plan cut into units that a reader and the workers can hold at once.

    Attributes
    ----------
    direct : bool
        Whether past the page cache.
    depth : int
        How many reads a direct reader has under way.
    measured : str
        The way that was found to be the fastest here, with rates; empty where nothing was measured.
    gathered : tuple of bool
        For each model whether its units are gathered into buffers.
    scheduled : tuple of ScheduledTensor
    files : CheckedFiles
        What the reader opens its files with.
    """

    direct: bool
    gathered: tuple[bool, ...]
    scheduled: tuple[ScheduledTensor, ...]
    files: CheckedFiles
    depth: int = IO_THREADS
    measured: str = ""

    def open(self) -> Reader:
        """The reader, for the caller to close."""
        return DirectReader(self.pool, self.depth, files=self.files) if self.direct else MmapReader(files=self.files)

    @property
    def pool(self) -> int:
        """Bytes that a direct reader may keep."""
        return pool_bytes(self.scheduled)


def choose_reading(kind: ReaderKind, plan: Plan, ceiling: Ceiling, manifests: Sequence[ChunkManifest]) -> Reading:
    """Decide how to read.

    Parameters
    ----------
    kind : {'auto', 'mmap', 'direct'}
        'auto' reads past the page cache where all filesystems allow that and the ceiling has room for the buffers that
        it takes; mapped windows need none. Of large inputs a sample is read first, to see which way is the fastest.
    plan : Plan
    ceiling : Ceiling
    manifests : sequence of ChunkManifest
        One per model.

    Raises
    ------
    MemoryBudgetError
        If a unit does not fit the ceiling.
    """
    files = CheckedFiles(root for manifest in manifests if (root := manifest.root) is not None)
    way, measured = USUAL, ""
    if kind == "direct" or (kind == "auto" and all_direct(manifests)):
        gathered = (True,) * len(manifests)
        try:
            scheduled = schedule(plan, ceiling, gathered=gathered)
            if kind == "auto":
                # Rows of vocabularies are gathered beside each read: there is room for the usual number of them.
                most = MOST_DEPTH if plan.vocabulary is None else IO_THREADS
                own = [manifest for manifest in manifests if manifest.kind == "virtual"]
                inputs = {info.path: info for manifest in own for info in manifest.files}
                way, measured = fastest(tuple(inputs.values()), ceiling.workers, most)
            if way.direct:
                return Reading(True, gathered, scheduled, files, way.depth, measured)
        except MemoryBudgetError:
            if kind == "direct":
                raise
    gathered = tuple(not manifest.is_mappable for manifest in manifests)
    return Reading(False, gathered, schedule(plan, ceiling, gathered=gathered), files, measured=measured)
