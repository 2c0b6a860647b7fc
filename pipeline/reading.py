"""How a run reads its inputs: past the page cache or through it, in which units, with which checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.inputs import all_direct
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ScheduledTensor, pool_bytes, schedule
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.direct import DirectReader
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

    def open(self) -> Reader:
        """The reader, for the caller to close."""
        return DirectReader(self.pool, files=self.files) if self.direct else MmapReader(files=self.files)

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
        it takes; mapped windows need none.
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
    if kind == "direct" or (kind == "auto" and all_direct(manifests)):
        gathered = (True,) * len(manifests)
        try:
            return Reading(True, gathered, schedule(plan, ceiling, gathered=gathered), files)
        except MemoryBudgetError:
            if kind == "direct":
                raise
    gathered = tuple(not manifest.is_mappable for manifest in manifests)
    return Reading(False, gathered, schedule(plan, ceiling, gathered=gathered), files)
