"""Merges of two stages: what the models add up to is made first and kept, then scaled and put on the base.

Where a method says so (:attr:`mergepipe.tasks.method.MergeMethod.carries`), its plan has another one in front:

    base, models ──► first stage: OUTPUT/opcm, a checkpoint of merged task vectors, unscaled ─┐
    base ─────────────────────────────────────────────────────────────────────────────────────┴─► second stage: OUTPUT

The first stage is a merge like any other: planned, resumed, checked against its ceiling; its journal and statistics are
the folder `first` of the workspace. Between the two all norms are known, and with them the factor of the second stage.
What the first stage leaves behind is in the working type, so nothing is lost that a later model would need:
:mod:`mergepipe.pipeline.add` plans a merge whose first stage goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.pipeline.outputs import CARRIED_FOLDER, finished
from mergepipe.pipeline.plan import Plan, PlannedModel, PlannedTensor, Source, plan_id
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.manifest import virtual_manifest
from mergepipe.storage.workspace import Workspace
from mergepipe.tasks.method import State
from mergepipe.tasks.registry import METHODS
from mergepipe.tasks.subspace.sequential import FACTOR, scale_factor

Squares = Mapping[int, State]
"""By number of the tensor, what the first stage found out about norms."""


def carries(tensor: PlannedTensor) -> bool:
    """Whether a tensor is made in two stages."""
    return tensor.action == "merge" and METHODS[tensor.method].carries


def split(plan: Plan) -> Plan:
    """The plan in two stages, where one of its methods needs that; otherwise as it is."""
    chosen = [tensor for tensor in plan.tensors if carries(tensor)]
    if not chosen:
        return plan
    names = {tensor.name for tensor in chosen}
    first = _first(plan, chosen, names)
    kept = PlannedModel(
        label=CARRIED_FOLDER,
        path=first.output,
        role="carried",
        store="virtual",
        why="made by the first stage",
        tensors=len(chosen),
        nbytes=first.layout().nbytes,
        copied_bytes=0,
        fingerprint=first.id,
    )
    models = (*plan.models, kept)
    tensors = tuple(_second(t, len(plan.models)) if t.name in names else t for t in plan.tensors)
    return replace(
        plan,
        id=plan_id(tensors, models, plan.groups, plan.metadata, plan.side, plan.seed, plan.config, plan.vocabulary),
        models=models,
        tensors=tensors,
        first_stage=first,
    )


def _first(plan: Plan, chosen: Sequence[PlannedTensor], names: set[str]) -> Plan:
    """The plan of the merged task vectors: files as the output has them, tensors in the working type."""
    tensors = tuple(replace(tensor, dtype=_stored(tensor)) for tensor in chosen)
    groups = tuple(group for each in plan.groups if (group := tuple(name for name in each if name in names)))
    metadata = {"format": "pt", "mergepipe.carried": "merged task vectors, not scaled; no model"}
    return replace(
        plan,
        id=plan_id(tensors, plan.models, groups, metadata, {}, plan.seed, {}, plan.vocabulary),
        tensors=tensors,
        groups=groups,
        metadata=metadata,
        output=str(Path(plan.output) / CARRIED_FOLDER),
        side={},
        side_bytes=0,
        config={},
        sidecar=None,
        side_files=None,
        head_files={},
        dtype=None,
        notes=(),
    )


def _stored(tensor: PlannedTensor) -> str:
    return "F64" if tensor.work == "float64" else "F32"


def _second(tensor: PlannedTensor, model: int) -> PlannedTensor:
    """The tensor as the second stage makes it: from the base and what the first stage has left."""
    carried = Source(model, tensor.name, _stored(tensor))
    return replace(
        tensor,
        models=(),
        model_params=(),
        sparsify="none",
        sparsify_params=(),
        scope="tensor",
        carried=carried,
        offset=0,
    )


def with_allowed(plan: Plan, allowed: int) -> Plan:
    """The plan, and what comes before it, under another ceiling."""
    first = plan.first_stage
    return replace(plan, allowed=allowed, first_stage=first and replace(first, allowed=allowed))


def moved_to(plan: Plan, output: str) -> Plan:
    """The plan with another output folder, and what its first stage makes in there."""
    if plan.first_stage is None:
        return replace(plan, output=output)
    first = replace(plan.first_stage, output=str(Path(output) / CARRIED_FOLDER))
    *models, kept = plan.models
    return replace(plan, output=output, models=(*models, replace(kept, path=first.output)), first_stage=first)


def folders_read(plan: Plan) -> list[str]:
    """Folders that are inputs of the merge as a whole; of an earlier merge the one that holds the model."""
    own = Path(plan.output) / CARRIED_FOLDER
    return [
        str(Path(model.path).parent) if model.role == "carried" else model.path
        for model in plan.models
        if Path(model.path) != own
    ] + [model.adapter for model in plan.models if model.adapter]


def norms(plan: Plan, squares: Squares) -> dict[str, Any]:
    """What the manifest of a first stage says: the norm of each task vector, earlier ones first, and of their merge."""
    found = [squares[number] for number in sorted(squares)]
    models = max((len(tensor.models) for tensor in plan.tensors), default=0)
    tasks = [math.sqrt(math.fsum(float(state["task_squares"][k]) for state in found)) for k in range(models)]
    merged = math.sqrt(math.fsum(float(state["merged_square"][0]) for state in found))
    return {"task_norms": [*plan.norms, *tasks], "merged_norm": merged}


def scaling(record: Mapping[str, Any]) -> State:
    """What the second stage is to know of the first, from that one's manifest."""
    return {FACTOR: np.array(scale_factor(record["task_norms"], record["merged_norm"]))}


def complete(first: Plan) -> dict[str, Any] | None:
    """The manifest of a first stage whose files are all there; None if something is left to be done."""
    record = finished(first)
    folder = Path(first.output)
    whole = all(
        (path := folder / shard.file).is_file() and path.stat().st_size == shard.size for shard in first.layout().shards
    )
    return record if whole else None


def open_carried(plan: Plan, workspace: Workspace, *, anew: bool) -> None:
    """Write the chunk manifest of what the first stage has made, for the second to read.

    Parameters
    ----------
    plan : Plan
        Of the second stage.
    workspace : Workspace
    anew : bool
        Even if there is one: the first stage has just been made.
    """
    number = len(plan.models) - 1
    target = workspace.manifest_file(number, plan.models[number].label)
    if anew or not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        virtual_manifest(open_checkpoint(Path(plan.models[number].path)), plan.chunk_bytes).save(target)


def joined(second: dict[str, Any], first: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest of a merge of two stages: effort added up, findings those of the first, which did the work."""
    added = {name: second[name] + first[name] for name in ("seconds", "disk_bytes_read", "disk_bytes_written")}
    peak = max(second["peak_anonymous_bytes"], first["peak_anonymous_bytes"])
    findings = {name: {**second[name], **first[name]} for name in ("densities", "tensors")}
    kept = {name: first[name] for name in ("device", "versions", "task_norms", "merged_norm")}
    return {**second, **findings, **kept, **added, "seconds": round(added["seconds"], 3), "peak_anonymous_bytes": peak}
