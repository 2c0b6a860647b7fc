"""One more model onto a finished merge, without reading those that are in it.

A merge of two stages (:mod:`mergepipe.pipeline.stages`) keeps its merged task vectors, unscaled and unrounded beyond
the working type, and their norms. Adding a model plans another such merge, whose first stage goes on from there:

    base, new model, OLD/opcm ──► NEW/opcm ──► (with base) NEW

It takes the workspace of the finished merge, and a new output folder; the finished model stays as it is. The result has
the bytes of a merge of all models at once, and from the moment the plan is there it is a merge like any other: killed,
it goes on with the next run. Until then the old plan is, so a kill at any moment leaves one of the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mergepipe.errors import InputChangedError, RecipeError, UsageError, WorkspaceError
from mergepipe.pipeline import outputs, stages
from mergepipe.pipeline.align import align
from mergepipe.pipeline.build import settle_memory
from mergepipe.pipeline.events import Announcer, Listener, Note
from mergepipe.pipeline.memory import parse_bytes
from mergepipe.pipeline.models import InputModel, as_stored, open_models
from mergepipe.pipeline.plan import Plan, PlannedModel, PlannedTensor, Source, plan_id
from mergepipe.pipeline.planning import labels_of, plan_tensors
from mergepipe.pipeline.recipe import ModelSpec, Recipe, parse_recipe
from mergepipe.pipeline.references import parse_reference
from mergepipe.pipeline.schedule import ceiling_of
from mergepipe.pipeline.space import check_room, copies_need, journal_need, output_need
from mergepipe.pipeline.stores import write_workspace
from mergepipe.pipeline.verify import verify as verify_output
from mergepipe.storage.checkpoint import fingerprint, open_checkpoint
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from mergepipe.tasks.registry import METHODS

NEW, CARRIED = 1, 2
"""Numbers of the new model and of what is carried over among the models that are read; the base is 0."""


def add_model(
    work: str | Path,
    model: str | Path,
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    verify: Literal["none", "sample", "full"] = "sample",
    on_event: Listener | None = None,
) -> Plan:
    """Plan a merge that adds a model to the finished one of a workspace; `run` then carries it out.

    Parameters
    ----------
    work : path
        The workspace of the finished merge. Its plan is replaced.
    model : path
        The model to add: a checkpoint of the same tensors as the base.
    out : path, optional
        The new output folder; by default beside the old one, named after it and the model: ``merged+expert``.
    memory : size, optional
        Ceiling for the run; that of the finished merge by default.
    workers : int, optional
        For the check of the ceiling; by default one per processor, or as many as there is room for.
    verify : {'none', 'sample', 'full'}
        How much of what the finished merge has kept is read and checked first.
    on_event : callable, optional
        Told what happens.

    Returns
    -------
    Plan
        The workspace's own, if that adds this very model already: `run` goes on with it.

    Raises
    ------
    WorkspaceError
        If there is no merge in the workspace that a model can be added to: none, an unfinished one, one whose kept task
        vectors are gone.
    RecipeError
        If its method, or a rule of its recipe, needs the models that are in it; or the model is one of them.
    DamageError
        If what was kept is not what was written.
    InputChangedError
        If the base is no longer what it was.
    CheckpointError, BudgetError, InTheWayError
        As :func:`mergepipe.build`.
    """
    announce = Announcer(on_event)
    workspace, path = Workspace(Path(work)), str(parse_reference(os.fspath(model), os.curdir))
    old = Plan.from_json(workspace.read_plan())
    if old.added is not None and os.path.realpath(old.added) == os.path.realpath(path):
        _check_same(old, out, workspace)
        return old
    first = _kept(old, workspace)
    _check_recipe(old, path)
    if verify != "none":
        verify_output(first.output, full=verify == "full").raise_for_damage()
    plan, checkpoints = _plan(old, first, path, out)
    allowed = parse_bytes(memory) if memory is not None else old.allowed
    plan = settle_memory(stages.with_allowed(plan, allowed), checkpoints, allowed, workers)
    outputs.check_folder(Path(plan.output), stages.folders_read(plan))
    journal = journal_need(plan, workspace, ceiling_of(plan, None, workers))
    check_room([output_need(plan), copies_need(plan, workspace), journal])
    with WorkspaceLock(workspace):
        if Plan.from_json(workspace.read_plan()).id != old.id:
            raise WorkspaceError(f"another process has put another plan into '{workspace.root}': look at it first")
        workspace.forget_progress()
        write_workspace(workspace, plan, checkpoints, announce)
    for note in plan.notes:
        announce(Note(note))
    return plan


def _check_same(plan: Plan, out: str | Path | None, workspace: Workspace) -> None:
    if out is not None and os.path.abspath(out) != plan.output:
        raise WorkspaceError(
            f"'{workspace.root}' adds this model to '{plan.output}' already: leave --out out to go on with that, or "
            f"use another --work"
        )


def _kept(old: Plan, workspace: Workspace) -> Plan:
    """The first stage of a finished merge that can be gone on from."""
    first = old.first_stage
    if first is None:
        able = ", ".join(name for name, method in METHODS.items() if method.carries)
        by = old.recipe.get("merge_method", "several methods")
        raise UsageError(
            f"the merge in '{workspace.root}' is by {by}, which needs all of its models at "
            f"once: --add goes with {able}; for others add the model to the recipe and build again"
        )
    if outputs.finished(old) is None:
        raise WorkspaceError(
            f"the merge in '{workspace.root}' is not finished, or its output '{old.output}' is gone: `mergepipe run "
            f"--work {workspace.root}` first, then add the model"
        )
    if stages.complete(first) is None:
        raise WorkspaceError(
            f"'{first.output}', which models are added to, is gone or no longer what the merge has left there: bring "
            f"it back, or add the model to the recipe and build again with all models"
        )
    return first


def _check_recipe(old: Plan, path: str) -> None:
    """Refuse what can't be had without the earlier models."""
    taken = {os.path.realpath(m.reference): m.label for m in (*old.models, *old.merged_before) if m.role != "carried"}
    if os.path.realpath(path) in taken:
        raise UsageError(f"'{path}' is in this merge already, as '{taken[os.path.realpath(path)]}': nothing to add")
    faults = []
    if old.earlier:
        faults.append("the recipe has several documents")
    if "models" not in old.recipe:
        faults.append("the recipe puts layers together (`slices` or `modules`)")
    for tensor in old.tensors:
        if tensor.action == "merge" and not stages.carries(tensor) and any(s.model for s in tensor.sources):
            faults.append(f"'{tensor.name}' is merged by {tensor.method}")
        elif tensor.action == "copy" and tensor.base is not None and tensor.base.model:
            faults.append(f"'{tensor.name}' comes from '{old.models[tensor.base.model].label}'")
    if "tokenizer" in old.recipe or "tokenizer_source" in old.recipe:
        faults.append("the recipe puts vocabularies together (`tokenizer_source`)")
    if old.side:
        faults.append("models keep heads of their own (`heads: separate`)")
    if any(
        params.get("calibrate_scope") == "all" and params.get("target_density") is not None
        for tensor in (old.first_stage or old).tensors
        for params in tensor.sparsify_params
    ):
        faults.append("`calibrate_scope: all` settles how much is kept of one model by all others")
    if faults:
        more = f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise UsageError(
            f"no model can be added without reading the earlier ones: {faults[0]}{more}; add it to the recipe and "
            f"build again"
        )


def _plan(old: Plan, first: Plan, path: str, out: str | Path | None) -> tuple[Plan, list[InputModel]]:
    """The new plan, and what it reads: base, model, and the kept task vectors."""
    whole = _whole_recipe(old, path)
    recipe = replace(whole, models=(ModelSpec(path),))
    checkpoints = [*open_models(recipe.sources), as_stored(open_checkpoint(Path(first.output)))]
    if fingerprint(checkpoints[0].stored) != old.models[0].fingerprint:
        raise InputChangedError(
            f"the base '{old.models[0].path}' changed since the merge was made (size, time or header of a file): bring "
            f"the old one back, or build again with all models"
        )
    found = align(recipe, checkpoints[:2])
    models = _models(old, first, whole, checkpoints)
    tensors = tuple(_going_on(t, first) for t in plan_tensors(checkpoints, found, recipe.seed))
    if [(t.name, t.shape) for t in tensors] != [(t.name, t.shape) for t in old.tensors]:
        raise WorkspaceError(f"the base's tensors are not those of the merge in '{old.output}': build it again")
    shown: dict[str, Any] = {**old.recipe, "models": [*old.recipe["models"], {"model": models[NEW].public}]}
    metadata = {"format": "pt", "mergepipe.recipe": json.dumps(shown, sort_keys=True)}
    record = stages.complete(first)
    assert record is not None, "checked before"
    plan = replace(
        old,
        id=plan_id(tensors, models, old.groups, metadata, {}, old.seed, found.config),
        version=version("mergepipe"),
        recipe=shown,
        models=models,
        tensors=tensors,
        metadata=metadata,
        output=os.path.abspath(out or f"{old.output}+{models[NEW].label}"),
        notes=found.notes,
        config=found.config,
        first_stage=None,
        merged_before=(*old.merged_before, *(model for model in old.models if model.role == "model")),
        norms=tuple(record["task_norms"]),
        added=path,
    )
    return stages.split(plan), checkpoints


def _whole_recipe(old: Plan, path: str) -> Recipe:
    """The recipe of all models together, from that of the finished merge."""
    paths = {model.public: model.reference for model in (*old.models, *old.merged_before) if model.role != "carried"}
    listed = [{**entry, "model": paths[entry["model"]]} for entry in old.recipe["models"]]
    document = {**old.recipe, "base_model": paths[old.recipe["base_model"]], "models": [*listed, {"model": path}]}
    try:
        return parse_recipe(document)
    except RecipeError as error:
        faults = [replace(fault, message=f"with '{path}' added: {fault.message}") for fault in error.faults]
        raise RecipeError(faults) from None


def _models(
    old: Plan, first: Plan, whole: Recipe, checkpoints: Sequence[InputModel]
) -> tuple[PlannedModel, PlannedModel, PlannedModel]:
    base = old.models[0]
    new = checkpoints[NEW]
    nbytes = sum(tensor.nbytes for tensor in new.stored.tensors.values())
    model = replace(
        base,
        label=labels_of(whole.sources)[-1],
        path=str(new.root),
        reference=whole.sources[-1],
        adapter=new.adapter,
        drops=new.drops,
        role="model",
        tensors=len(new.tensors),
        nbytes=nbytes,
        copied_bytes=nbytes if base.store == "copy" else 0,
        fingerprint=fingerprint(new.stored),
    )
    carried = PlannedModel(
        label=f"{Path(old.output).name}-{outputs.CARRIED_FOLDER}",
        path=first.output,
        role="carried",
        store="virtual",
        why="kept by the finished merge",
        tensors=len(first.tensors),
        nbytes=first.layout().nbytes,
        copied_bytes=0,
        fingerprint=first.id,
    )
    return base, model, carried


def _going_on(tensor: PlannedTensor, first: Plan) -> PlannedTensor:
    """A tensor of the new merge, which begins with what the finished one has kept of it."""
    kept = {t.name: t for t in first.tensors}.get(tensor.name)
    if kept is None or not stages.carries(tensor):
        return tensor
    wide = "float64" if kept.dtype == "F64" else tensor.work
    carried = Source(CARRIED, tensor.name, kept.dtype)
    return replace(tensor, work=wide, carried=carried, offset=kept.offset + len(kept.models))
