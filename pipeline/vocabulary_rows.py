"""Row maps and made rows in the workspace: written by `build`, opened by `run`.

    vocabulary/
      map-N                one row map, shared by the tensors of a model that have the same
      made-N/, wanted      rows that stand in no input: see :mod:`mergepipe.pipeline.made_rows`
      record.json          size and checksum of the files above; written last

The plan names them by hash: its id covers which row goes where, and a run refuses files that are not those it means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline.made_rows import WANTED, load_wanted, make_rows, save_wanted
from mergepipe.pipeline.vocabulary import Gather, Vocabulary
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from mergepipe.storage.gather import GATHER_BYTES, GatheredArray, GatheredManifest, RowMap
from mergepipe.storage.layout import OutputTensor
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.writer import crc32c_of_range

RECORD = "record.json"


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
    folder: Path,
    vocabulary: Vocabulary,
    paths: Sequence[str],
    manifests: Mapping[int, ChunkManifest],
    check_sources: Callable[[], None],
) -> None:
    """Write the maps, and make the rows that can be made.

    Parameters
    ----------
    folder : Path
        `vocabulary` of the workspace; made if need be.
    vocabulary : Vocabulary
    paths : sequence of str
        What to call each model in messages.
    manifests : mapping of int to ChunkManifest
        Of their stores, by number of the model; without those of models that are yet to be made.
    check_sources : callable
        Called when rows are made and before they are to be believed; raises if an input is not what it was.

    Raises
    ------
    NonFiniteError, DiskFullError
        As :func:`mergepipe.pipeline.made_rows.make_rows`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).unlink(missing_ok=True)
    maps = {gather.row_map.digest: gather.row_map for gather in vocabulary.gathers}
    for name, row_map in maps.items():
        row_map.save(folder / f"map-{name}")
    files = [f"map-{name}" for name in maps]
    wanted = [gather for gather in vocabulary.gathers if gather.made.count]
    late = {gather.model for gather in wanted if not manifests.keys() >= {*gather.made.peers}}
    files += make_rows(folder, [gather for gather in wanted if gather.model not in late], paths, manifests)
    if late:
        save_wanted(folder / WANTED, [gather for gather in wanted if gather.model in late])
        files.append(WANTED)
    check_sources()
    _record(folder, files)


def make_late_rows(
    folder: Path,
    planned: PlannedVocabulary | None,
    paths: Sequence[str],
    manifests: Mapping[int, ChunkManifest],
    check_sources: Callable[[], None],
) -> None:
    """Make the rows that `build` could not make, now that all models are there.

    Parameters
    ----------
    folder : Path
        `vocabulary` of the workspace.
    planned : PlannedVocabulary or None
    paths, manifests, check_sources
        As for :func:`write_rows`.

    Raises
    ------
    WorkspaceError
        If a file is gone or damaged.
    NonFiniteError, DiskFullError
        As :func:`mergepipe.pipeline.made_rows.make_rows`.
    """
    if planned is None or not planned.gathers:
        return
    files = _check_files(folder)
    if WANTED not in files:
        return
    gathers = load_wanted(folder / WANTED, _maps(folder, planned))
    made = make_rows(folder, gathers, paths, manifests)
    check_sources()
    _record(folder, [*(name for name in files if name != WANTED), *made])


def _record(folder: Path, files: Sequence[str]) -> None:
    record = {name: [(folder / name).stat().st_size, _crc32c(folder / name)] for name in files}
    write_atomic(folder / RECORD, json.dumps(record).encode())


def _crc32c(path: Path) -> int:
    return crc32c_of_range(path, 0, path.stat().st_size)


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
    maps = _maps(folder, planned)
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


def _maps(folder: Path, planned: PlannedVocabulary) -> dict[str, RowMap]:
    return {name: RowMap.load(folder / f"map-{name}", name) for name in {one.row_map for one in planned.gathers}}


def _check_files(folder: Path) -> list[str]:
    """Compare every file with its checksum; their names."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        for name, (size, checksum) in record.items():
            path = folder / name
            if path.stat().st_size != size or _crc32c(path) != checksum:
                raise ValueError(f"'{name}' does not match its checksum")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise WorkspaceError(f"'{folder}' is not as `build` left it ({error}): build the workspace again") from error
    return list(record)
