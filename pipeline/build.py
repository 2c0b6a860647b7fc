"""Building a plan: everything is checked, nothing is merged.

    recipe ─► checkpoints (headers) ─► alignment ─► plan ─► memory, output and disk ─► workspace

A recipe of several documents is a chain of merges (:mod:`mergepipe.pipeline.chain`): each is planned in this way, from
what the ones before it will have made, and has a workspace of its own inside.

Up to the last step nothing is written, unless a copy store is asked for, which is made once all checks have passed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mergepipe.errors import (
    DiskFullError,
    MemoryBudgetError,
    MergepipeError,
)
from mergepipe.pipeline import outputs, stages
from mergepipe.pipeline.align import Differing, align
from mergepipe.pipeline.beside import BesideFiles, files_beside
from mergepipe.pipeline.chain import Merge, check_dropped, load_chain
from mergepipe.pipeline.chain_plan import collected, is_whole, made_checkpoint, take_together
from mergepipe.pipeline.descriptors import check_descriptors
from mergepipe.pipeline.events import Announcer, Listener, Note
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.handover import SHARDS_OPEN
from mergepipe.pipeline.kinds import of_each_kind
from mergepipe.pipeline.machine import available_bytes
from mergepipe.pipeline.masks import check_masks
from mergepipe.pipeline.memory import DEFAULT_ALLOWED, parse_bytes
from mergepipe.pipeline.models import Find, InputModel, find_folder, open_models, stored_of
from mergepipe.pipeline.obstacles import abandoned_work, unfinished_names
from mergepipe.pipeline.parsing import NOT_MERGED
from mergepipe.pipeline.plan import Plan, PlannedTensor
from mergepipe.pipeline.planning import make_plan
from mergepipe.pipeline.recipe import Recipe
from mergepipe.pipeline.schedule import ceiling_of, schedule
from mergepipe.pipeline.space import Need, check_room, copies_need, journal_need, output_need
from mergepipe.pipeline.stores import write_workspace
from mergepipe.pipeline.vocabulary import Vocabulary, merge_vocabularies, refuse_adjusted
from mergepipe.pipeline.vocabulary_rows import planned_vocabulary
from mergepipe.storage.atomic import fsync_path
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.collector import paused_collector
from mergepipe.storage.file_errors import explained
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from mergepipe.tasks.registry import method as find_method

StoreKind = Literal["auto", "virtual", "copy"]

SHAPING = ("$.rules", "$.heads", "$.slices", "$.modules", "$.tokenizer", *(f"$.{key}" for key in NOT_MERGED))
"""Parts of a recipe that say which tensors are made: with a fault there, but for parameters, they are not compared."""

DECIDING = (*SHAPING, "$.merge_method", "$.base_model", "$.models", "$.sparsify")
"""Parts of a recipe that say what is done with tensors: with a fault there, but for parameters, no plan is made."""

AFTER_TENSORS = ("parameters per tensor", "memory", "disk", "workspace")
"""What can't be looked at before it is known which tensors are made."""

CHUNK_BYTES = 8 * 1024 * 1024
"""Default size of a chunk: the best of 1 to 64 MiB in whole merges."""


@dataclass(frozen=True, slots=True)
class Order:
    """What `build` is asked for; see there."""

    recipe: str | Path = "mergepipe.yaml"
    work: str | Path = ".mergepipe"
    out: str | Path | None = None
    memory: str | int | None = None
    workers: int | None = None
    store: StoreKind = "auto"
    chunk_size: str | int = CHUNK_BYTES
    shard_size: str | int | None = None
    overrides: tuple[str, ...] = ()
    force: bool = False
    tensors: Differing | None = None


@dataclass(slots=True)
class Examined:
    """What came of looking at an order: as far as it got, where faults are kept.

    Attributes
    ----------
    planned : list of Planned
        Each merge with the plan that was made from what was found to be sound; the result is the last one.
    abandoned : list of Plan or None
        For each, the plan of a finished or forgotten merge that its workspace holds.
    unchecked : tuple of str
        What could not be looked at because of faults before it.
    """

    planned: list[Planned] = field(default_factory=list)
    abandoned: list[Plan | None] = field(default_factory=list)
    unchecked: tuple[str, ...] = ()


@explained()
def build(
    recipe: str | Path = "mergepipe.yaml",
    work: str | Path = ".mergepipe",
    *,
    out: str | Path | None = None,
    memory: str | int | None = None,
    workers: int | None = None,
    store: StoreKind = "auto",
    chunk_size: str | int = CHUNK_BYTES,
    shard_size: str | int | None = None,
    overrides: Sequence[str] = (),
    tensors: Differing | None = None,
    force: bool = False,
    on_event: Listener | None = None,
) -> Plan:
    """Check a recipe and its checkpoints, and write the plan into a workspace.

    Parameters
    ----------
    recipe : path
        A YAML file.
    work : path
        The workspace; made if need be.
    out : path, optional
        The output folder; the recipe's `output`, else `./merged`, by default.
    memory : size, optional
        Ceiling for the run, such as "2GiB"; by default 512 MiB, where methods look at whole matrices up to half of the
        memory available.
    workers : int, optional
        For the check of the ceiling; by default one per processor, or as many as there is room for.
    store : {'auto', 'virtual', 'copy'}
        How each checkpoint becomes a chunked zarr hierarchy: byte ranges of its own files, or a copy.
    chunk_size, shard_size : size, optional
        Of a chunk; of an output file (by default the base's division into files is kept).
    overrides : sequence of str
        ``"parameters.lambda=0.5"`` and the like: recipe values to replace.
    tensors : {'union', 'intersection'}, optional
        Merge tensors that not every model has from those that have them, or leave them out; by default they are errors.
    force : bool
        Drop the unfinished work of another recipe that the workspace holds.
    on_event : callable, optional
        Told what happens; see :mod:`mergepipe.pipeline.events`.

    Returns
    -------
    Plan

    Raises
    ------
    RecipeError, CheckpointError, BudgetError, InTheWayError
        If anything is wrong; no work has been done then.
    """
    order = Order(recipe, work, out, memory, workers, store, chunk_size, shard_size, tuple(overrides), force, tensors)
    with paused_collector():
        return _build(order, Announcer(on_event))


def _build(order: Order, announce: Announcer) -> Plan:
    examined = examine(order, FIRST, announce)
    planned, abandoned, root = examined.planned, examined.abandoned, Workspace(Path(order.work))
    root.create()
    with WorkspaceLock(root):
        # First goes the plan that reads what now changes, last comes the one that reads it all.
        _withdraw(root, planned[-1].plan)
        for found, old in list(zip(planned, abandoned, strict=True))[:-1]:
            _install(found, old, announce)
        root.write_earlier([found.merge.workspace.root.name for found in planned[:-1]])
        _install(planned[-1], abandoned[-1], announce)
    for note in dict.fromkeys(note for found in planned for note in found.plan.notes):
        announce(Note(note))
    return planned[-1].plan


def examine(order: Order, faults: Faults, announce: Announcer, find: Find = find_folder) -> Examined:
    """Look at everything that can be looked at before work begins; writes nothing.

    Parameters
    ----------
    order : Order
    faults : Faults
        Takes in whatever is wrong. Where it keeps faults, what they leave unclear is passed over.
    announce : Announcer
    find : callable, optional
        Says where models and adapters lie.

    Raises
    ------
    UsageError
        If a size is none.
    RecipeError, CheckpointError, BudgetError, InTheWayError
        Unless `faults` keeps them.
    """
    options = _options(order, find)
    examined = Examined(unchecked=("checkpoints", "tensors", *AFTER_TENSORS))
    with faults.taken():
        merges = load_chain(order.recipe, Path(order.work), order.overrides, faults=faults)
        examined.unchecked = ()
        _plan_all(merges, options, faults, examined, announce)
        root = Workspace(Path(order.work))
        if len(examined.planned) < len(merges):
            last = merges[-1]
            inputs = [path for merge in merges for path in merge.recipe.inputs if not path.startswith(str(root.root))]
            outputs.check_folder(_output(last, options), inputs, unfinished_names(last.workspace))
            return examined
        examined.abandoned = [_check_way(found, order.force, faults) for found in examined.planned]
        with faults.taken():
            _check_disks(examined.planned, options.workers, announce)
        with faults.taken():
            check_descriptors([found.plan for found in examined.planned])
        with faults.taken():
            check_dropped(root, [found.merge for found in examined.planned[:-1]], order.force)
    return examined


def _plan_all(
    merges: Sequence[Merge], options: _Options, faults: Faults, examined: Examined, announce: Announcer
) -> None:
    """Plan every merge of a chain whose inputs are there or will be; what is wrong with several is told together."""
    errors: list[tuple[str, MergepipeError]] = []
    for merge in merges:
        if not set(merge.reads) <= {found.merge.name for found in examined.planned}:
            continue  # what it reads is at fault itself
        # What is wrong with the recipe says what else can be looked at, where there is one merge.
        own = faults if faults.keep and len(merges) == 1 else Faults(keep=faults.keep)
        with collected(errors, merge.name or "the result"):
            found = _plan_merge(merge, options, _read_by(merge, examined.planned), own, examined, announce)
            examined.planned += [] if found is None else [found]
        if own is not faults:
            errors += [(merge.name or "the result", error) for error in own.errors]
    take_together(errors, [merge.name for merge in merges[:-1]], faults)


def _options(order: Order, find: Find) -> _Options:
    return _Options(
        out=order.out,
        memory=None if order.memory is None else parse_bytes(order.memory),
        workers=order.workers,
        store="copy" if order.store == "copy" else "virtual",
        chunk_bytes=parse_bytes(order.chunk_size),
        shard_bytes=None if order.shard_size is None else parse_bytes(order.shard_size),
        tensors=order.tensors,
        find=find,
    )


@dataclass(frozen=True, slots=True)
class _Options:
    """How a merge is to be made, sizes in bytes."""

    out: str | Path | None
    memory: int | None
    workers: int | None
    store: Literal["virtual", "copy"]
    chunk_bytes: int
    shard_bytes: int | None
    tensors: Differing | None
    find: Find


@dataclass(frozen=True, slots=True)
class Planned:
    """A merge, its plan, and its models: opened, or as they will be made."""

    merge: Merge
    plan: Plan
    checkpoints: Sequence[InputModel]
    vocabulary: Vocabulary | None
    beside: BesideFiles


def _read_by(merge: Merge, planned: Sequence[Planned]) -> list[Planned]:
    """The merges that one reads, and those that they read, in the order in which they are made."""
    needed = set(merge.reads)
    for found in reversed(planned):
        if found.merge.name in needed:
            needed |= set(found.merge.reads)
    return [found for found in planned if found.merge.name in needed]


def _output(merge: Merge, options: _Options) -> Path:
    return Path(os.path.abspath(merge.output or options.out or merge.recipe.output or "merged"))


def _plan_merge(
    merge: Merge, options: _Options, before: Sequence[Planned], faults: Faults, examined: Examined, announce: Announcer
) -> Planned | None:
    """Plan one merge, given those that it reads; None where faults that were kept leave it unclear what to plan."""
    recipe = merge.recipe
    made = {
        found.plan.output: made_checkpoint(found.plan, found.checkpoints[found.plan.sidecar or 0].config)
        for found in before
    }
    examined.unchecked = ("tensors", *AFTER_TENSORS)
    checkpoints = open_models(recipe.inputs, announce, made, faults, options.find)
    sound = _without(recipe, {str(checkpoint.reference) for checkpoint in checkpoints})
    decisive = [fault.path for fault in faults.of_recipe() if ".parameters" not in fault.path]
    if not sound.sources or any(path.startswith(SHAPING) for path in decisive):
        return None
    vocabulary, beside, fitted = None, BesideFiles(), list[Checkpoint](checkpoints)
    if sound is recipe:
        told = len(faults.errors)
        with faults.taken(), tempfile.TemporaryDirectory(prefix="mergepipe-build-") as name:
            wants_files = recipe.tokenizer is not None or recipe.chat_template is not None
            staged = _staged(before, Path(name)) if wants_files else {}
            vocabulary = merge_vocabularies(recipe, checkpoints, staged)
            refuse_adjusted(vocabulary, checkpoints)
            roots = {text: one.root for text, one in zip(recipe.inputs, checkpoints, strict=True)}
            beside = files_beside(recipe, vocabulary, roots | staged)
        if len(faults.errors) > told:
            return None
        fitted = fitted if vocabulary is None else vocabulary.fitted(checkpoints)
    alignment = align(sound, fitted, faults, options.tensors)
    examined.unchecked = AFTER_TENSORS
    if sound is not recipe or any(path.startswith(DECIDING) for path in decisive):
        return None
    plan = make_plan(
        recipe,
        fitted,
        alignment,
        vocabulary=None if vocabulary is None else planned_vocabulary(vocabulary, checkpoints),
        beside=beside,
        store=options.store,
        output=_output(merge, options),
        allowed=options.memory if options.memory is not None else DEFAULT_ALLOWED,
        chunk_bytes=options.chunk_bytes,
        shard_bytes=options.shard_bytes,
        before=[found.plan for found in before],
        faults=faults,
    )
    examined.unchecked = ()
    with faults.taken():
        check_masks(plan)
        plan = settle_memory(plan, checkpoints, options.memory, options.workers)
    return Planned(merge, plan, checkpoints, vocabulary, beside)


def _staged(before: Sequence[Planned], folder: Path) -> dict[str, Path]:
    """The files beside weights that are yet to be made, as they will be, by the folder of each merge."""
    staged: dict[str, Path] = {}
    for number, found in enumerate(before):
        target = folder / str(number)
        target.mkdir()
        if found.plan.sidecar is not None:
            source = found.plan.models[found.plan.sidecar].path
            outputs.put_beside(found.plan, staged.get(source) or Path(source), target, found.beside.contents)
        staged[found.plan.output] = target
    return staged


def _without(recipe: Recipe, opened: AbstractSet[str]) -> Recipe:
    """The recipe as it is if all its checkpoints could be opened; else without the others, to compare what is there."""
    if opened >= set(recipe.inputs):
        return recipe
    if recipe.slices or recipe.modules:
        return Recipe(recipe.merge_method, ())
    models = tuple(
        spec if spec.importance in opened else replace(spec, importance=None)
        for spec in recipe.models
        if spec.model in opened
    )
    base = recipe.base_model if recipe.base_model in opened else None
    heads = recipe.heads if recipe.heads is None or recipe.heads.removeprefix("model:") in opened else "base"
    return replace(recipe, models=models, base_model=base, heads=heads)


def _check_way(found: Planned, force: bool, faults: Faults) -> Plan | None:
    """Refuse what is in the way of one merge; the plan of another that has to go, if there is one."""
    plan, workspace, abandoned = found.plan, found.merge.workspace, None
    with faults.taken():
        abandoned = abandoned_work(workspace, plan, force)
    if found.merge.output is None and outputs.finished(plan) is None:
        with faults.taken():
            outputs.check_folder(Path(plan.output), stages.folders_read(plan), unfinished_names(workspace))
    return abandoned


def _check_disks(planned: Sequence[Planned], workers: int | None, announce: Announcer) -> None:
    """Room for everything; or, of a result of several files, for those that are open at once, to be handed over."""
    needs = [copies_need(found.plan, found.merge.workspace) for found in planned]
    waiting = [found for found in planned if outputs.finished(found.plan) is None]
    for found in waiting:
        with suppress(MemoryBudgetError):  # told before; without units nothing is known of the journal
            ceiling = ceiling_of(found.plan, None, workers)
            needs.append(journal_need(found.plan, found.merge.workspace, ceiling))
    needs += [
        Need(found.merge.workspace.root, found.plan.vocabulary.made_bytes, "what is made of rows that models lack")
        for found in planned
        if found.plan.vocabulary is not None
    ]
    needs += [
        replace(output_need(found.plan), what=f"what the earlier merge '{found.merge.name}' makes")
        for found in waiting
        if found is not planned[-1]
    ]
    last = planned[-1]
    if last not in waiting:
        check_room(needs)
        return
    try:
        check_room([output_need(last.plan), *needs])
    except DiskFullError:
        if len(last.plan.groups) <= SHARDS_OPEN:
            raise
        check_room([output_need(last.plan, handed_over=True), *needs])
        announce(
            Note(
                f"the disk of '{last.plan.output}' has no room for all {last.plan.layout().nbytes:,} bytes of the "
                f"output: only `mergepipe run --on-shard COMMAND`, which moves complete files away as it goes, can "
                f"finish there"
            )
        )


def _install(found: Planned, abandoned: Plan | None, announce: Announcer) -> None:
    """Put a plan into its workspace; the folder of an earlier merge is ours to clear."""
    plan, workspace = found.plan, found.merge.workspace
    if abandoned is not None:
        if outputs.finished(abandoned) is None:
            outputs.remove_work(abandoned)
        workspace.forget_progress()
    if found.merge.output is not None:
        workspace.create()
        if not is_whole(plan) and (outputs.finished(plan) is not None or not workspace.begun()):
            workspace.forget_progress()
            shutil.rmtree(found.merge.output, ignore_errors=True)
    _withdraw(workspace, plan)
    write_workspace(workspace, plan, found.checkpoints, announce, found.vocabulary, found.beside)


def settle_memory(plan: Plan, checkpoints: Sequence[Checkpoint], memory: str | int | None, workers: int | None) -> Plan:
    """The plan with its ceiling, under which every tensor of every stage fits.

    Raises
    ------
    MemoryBudgetError
        If one does not.
    """
    whole = any(_is_whole(tensor, plan.seed) for stage in plan.stages for tensor in of_each_kind(stage.tensors))
    if memory is None and whole:
        plan = stages.with_allowed(plan, max(DEFAULT_ALLOWED, available_bytes() // 2))
    # Tensors at odd places of their files can't be mapped: each window takes memory.
    odd = [any(t.offset % 8 for t in stored_of(found).tensors.values()) for found in checkpoints]
    odd += [False] * (len(plan.models) - len(odd))
    gathered = [model.store == "copy" or at for model, at in zip(plan.models, odd, strict=True)]
    ceiling = ceiling_of(plan, None, workers)
    for stage in plan.stages:
        schedule(stage, ceiling, gathered=gathered)
    return plan


def _withdraw(workspace: Workspace, plan: Plan) -> None:
    """Remove the plan of another merge before its stores are replaced: a build that dies between leaves none."""
    if workspace.plan_file.exists() and Plan.from_json(workspace.read_plan()).id != plan.id:
        workspace.plan_file.unlink()
        fsync_path(workspace.root)


def _is_whole(tensor: PlannedTensor, seed: int) -> bool:
    """Whether a tensor's method looks at it as a whole matrix."""
    return tensor.action == "merge" and find_method(tensor.method).whole(tensor.job(seed)) is not None
