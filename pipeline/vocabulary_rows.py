"""Row maps and made rows in the workspace: written by `build`, opened by `run`.

    vocabulary/
      map-N                one row map, shared by the tensors of a model that have the same
      made-N/              rows of model N that stand in no input, as a small checkpoint
      record.json          size and checksum of the files above; written last

The plan names them by hash: its id covers which row goes where, and a run refuses files that are not those it means.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.errors import NonFiniteError, WorkspaceError
from mergepipe.pipeline.vocabulary import NOBODY, Gather, Vocabulary
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checked import CheckedFiles
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.gather import GATHER_BYTES, GatheredArray, GatheredManifest, RowMap
from mergepipe.storage.layout import OutputTensor, lay_out
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.readers import MmapReader, Reader
from mergepipe.storage.writer import ShardWriter, crc32c_of_range
from mergepipe.tasks import convert

RECORD = "record.json"

BLOCK_BYTES = 4 * 1024 * 1024
"""float64 values that are added up at a time while rows are made."""


@dataclass(frozen=True, slots=True)
class PlannedGather:
    """A gathered tensor: of which model, under which name, with which of the plan's row maps."""

    model: int
    name: str
    shape: tuple[int, ...]
    axis: int
    row_map: str
    made: int


@dataclass(frozen=True, slots=True)
class PlannedVocabulary:
    """What a plan keeps of a vocabulary.

    Attributes
    ----------
    tokens, rows : int
        Tokens of the merge, and rows of its tables, padding included.
    gathers : tuple of PlannedGather
    digest : str
        Hash of every row map and of what made rows are made of.
    held : int
        Bytes that the row maps take while a run goes on.
    made_bytes : int
        Bytes of all rows that are made, on disk.
    models : int
        Number that row maps have for the made rows: one past the last checkpoint that is read.
    """

    tokens: int
    rows: int
    gathers: tuple[PlannedGather, ...]
    digest: str
    held: int
    made_bytes: int
    models: int

    def is_gathered(self, model: int, name: str) -> bool:
        """Whether a tensor of a model is gathered."""
        return any(gather.model == model and gather.name == name for gather in self.gathers)

    def reserved_bytes(self, readers: int) -> int:
        """Memory of a run that no unit of work counts: the maps, and what `readers` windows at once take."""
        return self.held + readers * GATHER_BYTES if self.gathers else 0


def planned_vocabulary(vocabulary: Vocabulary, checkpoints: Sequence[Checkpoint]) -> PlannedVocabulary:
    """What the plan says of a vocabulary; `checkpoints` as they lie on disk."""
    gathers, maps, digest, made_bytes = [], {}, hashlib.sha256(), 0
    for gather in vocabulary.gathers:
        entry = checkpoints[gather.model].tensors[gather.name]
        name, shape = gather.row_map.digest, gather.shape(entry)
        maps[name] = gather.row_map
        gathers.append(PlannedGather(gather.model, gather.name, shape, gather.axis, name, gather.made.count))
        digest.update(f"{gather.model} {gather.name} {name} {gather.made.peers} {gather.made.padding}".encode())
        digest.update(gather.made.rows.astype("<i8").tobytes())
        made_bytes += _made_tensor(gather, entry).nbytes
    held = sum(row_map.nbytes for row_map in maps.values())
    tokens = len(vocabulary.merged.ids)
    return PlannedVocabulary(
        tokens, vocabulary.rows, tuple(gathers), digest.hexdigest()[:32], held, made_bytes, vocabulary.inputs
    )


def _made_tensor(gather: Gather, entry: TensorEntry) -> OutputTensor:
    return OutputTensor(gather.name, entry.dtype, (gather.made.count, *entry.shape[gather.axis + 1 :]))


# -- build


def write_rows(
    folder: Path, vocabulary: Vocabulary, checkpoints: Sequence[Checkpoint], manifests: Mapping[int, ChunkManifest]
) -> None:
    """Write the maps and make the rows.

    Parameters
    ----------
    folder : Path
        `vocabulary` of the workspace; made if need be.
    vocabulary : Vocabulary
    checkpoints : sequence of Checkpoint
        As they lie on disk.
    manifests : mapping of int to ChunkManifest
        Of their stores, by number of the model; of all that lend rows which are averaged.

    Raises
    ------
    NonFiniteError
        If a row that is averaged holds a NaN or an infinity.
    DiskFullError
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    maps = {gather.row_map.digest: gather.row_map for gather in vocabulary.gathers}
    for name, row_map in maps.items():
        row_map.save(folder / f"map-{name}")
    files = [f"map-{name}" for name in maps]
    roots = (root for manifest in manifests.values() if (root := manifest.root) is not None)
    with MmapReader(files=CheckedFiles(roots)) as reader:
        for model in sorted({gather.model for gather in vocabulary.gathers if gather.made.count}):
            of_model = [gather for gather in vocabulary.gathers if gather.model == model and gather.made.count]
            _make(folder / f"made-{model}", of_model, checkpoints, manifests, reader)
            files.append(f"made-{model}/model.safetensors")
    record = {name: [(folder / name).stat().st_size, _crc32c(folder / name)] for name in files}
    write_atomic(folder / RECORD, json.dumps(record).encode())


def _crc32c(path: Path) -> int:
    return crc32c_of_range(path, 0, path.stat().st_size)


def _make(
    folder: Path,
    gathers: Sequence[Gather],
    checkpoints: Sequence[Checkpoint],
    manifests: Mapping[int, ChunkManifest],
    reader: Reader,
) -> None:
    folder.mkdir(exist_ok=True)
    tensors = [_made_tensor(gather, checkpoints[gather.model].tensors[gather.name]) for gather in gathers]
    layout = lay_out([tensors], {"format": "pt"})
    writer = ShardWriter(folder, layout.shards[0])
    for gather in gathers:
        at = layout.places[gather.name].offset
        for rows in _RowMaker(gather, checkpoints, manifests, reader).rows():
            writer.write(at, rows)
            at += rows.nbytes
    writer.seal(sha256=False)
    writer.publish()


class _RowMaker:
    """Makes the rows of one tensor of one model."""

    def __init__(
        self, gather: Gather, checkpoints: Sequence[Checkpoint], manifests: Mapping[int, ChunkManifest], reader: Reader
    ) -> None:
        self.gather = gather
        self.own = checkpoints[gather.model].tensors[gather.name]
        self.row = self.own.shape[gather.axis + 1 :]
        self.width = math.prod(self.row)
        self.roots = [checkpoints[peer].root for peer in gather.made.peers]
        self.entries = [checkpoints[peer].tensors[gather.name] for peer in gather.made.peers]
        self.tables = [(manifests[peer], gather.name) for peer in gather.made.peers]
        self.reader = reader
        self.step = max(1, BLOCK_BYTES // (8 * max(1, self.width)))
        self.total = np.zeros(self.width)

    def rows(self) -> Iterator[npt.NDArray[Any]]:
        """Stored bits of some rows after another, shape (rows * width,)."""
        wanted = self.gather.made.rows
        if DTYPES[self.own.dtype].role != "merged":
            # Integers have no mean.
            yield np.zeros(self.gather.made.count * self.width, DTYPES[self.own.dtype].bits)
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
        entry = self.entries[peer]
        row_map = RowMap.of(np.zeros(len(rows), np.int64), rows)
        array = GatheredArray.of(entry.dtype, self.row, row_map, {0: self.tables[peer]})
        out = np.empty(len(rows) * self.width)
        with self.reader.window(array.segments(0, out.size), last=False) as window:
            bad = convert.decode(window.view(DTYPES[entry.dtype].bits), entry.dtype, out)
        if bad >= 0:
            raise NonFiniteError(
                f"row {int(rows[bad // self.width])} of '{entry.name}' in '{self.roots[peer]}' a NaN or an "
                f"infinity, and is needed for a token that a model lacks: repair it"
            )
        return out.reshape(len(rows), self.width)

    def _stored(self, values: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
        out = np.empty(values.size, DTYPES[self.own.dtype].bits)
        if convert.encode(values.reshape(-1), self.own.dtype, out) >= 0:
            raise NonFiniteError(f"the mean of rows of '{self.own.name}' overflows {DTYPES[self.own.dtype].alias}")
        again = np.empty(values.size)
        convert.decode(out, self.own.dtype, again)
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


# -- run


def gathered_manifests(
    folder: Path, planned: PlannedVocabulary | None, manifests: Sequence[ChunkManifest]
) -> list[ChunkManifest]:
    """The manifests as a run reads through them: with the gathered tensors of a vocabulary, if there is one.

    Parameters
    ----------
    folder : Path
        `vocabulary` of the workspace.
    planned : PlannedVocabulary or None
    manifests : sequence of ChunkManifest
        One per model of the plan.

    Raises
    ------
    WorkspaceError
        If a file is gone or damaged.
    """
    if planned is None or not planned.gathers:
        return list(manifests)
    _check_files(folder)
    maps = {name: RowMap.load(folder / f"map-{name}", name) for name in {one.row_map for one in planned.gathers}}
    found = list(manifests)
    for model in sorted({gather.model for gather in planned.gathers}):
        mine = [gather for gather in planned.gathers if gather.model == model]
        parts = list(manifests[: planned.models])
        files = manifests[model].files
        if any(gather.made for gather in mine):
            made = virtual_manifest(open_checkpoint(folder / f"made-{model}"))
            parts.append(made)
            files += made.files
        arrays = {gather.name: _array(gather, manifests[model], maps[gather.row_map], parts) for gather in mine}
        found[model] = GatheredManifest(manifests[model].kind, files, manifests[model].arrays, arrays)
    return found


def _array(gather: PlannedGather, own: ChunkManifest, row_map: RowMap, parts: list[ChunkManifest]) -> GatheredArray:
    tables = {number: (part, gather.name) for number, part in enumerate(parts)}
    array = GatheredArray.of(own.arrays[gather.name].dtype, gather.shape[gather.axis + 1 :], row_map, tables)
    if row_map.rows != gather.shape[gather.axis]:
        raise WorkspaceError(f"the row map of '{gather.name}' has {row_map.rows} rows: build the workspace again")
    return array


def _check_files(folder: Path) -> None:
    """Compare every file with its checksum."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        for name, (size, checksum) in record.items():
            path = folder / name
            if path.stat().st_size != size or _crc32c(path) != checksum:
                raise ValueError(f"'{name}' does not match its checksum")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WorkspaceError(f"'{folder}' is not as `build` left it ({error}): build the workspace again") from error
