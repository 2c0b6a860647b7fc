"""What a build leaves in a workspace: a chunked zarr hierarchy per model, rows made for a vocabulary, and the plan."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergepipe.errors import DamageError, WorkspaceError
from mergepipe.pipeline.beside import BesideFiles
from mergepipe.pipeline.events import Announcer, CopyProgress, Note
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.models import stored_of
from mergepipe.pipeline.plan import Plan, PlannedModel
from mergepipe.pipeline.vocabulary import Vocabulary
from mergepipe.pipeline.vocabulary_rows import write_rows
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.kerchunk import REFERENCES, write_references
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.workspace import Workspace


def write_workspace(
    workspace: Workspace,
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    announce: Announcer,
    vocabulary: Vocabulary | None = None,
    beside: BesideFiles | None = None,
) -> None:
    """Make the stores of all models and what else a run reads, and write the plan last of all; for the lock's holder.

    Parameters
    ----------
    workspace : Workspace
    plan : Plan
    checkpoints : sequence of Checkpoint
        Of the plan's models; what a first stage will make comes after them and has none yet.
    announce : Announcer
    vocabulary : Vocabulary, optional
        Whose row maps and made rows are wanted.
    beside : BesideFiles, optional

    Raises
    ------
    InputChangedError
        If a file changes meanwhile: nothing that was made of it is left to be believed.
    """
    there = [one for model, one in zip(plan.models, checkpoints, strict=False) if not model.made]
    inputs = Inputs(info for one in there for info in stored_of(one).files)
    manifests = _write_stores(workspace, plan, checkpoints, announce, inputs)
    if vocabulary is not None:
        paths = [model.path for model in plan.models]
        write_rows(workspace.vocabulary, vocabulary, paths, manifests, inputs.check)
    workspace.write_beside({} if beside is None else beside.contents)
    workspace.write_plan(plan.to_json())


def _write_stores(
    workspace: Workspace, plan: Plan, checkpoints: Sequence[Checkpoint], announce: Announcer, inputs: Inputs
) -> dict[int, ChunkManifest]:
    """Make the stores of all models but those to be made; their manifests, by number of the model."""
    keep = {workspace.store(number, model.label) for number, model in enumerate(plan.models)}
    manifests = {}
    for number, (model, checkpoint) in enumerate(zip(plan.models, checkpoints, strict=False)):
        folder = workspace.store(number, model.label)
        manifest_file = workspace.manifest_file(number, model.label)
        kept, mend = _begun_before(folder, model, plan.chunk_bytes), False
        if model.made:
            continue  # its manifest is made when its files are
        if kept:
            if manifest_file.exists():
                mend = bool(workspace.damaged(number, model.label)) or not _is_untouched(manifest_file)
                if not mend:
                    announce(Note(f"'{model.label}' is copied already: kept"))
                    manifests[number] = ChunkManifest.load(manifest_file)
                    continue
                announce(
                    Note(f"the copy of '{model.label}' is damaged: all its chunks are checked, bad ones made anew")
                )
            else:
                announce(Note(f"'{model.label}' is copied in part already: going on with that"))
        manifest = _make_store(model, checkpoint, folder, plan.chunk_bytes, announce, inputs, mend=mend)
        manifest.save(manifest_file)
        workspace.unmark_damage(number, model.label)
        manifests[number] = manifest
        if manifest.kind == "virtual":
            write_references(manifest, folder / REFERENCES)
    workspace.forget_stores(keep)
    return manifests


def _begun_before(folder: Path, model: PlannedModel, chunk_bytes: int) -> bool:
    """Whether a store's folder holds a copy of this very model, or a part of one; otherwise it is made anew.

    `source.json` says what a folder is a copy of; it is there before the first chunk.
    """
    marker = folder / "source.json"
    source = json.dumps([model.store, model.path, model.fingerprint, chunk_bytes]).encode()
    if marker.exists() and marker.read_bytes() == source:
        return model.store == "copy"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_atomic(marker, source)
    return False


def _is_untouched(manifest_file: Path) -> bool:
    """Whether the files of a copy are those that were written, by their sizes and times."""
    try:
        Inputs.of([ChunkManifest.load(manifest_file)])
    except (DamageError, WorkspaceError):
        return False
    return True


def _make_store(
    model: PlannedModel,
    checkpoint: Checkpoint,
    folder: Path,
    chunk_bytes: int,
    announce: Announcer,
    inputs: Inputs,
    *,
    mend: bool,
) -> ChunkManifest:
    if model.store == "virtual":
        return virtual_manifest(stored_of(checkpoint), chunk_bytes)
    from mergepipe.storage.copied import copy_store  # and with it zarr, which nothing else here needs

    return copy_store(
        stored_of(checkpoint),
        folder / "zarr",
        chunk_bytes,
        lambda nbytes: announce(CopyProgress(model.label, nbytes, model.nbytes)),
        check_source=inputs.check,
        resume=True,
        mend=mend,
    )
