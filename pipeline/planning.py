"""From an aligned recipe to a plan: every model, tensor, file and setting, decided from headers alone. Pure."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Hashable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from mergepipe.errors import (
    CheckpointError,
    Fault,
    RecipeError,
)
from mergepipe.pipeline import side_files, stages
from mergepipe.pipeline.align import AlignedTensor, Alignment
from mergepipe.pipeline.beside import BesideFiles
from mergepipe.pipeline.chain_plan import earlier_of
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.kinds import kind_of
from mergepipe.pipeline.models import InputModel, as_models, as_stored
from mergepipe.pipeline.parts import parts_of
from mergepipe.pipeline.plan import PLAN_FORMAT, Plan, PlannedModel, PlannedTensor, Source, plan_id
from mergepipe.pipeline.recipe import Recipe, settings
from mergepipe.pipeline.references import parse_reference
from mergepipe.pipeline.scope import rule_faults
from mergepipe.pipeline.shared_settings import SharedSettings
from mergepipe.pipeline.stacking import View
from mergepipe.pipeline.values import layer_counts
from mergepipe.pipeline.vocabulary_rows import PlannedVocabulary
from mergepipe.storage.checkpoint import Checkpoint, fingerprint
from mergepipe.storage.dtypes import DTYPES, MERGED_ALIASES
from mergepipe.storage.layout import group_by_size
from mergepipe.tasks.registry import method as find_method


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
    side_files.put_values(config, beside.config)
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
        side_bytes=sum(opened[one.model].stored.tensors[one.name].nbytes for kept in side.values() for one in kept),
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
        side_files=None if models[0].made else side_files.look_at(Path(models[0].path), beside.beside.withheld),
        head_files={
            models[number].label: side_files.look_at(Path(models[number].path))
            for number in sorted(alignment.side)
            if not models[number].made
        },
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
    asked = [SharedSettings(view.part.recipe) for view in alignment.views]
    found: list[Fault] = list(rule_faults(alignment))
    planned = []
    suited: set[Hashable] = set()
    for tensor in alignment.tensors:
        try:
            view = alignment.views[tensor.part]
            made = _plan_tensor(view, opened, tensor, counts[tensor.part], asked[tensor.part])
            kind = kind_of(made)
            if kind not in suited:
                _check_suits(made, seed)
                suited.add(kind)
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
    view: View,
    checkpoints: Sequence[InputModel],
    tensor: AlignedTensor,
    counts: dict[str, int],
    asked: SharedSettings,
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
    wanted = asked.of(tensor.name, n_layers, layer, names)
    base = None if tensor.base is None else source(tensor.base)
    if base is not None and base.adjust and find_method(wanted.method).masks is not None:
        raise CheckpointError(
            f"'{tensor.name}': {wanted.method} keeps masks that need the base as it is stored, and "
            f"'{checkpoints[base.model].reference}' has an adapter or scales. Make it in a document of its own before "
            f"this one ({{name: whole, merge_method: passthrough, models: [{{model: …}}]}}), and take that as the base"
        )
    models = tuple(source(number) for number in tensor.models)
    importances = tuple(_source(checkpoints, number, name) for number, name in tensor.importances)
    return PlannedTensor(
        tensor.name,
        tensor.shape,
        _output_dtype(recipe, tensor.dtype),
        "merge",
        base,
        models,
        method=wanted.method,
        params=wanted.params,
        model_params=tuple(wanted.model_params[place] for place in kept),
        sparsify=wanted.sparsify,
        sparsify_params=tuple(wanted.sparsify_params[place] for place in kept if wanted.sparsify_params),
        work=_work_dtype([s.dtype for s in (*models, *importances)] + ([base.dtype] if base else [])),
        scope=wanted.scope,
        importances=importances,
    )


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
