"""Rows that stand in no input, made into the workspace: means of other models' rows, zeros, padding.

They are made by `build`. Only where a model that lends rows is yet to be made, by an earlier document of the same
recipe, has `build` no more than a list of what is wanted, and the rows are made as soon as that model is.

    vocabulary/
      made-N/              rows of model N, as a small checkpoint
      wanted               what is still to be made; gone when it is
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from mergepipe.errors import NonFiniteError
from mergepipe.pipeline.vocabulary import NOBODY, Gather, MadeRows
from mergepipe.storage.atomic import fsync_path
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.gather import GatheredArray, RowMap
from mergepipe.storage.layout import OutputTensor, lay_out
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import MmapReader, Reader
from mergepipe.storage.writer import ShardWriter
from mergepipe.tasks import convert

WANTED = "wanted"

BLOCK_BYTES = 4 * 1024 * 1024
"""float64 values that are added up at a time while rows are made."""


def make_rows(
    folder: Path, gathers: Sequence[Gather], paths: Sequence[str], manifests: Mapping[int, ChunkManifest]
) -> list[str]:
    """Make the rows that some gathered tensors want.

    Parameters
    ----------
    folder : Path
        `vocabulary` of the workspace.
    gathers : sequence of Gather
    paths : sequence of str
        What to call each model in messages.
    manifests : mapping of int to ChunkManifest
        Of the stores of all models that lend rows, by number.

    Returns
    -------
    list of str
        The files made, relative to `folder`.

    Raises
    ------
    NonFiniteError
        If a row that is averaged holds a NaN or an infinity.
    DiskFullError
    """
    files = []
    roots = (root for manifest in manifests.values() if (root := manifest.root) is not None)
    with MmapReader(files=CheckedFiles(roots)) as reader:
        for model in sorted({gather.model for gather in gathers if gather.made.count}):
            of_model = [gather for gather in gathers if gather.model == model and gather.made.count]
            _make(folder / f"made-{model}", of_model, paths, manifests, reader)
            files.append(f"made-{model}/model.safetensors")
    return files


def _make(
    folder: Path,
    gathers: Sequence[Gather],
    paths: Sequence[str],
    manifests: Mapping[int, ChunkManifest],
    reader: Reader,
) -> None:
    folder.mkdir(exist_ok=True)
    makers = [_RowMaker(gather, paths, manifests, reader) for gather in gathers]
    layout = lay_out([[maker.tensor for maker in makers]], {"format": "pt"})
    writer = ShardWriter(folder, layout.shards[0])
    for maker in makers:
        at = layout.places[maker.gather.name].offset
        for rows in maker.rows():
            writer.write(at, rows)
            at += rows.nbytes
    writer.seal(sha256=False)
    writer.publish()


# -- what is still to be made


def save_wanted(path: Path, gathers: Sequence[Gather]) -> None:
    """Keep what is to be made later; the row maps are kept elsewhere."""
    records = [
        [
            gather.model,
            gather.name,
            gather.axis,
            gather.row_map.digest,
            gather.made.peers,
            gather.made.padding,
            gather.tokens,
        ]
        for gather in gathers
    ]
    rows = {str(number): gather.made.rows for number, gather in enumerate(gathers)}
    save_file(rows | {"records": np.frombuffer(json.dumps(records).encode(), np.uint8)}, path)
    fsync_path(path)


def load_wanted(path: Path, maps: Mapping[str, RowMap]) -> list[Gather]:
    """What :func:`save_wanted` has kept."""
    rows = load_file(path)
    found = []
    for number, (model, name, axis, digest, peers, padding, tokens) in enumerate(json.loads(rows["records"].tobytes())):
        made = MadeRows(tuple(peers), rows[str(number)], padding)
        found.append(Gather(model, name, axis, maps[digest], made, tokens))
    return found


class _RowMaker:
    """Makes the rows of one tensor of one model."""

    def __init__(
        self, gather: Gather, paths: Sequence[str], manifests: Mapping[int, ChunkManifest], reader: Reader
    ) -> None:
        own = manifests[gather.model].arrays[gather.name]
        self.gather = gather
        self.dtype = own.dtype
        self.row = own.shape[gather.axis + 1 :]
        self.width = math.prod(self.row)
        self.tensor = OutputTensor(gather.name, self.dtype, (gather.made.count, *self.row))
        self.paths = [paths[peer] for peer in gather.made.peers]
        self.dtypes = [manifests[peer].arrays[gather.name].dtype for peer in gather.made.peers]
        self.tables = [(manifests[peer], gather.name) for peer in gather.made.peers]
        self.reader = reader
        self.step = max(1, BLOCK_BYTES // (8 * max(1, self.width)))
        self.total = np.zeros(self.width)

    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """Stored bits of some rows after another, shape (rows * width,)."""
        wanted = self.gather.made.rows
        if DTYPES[self.dtype].role != "merged":
            # Integers have no mean.
            yield np.zeros(self.gather.made.count * self.width, DTYPES[self.dtype].bits)
            return
        for start in range(0, len(wanted), self.step):
            yield self._stored(self._means(wanted[start : start + self.step]))
        if self.gather.made.padding:
            self._add_all()
            yield self._stored((self.total / max(1, self.gather.tokens))[None])

    def _means(self, wanted: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        sums = np.zeros((len(wanted), self.width))
        for peer in range(wanted.shape[1]):
            theirs = wanted[:, peer] != NOBODY
            if theirs.any():
                sums[theirs] += self._read(peer, wanted[theirs, peer])
        counts = np.maximum(np.count_nonzero(wanted != NOBODY, axis=1), 1)
        np.divide(sums, counts[:, None], out=sums)
        return sums

    def _read(self, peer: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Some rows of one peer, decoded."""
        row_map = RowMap.of(np.zeros(len(rows), np.int64), rows)
        array = GatheredArray.of(self.dtypes[peer], self.row, row_map, {0: self.tables[peer]})
        out = np.empty(len(rows) * self.width)
        with self.reader.window(array.segments(0, out.size), last=False) as window:
            bad = convert.decode(window.view(DTYPES[self.dtypes[peer]].bits), self.dtypes[peer], out)
        if bad >= 0:
            raise NonFiniteError(
                f"row {int(rows[bad // self.width])} of '{self.gather.name}' in '{self.paths[peer]}' holds a NaN or an "
                f"infinity, and is needed for a token that a model lacks: repair it"
            )
        return out.reshape(len(rows), self.width)

    def _stored(self, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        out = np.empty(values.size, DTYPES[self.dtype].bits)
        if convert.encode(values.reshape(-1), self.dtype, out) >= 0:
            raise NonFiniteError(f"the mean of rows of '{self.gather.name}' overflows {DTYPES[self.dtype].alias}")
        again = np.empty(values.size)
        convert.decode(out, self.dtype, again)
        self.total += again.reshape(values.shape).sum(axis=0)
        return out

    def _rows_by_source(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Source and row of every row of the gathered tensor."""
        row_map = self.gather.row_map
        lengths = np.diff(row_map.starts)
        first = np.repeat(row_map.firsts - row_map.starts[:-1], lengths)
        return np.repeat(row_map.sources, lengths), first + np.arange(row_map.rows)

    def _add_all(self) -> None:
        """Add the rows of the tensor that are not made to the total."""
        sources, rows = self._rows_by_source()
        for position, peer in enumerate(self.gather.made.peers):
            mine = np.sort(rows[sources == peer])
            for start in range(0, len(mine), self.step):
                self.total += self._read(position, mine[start : start + self.step]).sum(axis=0)
