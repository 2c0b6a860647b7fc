"""Checking what lies on disk against the checksums that were kept of it: an output folder, or a workspace.

By default sizes, headers, the index and a sample of the contents are looked at, in seconds; with `full` every byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.errors import CheckpointNotFoundError, DamageError, MergepipeError
from mergepipe.pipeline import outputs, recheck
from mergepipe.pipeline.plan import Plan, PlannedModel
from mergepipe.pipeline.records import MANIFEST_NAME, read_record
from mergepipe.pipeline.resume import Progress
from mergepipe.storage.checked import is_whole_file
from mergepipe.storage.checkpoint import read_index
from mergepipe.storage.header import Header, read_header
from mergepipe.storage.journal import parse
from mergepipe.storage.layout import INDEX_NAME
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.workspace import Workspace
from mergepipe.storage.writer import crc32c_of_range

SAMPLE = 16
"""Chunks of a file that are read where not all are asked for, spread evenly, the first and the last among them."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One thing that is not as it should be.

    Attributes
    ----------
    file : str
        Path of the file.
    message : str
        What is wrong with it.
    tensors : tuple of str
        Names of the tensors hit; empty where it is no tensor's bytes.
    chunk : int or None
        Number of the damaged chunk of the file.
    """

    file: str
    message: str
    tensors: tuple[str, ...] = ()
    chunk: int | None = None

    def __str__(self) -> str:
        of = f" (tensor {', '.join(self.tensors)})" if self.tensors else ""
        at = f" chunk {self.chunk}" if self.chunk is not None else ""
        return f"'{self.file}'{at}{of}: {self.message}"


@dataclass(slots=True)
class Report:
    """What a check has found.

    Attributes
    ----------
    path : str
        What was checked.
    kind : {'output', 'workspace'}
    full : bool
        Whether every byte was read.
    files, nbytes : int
        How many files were looked at, and how many bytes of them were compared.
    damage : list of Damage
        Empty if all is well.
    notes : list of str
        What was not looked at, and why.
    """

    path: str
    kind: str
    full: bool
    files: int = 0
    nbytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def raise_for_damage(self) -> None:
        """Raise if there is any.

        Raises
        ------
        DamageError
        """
        if self.damage:
            raise DamageError("\n".join(str(item) for item in self.damage))


def verify(path: str | Path = ".mergepipe", *, full: bool = False) -> Report:
    """Check an output folder, or a workspace and the output of its plan.

    Parameters
    ----------
    path : path
    full : bool
        Read every byte.

    Returns
    -------
    Report

    Raises
    ------
    CheckpointNotFoundError
        If it is neither.
    """
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        report = Report(str(folder), "output", full)
        _check_output(folder, report)
        return report
    workspace = Workspace(folder)
    if not workspace.plan_file.is_file():
        raise CheckpointNotFoundError(f"'{folder}' is neither an output (no {MANIFEST_NAME}) nor a workspace (no plan)")
    report = Report(str(folder), "workspace", full)
    for name in workspace.earlier():
        _check_workspace(workspace.merge(name), report)
    _check_workspace(workspace, report)
    return report


def _check_output(folder: Path, report: Report) -> None:
    report.files += 1
    try:
        record = read_record(folder)
    except ValueError as error:
        report.damage.append(Damage(str(folder / MANIFEST_NAME), str(error)))
        return
    names: dict[str, str] = {}
    for shard in record["shards"]:
        path = folder / shard["file"]
        if not path.is_file():
            if shard.get("handed_over"):
                report.notes.append(f"'{path}' was handed over to a command: not checked")
            else:
                report.damage.append(Damage(str(path), "is missing"))
            continue
        names |= dict.fromkeys(_check_shard(path, shard, report), shard["file"])
    if len(record["shards"]) > 1:
        _check_index(folder / INDEX_NAME, names, record, report)
    kept = folder / outputs.CARRIED_FOLDER
    if (kept / MANIFEST_NAME).is_file():  # removed where no model is to be added any more
        _check_output(kept, report)


def _check_shard(path: Path, shard: dict[str, Any], report: Report) -> list[str]:
    """Names of the tensors of one file."""
    report.files += 1
    size = path.stat().st_size
    if size != shard["bytes"]:
        report.damage.append(Damage(str(path), f"has {size:,} bytes, expected {shard['bytes']:,}"))
        return []
    header = None
    try:
        header = read_header(path)
    except MergepipeError as error:
        report.damage.append(Damage(str(path), f"has a damaged header: {error}"))
    window, sums = shard["crc32c_bytes"], shard["crc32c"]
    for number in _chosen(len(sums), report.full):
        length = min(window, size - number * window)
        report.nbytes += length
        if crc32c_of_range(path, number * window, length) != sums[number]:
            start = number * window
            hit = _tensors(header, start, start + length)
            message = f"bytes {start:,} to {start + length:,} do not match their checksum"
            report.damage.append(Damage(str(path), message, hit, number))
    return [tensor.name for tensor in header.tensors] if header is not None else []


def _chosen(count: int, full: bool) -> Iterator[int]:
    if full or count <= SAMPLE:
        yield from range(count)
    else:
        yield from sorted({int(number) for number in np.linspace(0, count - 1, SAMPLE)})


def _tensors(header: Header | None, start: int, stop: int) -> tuple[str, ...]:
    """Names of the tensors that have bytes between two offsets of a file."""
    if header is None:
        return ()
    at = header.data_start
    return tuple(t.name for t in header.tensors if t.start + at < stop and t.stop + at > start)


def _check_index(path: Path, names: dict[str, str], record: dict[str, Any], report: Report) -> None:
    report.files += 1
    try:
        found = read_index(path)
    except MergepipeError as error:
        report.damage.append(Damage(str(path), str(error)))
        return
    there = {shard["file"] for shard in record["shards"] if (path.parent / shard["file"]).is_file()}
    for name in sorted(names.keys() - found.keys()):
        report.damage.append(Damage(str(path), f"does not list '{name}', which '{names[name]}' holds", (name,)))
    for name, file in sorted(found.items()):
        if file in there and names.get(name, file) != file:
            report.damage.append(Damage(str(path), f"says '{file}' holds '{name}', '{names[name]}' does", (name,)))


def _check_workspace(workspace: Workspace, report: Report) -> None:
    try:
        plan = Plan.from_json(workspace.read_plan())
    except MergepipeError as error:
        report.damage.append(Damage(str(workspace.plan_file), str(error)))
        return
    report.files += 1
    for number, model in enumerate(plan.models):
        path = workspace.manifest_file(number, model.label)
        if path.is_file() or not (model.made or model.role == "carried"):
            workspace.mark_damage(number, model.label, _check_store(path, model, report))
    if workspace.holder() is not None:
        report.notes.append("a run is at work: its output is not checked")
    elif outputs.finished(plan) is not None:
        _check_output(Path(plan.output), report)
    else:
        if plan.first_stage is not None:
            _check_progress(workspace.first_stage, plan.first_stage, report)
        _check_progress(workspace, plan, report)


def _check_store(path: Path, model: PlannedModel, report: Report) -> list[str]:
    """Check the files of a model; returns the chunks of a copy that `build` has to make anew."""
    report.files += 1
    try:
        manifest = ChunkManifest.load(path)
    except MergepipeError as error:
        report.damage.append(Damage(str(path), str(error)))
        return []
    for info in manifest.files:
        file = Path(info.path)
        if not file.is_file():
            report.damage.append(Damage(info.path, f"is gone ('{model.label}' needs it)"))
        elif file.stat().st_size != info.size:
            found = file.stat().st_size
            report.damage.append(Damage(info.path, f"has {found:,} bytes, had {info.size:,} when it was built"))
    return _check_copy(manifest, report) if manifest.kind == "copy" else []


def _check_copy(manifest: ChunkManifest, report: Report) -> list[str]:
    """The chunks of a copied store end in their own checksum; returns the damaged ones."""
    damaged = []
    for name, array in manifest.arrays.items():
        for chunk in _chosen(len(array.files), report.full):
            info = manifest.files[int(array.files[chunk])]
            path = Path(info.path)
            if not path.is_file() or path.stat().st_size != info.size:
                continue  # told already
            report.nbytes += info.size
            if not is_whole_file(path):
                damaged.append(info.path)
                text = "does not match its checksum: `mergepipe build` makes it anew"
                report.damage.append(Damage(info.path, text, (name,), chunk))
    return damaged


def _check_progress(workspace: Workspace, plan: Plan, report: Report) -> None:
    """Unfinished work against the journal."""
    if not workspace.journal_file.exists():
        return
    report.files += 1
    data = workspace.journal_file.read_bytes()
    records, end = parse(data)
    if end < len(data):
        lost = len(data) - end
        report.damage.append(Damage(str(workspace.journal_file), f"its last {lost:,} bytes are torn or damaged"))
    try:
        progress = Progress.replay(records)
    except MergepipeError as error:
        report.damage.append(Damage(str(workspace.journal_file), str(error)))
        return
    found = recheck.check(progress, plan, plan.layout(), Path(plan.output), "full" if report.full else "sample")
    report.nbytes += progress.done_bytes(plan) if report.full else 0
    report.damage += [Damage(plan.output, note) for note in found.notes]
