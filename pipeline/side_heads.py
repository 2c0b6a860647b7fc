"""Heads that models keep for themselves: `heads/NAME` in the output, each a small checkpoint of its own.

Their files are allocated with those of the merge, before work starts, and written after it: they are copies, made in
moments, so an interrupted run makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from mergepipe.pipeline import outputs
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.layout import OutputTensor, PlacedTensor, lay_out
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import Reader
from mergepipe.storage.writer import ShardWriter, take_up

PIECE_ELEMENTS = 256 * 1024
"""Copied at once: a head may be as large as any tensor, and there may be little memory left for it."""


class SideHeads:
    """The heads of one run; of no consequence where models keep none.

    Parameters
    ----------
    plan : Plan
    manifests : sequence of ChunkManifest
        One per model.
    """

    def __init__(self, plan: Plan, manifests: Sequence[ChunkManifest]) -> None:
        self._plan = plan
        self._manifests = manifests
        self._writers: dict[str, ShardWriter] = {}

    def open(self) -> None:
        """Allocate all files.

        Raises
        ------
        DiskFullError
        """
        for label, sources in self._plan.side.items():
            manifest = self._manifests[sources[0].model]
            tensors = [OutputTensor(source.name, source.dtype, manifest.shape(source.name)) for source in sources]
            folder = Path(self._plan.output) / outputs.HEADS_FOLDER / label
            self._writers[label] = take_up(folder, lay_out([tensors], {"format": "pt"}).shards[0])

    def write(self, reader: Reader) -> None:
        """Copy every head and its model's configuration, and give the files their names."""
        for label, sources in self._plan.side.items():
            number, writer = sources[0].model, self._writers[label]
            for place in writer.layout.tensors:
                self._copy(number, place, writer, reader)
            writer.seal(sha256=False)
            model = self._plan.models[number]
            outputs.copy_sidecars(Path(model.path), writer.final.parent, {}, model.drops)
            writer.publish()

    def _copy(self, number: int, place: PlacedTensor, writer: ShardWriter, reader: Reader) -> None:
        size = math.prod(place.shape)
        itemsize = place.nbytes // max(1, size)
        for start in range(0, size, PIECE_ELEMENTS):
            stop = min(start + PIECE_ELEMENTS, size)
            with reader.window(self._manifests[number].segments(place.name, start, stop), last=True) as window:
                writer.write(place.offset + start * itemsize, window)

    def close(self) -> None:
        """Give the file descriptors back."""
        for writer in self._writers.values():
            writer.close()
