"""Building a plan: everything is checked, nothing is merged.

    recipe ─► checkpoints (headers) ─► alignment ─► plan ─► memory, output and disk ─► workspace

A recipe of several documents is a chain of merges (:mod:`mergepipe.pipeline.chain`): each is planned in this way, from
what the ones before it will have made, and has a workspace of its own inside.

Up to the last step nothing is written, unless a copy store is asked for, which is made once all checks have passed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mergepipe.errors import (
    CheckpointError,
    DiskFullError,
    Fault,
    InputChangedError,
    MergepipeError,
    RecipeError,
    WorkspaceError,
)
from mergepipe.pipeline import outputs, stages
from mergepipe.pipeline.align import AlignedTensor, Alignment, Differing, align
from mergepipe.pipeline.beside import BesideFiles, files_beside
from mergepipe.pipeline.chain import Merge, check_dropped, load_chain
from mergepipe.pipeline.chain_plan import collected, earlier_of, is_whole, made_checkpoint, take_together
from mergepipe.pipeline.events import Announcer, CopyProgress, Listener, Note
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.handover import SHARDS_OPEN
from mergepipe.pipeline.inputs import check_inputs
from mergepipe.pipeline.machine import available_bytes, cpu_count
from mergepipe.pipeline.masks import refuse_gathered
from mergepipe.pipeline.memory import DEFAULT_ALLOWED, Ceiling, parse_bytes
from mergepipe.pipeline.models import InputModel, as_models, as_stored, open_models, stored_of
from mergepipe.pipeline.obstacles import abandoned_work, unfinished_names
from mergepipe.pipeline.parsing import NOT_MERGED
from mergepipe.pipeline.parts import parts_of
from mergepipe.pipeline.plan import PLAN_FORMAT, Plan, PlannedModel, PlannedTensor, Source, plan_id
from mergepipe.pipeline.recipe import Recipe, settings
from mergepipe.pipeline.references import parse_reference
from mergepipe.pipeline.schedule import schedule
from mergepipe.pipeline.scope import rule_faults
from mergepipe.pipeline.space import Need, check_room, copies_need, output_need, statistics_need
from mergepipe.pipeline.stacking import View
from mergepipe.pipeline.values import layer_counts
from mergepipe.pipeline.vocabulary import Vocabulary, merge_vocabularies, refuse_adjusted
from mergepipe.pipeline.vocabulary_rows import PlannedVocabulary, planned_vocabulary, write_rows
from mergepipe.storage.atomic import fsync_path, write_atomic
from mergepipe.storage.checkpoint import Checkpoint, fingerprint
from mergepipe.storage.copied import copy_store
from mergepipe.storage.dtypes import DTYPES, MERGED_ALIASES
from mergepipe.storage.layout import group_by_size
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.virtual import kerchunk_references
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
        For the check of the ceiling; one per processor by default.
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
    announce = Announcer(on_event)
    order = Order(recipe, work, out, memory, workers, store, chunk_size, shard_size, tuple(overrides), force, tensors)
    examined = examine(order, FIRST, announce)
    planned, abandoned, root = examined.planned, examined.abandoned, Workspace(Path(work))
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


def examine(order: Order, faults: Faults, announce: Announcer) -> Examined:
    """Look at everything that can be looked at before work begins; writes nothing.

    Parameters
    ----------
    order : Order
    faults : Faults
        Takes in whatever is wrong. Where it keeps faults, what they leave unclear is passed over.
    announce : Announcer

    Raises
    ------
    UsageError
        If a size is none.
    RecipeError, CheckpointError, BudgetError, InTheWayError
        Unless `faults` keeps them.
    """
    options = _options(order)
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
            _check_disks(examined.planned, announce)
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


def _options(order: Order) -> _Options:
    return _Options(
        out=order.out,
        memory=None if order.memory is None else parse_bytes(order.memory),
        workers=order.workers or cpu_count(),
        store="copy" if order.store == "copy" else "virtual",
        chunk_bytes=parse_bytes(order.chunk_size),
        shard_bytes=None if order.shard_size is None else parse_bytes(order.shard_size),
        tensors=order.tensors,
    )


@dataclass(frozen=True, slots=True)
class _Options:
    """How a merge is to be made, sizes in bytes."""

    out: str | Path | None
    memory: int | None
    workers: int
    store: Literal["virtual", "copy"]
    chunk_bytes: int
    shard_bytes: int | None
    tensors: Differing | None


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
    checkpoints = open_models(recipe.inputs, announce, made, faults)
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
            vocabulary = merge_vocabularies(recipe, checkpoints[: len(recipe.sources)], staged)
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
        refuse_gathered(plan)
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


def _check_disks(planned: Sequence[Planned], announce: Announcer) -> None:
    """Room for everything; or, of a result of several files, for those that are open at once, to be handed over."""
    needs = [copies_need(found.plan, found.merge.workspace) for found in planned]
    waiting = [found for found in planned if outputs.finished(found.plan) is None]
    needs += [statistics_need(found.plan, found.merge.workspace) for found in waiting]
    needs += [
        Need(found.merge.workspace.root, found.plan.vocabulary.made_bytes, "what is made of rows that models lack")
        for found in planned
        if found.plan.vocabulary is not None
    ]
    needs += [
        replace(output_need(found.plan, _head_bytes(found)), what=f"what the earlier merge '{found.merge.name}' makes")
        for found in waiting
        if found is not planned[-1]
    ]
    last = planned[-1]
    if last not in waiting:
        check_room(needs)
        return
    try:
        check_room([output_need(last.plan, _head_bytes(last)), *needs])
    except DiskFullError:
        if len(last.plan.groups) <= SHARDS_OPEN:
            raise
        check_room([output_need(last.plan, _head_bytes(last), handed_over=True), *needs])
        announce(
            Note(
                f"the disk of '{last.plan.output}' has no room for all {last.plan.layout().nbytes:,} bytes of the "
                f"output: only `mergepipe run --on-shard COMMAND`, which moves complete files away as it goes, can "
                f"finish there"
            )
        )


def _head_bytes(found: Planned) -> Callable[[Source], int]:
    """Bytes of a head that a model keeps for itself."""
    return lambda source: found.checkpoints[source.model].tensors[source.name].nbytes


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
    whole = any(_is_whole(tensor, plan.seed) for stage in plan.stages for tensor in stage.tensors)
    if memory is None and whole:
        plan = stages.with_allowed(plan, max(DEFAULT_ALLOWED, available_bytes() // 2))
    # Tensors at odd places of their files can't be mapped: each window takes memory.
    odd = [any(t.offset % 8 for t in stored_of(found).tensors.values()) for found in checkpoints]
    odd += [False] * (len(plan.models) - len(odd))
    gathered = [model.store == "copy" or at for model, at in zip(plan.models, odd, strict=True)]
    for stage in plan.stages:
        schedule(stage, Ceiling(plan.allowed, workers or cpu_count()), gathered=gathered)
    return plan


def _withdraw(workspace: Workspace, plan: Plan) -> None:
    """Remove the plan of another merge before its stores are replaced: a build that dies between leaves none."""
    if workspace.plan_file.exists() and Plan.from_json(workspace.read_plan()).id != plan.id:
        workspace.plan_file.unlink()
        fsync_path(workspace.root)


def _is_whole(tensor: PlannedTensor, seed: int) -> bool:
    """Whether a tensor's method looks at it as a whole matrix."""
    return tensor.action == "merge" and find_method(tensor.method).whole(tensor.job(seed)) is not None


def make_plan(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    alignment: Alignment,
    *,
    store: Literal["virtual", "copy"],
    output: Path,
    allowed: int,
    chunk_bytes: int,
    shard_bytes: int | None,
    before: Sequence[Plan] = (),
    faults: Faults = FIRST,
    vocabulary: PlannedVocabulary | None = None,
    beside: BesideFiles | None = None,
) -> Plan:
    """Decide everything; pure apart from what the arguments hold.

    Parameters
    ----------
    recipe : Recipe
    checkpoints : sequence of Checkpoint
        One per `recipe.inputs`, in that order.
    alignment : Alignment
    store : {'virtual', 'copy'}
    output : Path
    allowed, chunk_bytes, shard_bytes : int
        In bytes; `shard_bytes` None keeps the division of the first checkpoint.
    before : sequence of Plan
        Those of the merges that come before, if any.
    faults : Faults, optional
        Takes in what is wrong; where it keeps faults, tensors that have some are left out of the plan.
    vocabulary : PlannedVocabulary, optional
        Where rows of vocabulary-indexed tensors come from; `checkpoints` have the shapes that follow.
    beside : BesideFiles, optional
        What is written beside the weights in place of the first checkpoint's files.

    Raises
    ------
    RecipeError
        If a tensor gets a setting that is missing or out of bounds, or that its shape does not suit.
    """
    opened = as_models(checkpoints, recipe.inputs)
    models = _plan_models(recipe, opened, store, {plan.output for plan in before})
    tensors = plan_tensors(opened, alignment, recipe.seed, faults)
    sound = {tensor.name for tensor in tensors}
    alignment = replace(alignment, tensors=tuple(t for t in alignment.tensors if t.name in sound))
    adapter = checkpoints[0].is_adapter
    # PEFT knows one file only.
    groups = _plan_groups(tensors, alignment, opened, 1 << 62 if adapter else shard_bytes)
    side = {
        models[number].label: tuple(_side_source(opened, number, name) for name in names)
        for number, names in sorted(alignment.side.items())
    }
    shown = _shown_recipe(recipe, models)
    earlier = earlier_of(before)
    recipes = [*(one.recipe for one in earlier), shown]
    beside = beside or BesideFiles()
    config = copy.deepcopy(alignment.config)
    outputs.put_values(config, beside.config)
    metadata = {"format": "pt", "mergepipe.recipe": json.dumps(recipes if earlier else shown, sort_keys=True)}
    plan = Plan(
        format=PLAN_FORMAT,
        id=plan_id(tensors, models, groups, metadata, side, recipe.seed, config, vocabulary),
        version=version("mergepipe"),
        recipe=shown,
        models=models,
        tensors=tensors,
        groups=groups,
        metadata=metadata,
        output=str(output),
        side=side,
        sidecar=0,
        dtype=recipe.output_dtype,
        notes=(*recipe.notes, *_input_notes(opened), *beside.notes, *alignment.notes, *_idle_rules(recipe, tensors)),
        allowed=allowed,
        chunk_bytes=chunk_bytes,
        seed=recipe.seed,
        config=config,
        earlier=earlier,
        stem="adapter_model" if adapter else "model",
        vocabulary=vocabulary,
        beside=beside.beside,
    )
    return stages.split(plan)


def _source(checkpoints: Sequence[InputModel], number: int, name: str) -> Source:
    """A tensor of a model as it is stored, and what has to be done to it."""
    found = checkpoints[number]
    return Source(number, name, found.stored.tensors[name].dtype, found.adjust.get(name, ()))


def _side_source(checkpoints: Sequence[InputModel], number: int, name: str) -> Source:
    source = _source(checkpoints, number, name)
    if source.adjust:
        raise CheckpointError(
            f"'{name}' of '{checkpoints[number].reference}' has an adapter or scales, and can't be kept beside the "
            "merge as it is stored: use `heads: base` or `heads: model:<path>`, or save the model merged first"
        )
    return source


def _input_notes(checkpoints: Sequence[InputModel]) -> list[str]:
    notes = [note for found in checkpoints for note in found.notes]
    notes += [
        f"'{found.root}' holds {', '.join(found.beside[:5])} beside the state dict: left out"
        for found in checkpoints
        if found.beside
    ]
    return notes + [
        f"'{found.root}' stores {twin} and {name} as the same bytes: merged and written once, as {name}"
        for found in checkpoints
        for twin, name in found.twins.items()
    ]


def _idle_rules(recipe: Recipe, tensors: Sequence[PlannedTensor]) -> list[str]:
    """Rules that no tensor answers to: most likely misspelt."""
    used = {id(recipe.rule_for(tensor.name)) for tensor in tensors}
    return [
        f"the rule for '{rule.match}' applies to no tensor: no name matches, or an earlier rule comes first"
        for rule in recipe.rules
        if id(rule) not in used
    ]


def _plan_models(
    recipe: Recipe, checkpoints: Sequence[InputModel], asked: Literal["virtual", "copy"], made: AbstractSet[str]
) -> tuple[PlannedModel, ...]:
    bases = {recipe.base_model, *(part.base_model for part in parts_of(recipe))}
    models = []
    roles: dict[str, Literal["base", "model", "importance"]] = dict.fromkeys(recipe.inputs, "importance")
    roles |= dict.fromkeys(recipe.sources, "model")
    roles |= {path: "base" for path in bases if path is not None}
    for label, reference, checkpoint in zip(labels_of(recipe.inputs), recipe.inputs, checkpoints, strict=True):
        nbytes = sum(tensor.nbytes for tensor in checkpoint.stored.tensors.values())
        is_made = checkpoint.reference.model in made
        store: Literal["virtual", "copy"] = "virtual" if is_made else asked
        why = "asked for" if store == "copy" else "local files, read where they are"
        models.append(
            PlannedModel(
                label=label,
                path=str(checkpoint.root),
                role=roles[reference],
                store=store,
                why="made before, by this recipe" if is_made else why,
                tensors=len(checkpoint.tensors),
                nbytes=nbytes,
                copied_bytes=nbytes if store == "copy" else 0,
                fingerprint=fingerprint(checkpoint.stored),
                made=is_made,
                reference=reference,
                adapter=checkpoint.adapter,
                drops=checkpoint.drops,
            )
        )
    return tuple(models)


def labels_of(paths: Sequence[str]) -> list[str]:
    """The names of folders, made unique.

    Examples
    --------
    >>> labels_of(["/a/base", "/a/expert", "/b/expert"])
    ['base', 'expert', 'expert-2']
    """
    taken: Counter[str] = Counter()
    labels = []
    for path in paths:
        name = parse_reference(path).label
        taken[name] += 1
        labels.append(name if taken[name] == 1 else f"{name}-{taken[name]}")
    return labels


def plan_tensors(
    checkpoints: Sequence[Checkpoint], alignment: Alignment, seed: int, faults: Faults = FIRST
) -> tuple[PlannedTensor, ...]:
    """Every tensor of the output, with the settings that the recipe has for it.

    Raises
    ------
    RecipeError
        If a setting is missing or out of bounds, unless `faults` keeps it; then the sound tensors are returned.
    """
    opened = [one if isinstance(one, InputModel) else as_stored(one) for one in checkpoints]
    counts = [
        layer_counts(tensor.name for tensor in alignment.tensors if tensor.part == number)
        for number in range(len(alignment.views))
    ]
    found: list[Fault] = list(rule_faults(alignment))
    planned = []
    for tensor in alignment.tensors:
        try:
            view = alignment.views[tensor.part]
            made = _plan_tensor(view, opened, tensor, counts[tensor.part])
            _check_suits(made, seed)
            planned.append(made)
        except RecipeError as error:
            found += error.faults
    if found:
        faults.take(RecipeError(list(dict.fromkeys(found))))
    return tuple(planned)


def _check_suits(tensor: PlannedTensor, seed: int) -> None:
    """Have the method say, tensor by tensor, what it can't do with the values given."""
    if tensor.action == "copy":
        return
    job, method = tensor.job(seed), find_method(tensor.method)
    method.reductions(job)
    matrix = method.whole(job)
    if matrix is not None:
        matrix.peak(job)


def _plan_tensor(
    view: View, checkpoints: Sequence[InputModel], tensor: AlignedTensor, counts: dict[str, int]
) -> PlannedTensor:
    def source(number: int) -> Source:
        return _source(checkpoints, number, tensor.name_in(number))

    recipe = view.part.recipe
    adjusted = bool(source(tensor.source).adjust)
    copied = PlannedTensor(tensor.name, tensor.shape, tensor.dtype, "copy", source(tensor.source), ())
    if tensor.action == "copy" and not adjusted and not _recast(recipe, tensor.dtype):
        return copied
    if tensor.action == "copy":
        plain = find_method("passthrough")
        chosen = settings(recipe, tensor.name, 0) if recipe.method_for(tensor.name) == "passthrough" else None
        params = {p.name: p.default for p in plain.parameters if not p.per_model and not p.without_effect}
        model_params = ({p.name: p.default for p in plain.parameters if p.per_model},)
        return PlannedTensor(
            tensor.name,
            tensor.shape,
            _output_dtype(recipe, tensor.dtype),
            "merge",
            None,
            (source(tensor.source),),
            method="passthrough",
            params=chosen.params if chosen else params,
            model_params=chosen.model_params if chosen else model_params,
            work=_work_dtype([tensor.dtype]),
        )
    layer, n_layers = view.place(tensor.name, counts)
    names = [tensor.name] * len(recipe.experts_for(tensor.name))
    kept = range(len(names)) if tensor.kept is None else tensor.kept
    for place, number in zip(kept, tensor.models, strict=True):
        names[place] = tensor.name_in(number)
    wanted = settings(recipe, tensor.name, n_layers, layer=layer, names=names)
    base = None if tensor.base is None else source(tensor.base)
    if base is not None and base.adjust and find_method(wanted.method).masks is not None:
        raise CheckpointError(
            f"'{tensor.name}': {wanted.method} keeps masks that need the base as it is stored, and "
            f"'{checkpoints[base.model].reference}' has an adapter or scales: save it merged first"
        )
    models = tuple(source(number) for number in tensor.models)
    importances = tuple(source(number) for number in tensor.importances)
    return PlannedTensor(
        tensor.name,
        tensor.shape,
        _output_dtype(recipe, tensor.dtype),
        "merge",
        base,
        models,
        method=wanted.method,
        params=_as_saved(wanted.params),
        model_params=tuple(_as_saved(wanted.model_params[place]) for place in kept),
        sparsify=wanted.sparsify,
        sparsify_params=tuple(_as_saved(wanted.sparsify_params[place]) for place in kept if wanted.sparsify_params),
        work=_work_dtype([s.dtype for s in (*models, *importances)] + ([base.dtype] if base else [])),
        scope=wanted.scope,
        importances=importances,
    )


def _as_saved(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as they come back from a saved plan, where lists are lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in params.items()}


def _recast(recipe: Recipe, dtype: str) -> bool:
    return DTYPES[dtype].role == "merged" and _output_dtype(recipe, dtype) != dtype


def _output_dtype(recipe: Recipe, stored: str) -> str:
    return MERGED_ALIASES[recipe.output_dtype].name if recipe.output_dtype else stored


def _work_dtype(dtypes: Sequence[str]) -> str:
    return "float64" if "F64" in dtypes else "float32"


def _plan_groups(
    tensors: Sequence[PlannedTensor],
    alignment: Alignment,
    checkpoints: Sequence[InputModel],
    shard_bytes: int | None,
) -> tuple[tuple[str, ...], ...]:
    """Which tensors share an output file: those that share one in the base, or as many as fit `shard_bytes`.

    Slices have no base whose division they could keep: their files are as large as the largest of the first model.
    """
    if shard_bytes is None and any(view.part.sliced for view in alignment.views):
        sizes = Counter[int]()
        for entry in checkpoints[0].tensors.values():
            sizes[entry.file] += entry.nbytes
        shard_bytes = max(sizes.values())
    if shard_bytes is not None:
        filled = group_by_size([tensor.output for tensor in tensors], shard_bytes)
        return tuple(tuple(tensor.name for tensor in group) for group in filled) or ((),)
    files: dict[tuple[int, int], list[str]] = {}
    for tensor in alignment.tensors:
        lender = 0 if alignment.views[tensor.part].part.module is not None else tensor.source
        kept = checkpoints[0].tensors.get(tensor.name) if lender == 0 else None
        # A tensor that another model lends (a head) joins that model's file only if the first has no file at all.
        key = (0, kept.file) if kept is not None else (0, max((f for _, f in files), default=0))
        files.setdefault(key, []).append(tensor.name)
    return tuple(tuple(names) for _, names in sorted(files.items())) or ((),)


def _shown_recipe(recipe: Recipe, models: Sequence[PlannedModel]) -> dict[str, Any]:
    """The recipe for the header, the card and the manifest: folder names in place of paths of this machine."""
    # Ids of a hub say where a model is from, for everybody; with the commit that was read.
    labels = {model.reference: model.public for model in models}

    def shorten(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shorten(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [shorten(item) for item in value]
        if isinstance(value, str):
            prefix = "model:" if value.startswith("model:") else ""
            return prefix + labels.get(value.removeprefix(prefix), value.removeprefix(prefix))
        return value

    shown: dict[str, Any] = shorten(recipe.to_dict())
    shown.pop("output", None)
    return shown


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
    """
    manifests = _write_stores(workspace, plan, checkpoints, announce)
    if vocabulary is not None:
        write_rows(workspace.vocabulary, vocabulary, checkpoints, manifests)
    workspace.write_beside({} if beside is None else beside.contents)
    workspace.write_plan(plan.to_json())


def _write_stores(
    workspace: Workspace, plan: Plan, checkpoints: Sequence[Checkpoint], announce: Announcer
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
        manifest = _make_store(model, checkpoint, folder, plan.chunk_bytes, announce, mend=mend)
        manifest.save(manifest_file)
        workspace.unmark_damage(number, model.label)
        manifests[number] = manifest
        if manifest.kind == "virtual":
            references = json.dumps(kerchunk_references(manifest)).encode()
            (folder / "kerchunk.json").write_bytes(references)
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
        check_inputs([ChunkManifest.load(manifest_file)])
    except (InputChangedError, WorkspaceError):
        return False
    return True


def _make_store(
    model: PlannedModel, checkpoint: Checkpoint, folder: Path, chunk_bytes: int, announce: Announcer, *, mend: bool
) -> ChunkManifest:
    if model.store == "virtual":
        return virtual_manifest(stored_of(checkpoint), chunk_bytes)
    return copy_store(
        stored_of(checkpoint),
        folder / "zarr",
        chunk_bytes,
        lambda nbytes: announce(CopyProgress(model.label, nbytes, model.nbytes)),
        resume=True,
        mend=mend,
    )
