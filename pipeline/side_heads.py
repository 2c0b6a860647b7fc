"""What is copied beside the output: heads that models keep for themselves, and what masks need of the base.

A head is `heads/NAME` in the output, a small checkpoint of its own. Where a method keeps masks over a base that is read
with the rows of another vocabulary, those rows are `tasks/base.safetensors` (:mod:`mergepipe.pipeline.masks`). The
files are allocated with those of the merge, before work starts, and written after it: they are copies, made in
moments, so an interrupted run makes them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergepipe.pipeline import outputs
from mergepipe.pipeline.masks import BASE_ROWS, kept_base
from mergepipe.pipeline.plan import Plan, Source
from mergepipe.pipeline.side_files import copy_side_files
from mergepipe.storage.layout import OutputTensor, PlacedTensor, ShardLayout, lay_out
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import Reader
from mergepipe.storage.writer import ShardWriter, take_up

PIECE_ELEMENTS = 256 * 1024
"""Copied at once: a head may be as large as any tensor, and there may be little memory left for it."""


class SideHeads:
    """The copies of one run; of no consequence where there are none.

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
        self._base = kept_base(plan)
        self._base_writer: ShardWriter | None = None

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
        if self._base:
            layout = base_layout(self._base, self._manifests)
            self._base_writer = take_up(Path(self._plan.output) / outputs.TASKS_FOLDER, layout)

    def write(self, reader: Reader) -> None:
        """Copy every head, its model's configuration, and rows of the base, and give the files their names."""
        for label, sources in self._plan.side.items():
            number, writer = sources[0].model, self._writers[label]
            for place in writer.layout.tensors:
                self._copy(number, place.name, place, writer, reader)
            writer.seal(sha256=False)
            model = self._plan.models[number]
            copy_side_files(Path(model.path), writer.final.parent, {}, model.drops)
            writer.publish()
        if self._base_writer is not None:
            for place in self._base_writer.layout.tensors:
                source = self._base[place.name]
                self._copy(source.model, source.name, place, self._base_writer, reader)
            self._base_writer.seal(sha256=False)
            self._base_writer.publish()

    def _copy(self, number: int, name: str, place: PlacedTensor, writer: ShardWriter, reader: Reader) -> None:
        size = math.prod(place.shape)
        itemsize = place.nbytes // max(1, size)
        for start in range(0, size, PIECE_ELEMENTS):
            stop = min(start + PIECE_ELEMENTS, size)
            with reader.window(self._manifests[number].segments(name, start, stop), last=True) as window:
                writer.write(place.offset + start * itemsize, window)

    def close(self) -> None:
        """Give the file descriptors back."""
        for writer in self._writers.values():
            writer.close()
        if self._base_writer is not None:
            self._base_writer.close()


def base_layout(kept: Mapping[str, Source], manifests: Sequence[ChunkManifest]) -> ShardLayout:
    """The file with what masks need of the base."""
    tensors = [OutputTensor(name, one.dtype, manifests[one.model].shape(one.name)) for name, one in kept.items()]
    return replace(lay_out([tensors], {"format": "pt"}).shards[0], file=BASE_ROWS)
