"""Planning merges that read merges not made yet: from the plan of one follow the headers that the next will find.

Shapes, types, offsets, files and configuration of an output are all decided by its plan. So the next merge of a chain
is lined up, checked and planned like any other, before a byte of the first is made; its plan's id has the first one's
id in it, as it would have the headers of files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergepipe.errors import BudgetError, CheckpointError, CheckpointNotFoundError, Fault, MergepipeError, RecipeError
from mergepipe.pipeline import outputs, side_files
from mergepipe.pipeline.faults import Faults
from mergepipe.pipeline.plan import Earlier, Plan
from mergepipe.pipeline.records import read_record
from mergepipe.storage.checkpoint import Checkpoint, FileInfo, TensorEntry


def made_checkpoint(plan: Plan, config: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint that a plan will have made.

    Parameters
    ----------
    plan : Plan
    config : mapping
        The configuration of its sidecar model. Not modified.

    Returns
    -------
    Checkpoint
        With the plan's id for the hash of headers, and no times: it stands for files that are not there yet.
    """
    folder = Path(plan.output)
    layout = plan.layout()
    files = tuple(FileInfo(str(folder / shard.file), shard.size, 0, 0, f"plan {plan.id}") for shard in layout.shards)
    tensors = {
        t.name: TensorEntry(t.name, t.dtype, t.shape, t.shard, t.offset, t.nbytes)
        for shard in layout.shards
        for t in shard.tensors
    }
    values = copy.deepcopy(dict(config))
    side_files.put_values(values, outputs.config_changes(plan))
    return Checkpoint(folder, files, tensors, values)


def as_planned(checkpoint: Checkpoint) -> Checkpoint:
    """A made merge as it was known before it was made, so that it has the same fingerprint; others as they are."""
    try:
        name = read_record(checkpoint.root)["plan"]
    except ValueError:
        return checkpoint
    files = (FileInfo(info.path, info.size, 0, 0, f"plan {name}") for info in checkpoint.files)
    return replace(checkpoint, files=tuple(files))


def is_whole(plan: Plan) -> bool:
    """Whether a merge is made, and all its files are there in their sizes."""
    if outputs.finished(plan) is None:
        return False
    paths = [(Path(plan.output) / shard.file, shard.size) for shard in plan.layout().shards]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def earlier_of(plans: Sequence[Plan]) -> tuple[Earlier, ...]:
    """What a plan keeps of those that come before it."""
    return tuple(Earlier(plan.recipe, tuple(m.public for m in plan.models if not m.made)) for plan in plans)


@contextmanager
def collected(errors: list[tuple[str, MergepipeError]], name: str) -> Iterator[None]:
    """Put what ends the block on a list, under the name of a merge, if the rest of a chain can be looked at anyway."""
    try:
        yield
    except (RecipeError, CheckpointError, BudgetError) as error:
        errors.append((name, error))


def take_together(errors: Sequence[tuple[str, MergepipeError]], names: Sequence[str], faults: Faults) -> None:
    """Raise what is wrong with the merges of a chain as one error, or have each error kept under its merge's name.

    Parameters
    ----------
    errors, names
        As for :func:`raise_together`.
    faults : Faults
    """
    if not faults.keep:
        raise_together(errors, names)
    for name, error in errors:
        if names and isinstance(error, RecipeError):
            error = RecipeError([Fault(f"{name}: {fault.path}", fault.message) for fault in error.faults])
        elif names:
            told = type(error)(f"in the merge '{name}': {error}")
            if isinstance(error, CheckpointError) and isinstance(told, CheckpointError):
                told.problems = tuple(f"in the merge '{name}': {text}" for text in error.problems)
            error = told
        faults.take(error)


def raise_together(errors: Sequence[tuple[str, MergepipeError]], names: Sequence[str]) -> None:
    """Raise what is wrong with the merges of a chain as one error; nothing if nothing is.

    Parameters
    ----------
    errors : sequence of (str, MergepipeError)
        Each with the name of the merge.
    names : sequence of str
        Of all merges that others read; none where there is one merge only, and its error is raised as it is.
    """
    if not errors:
        return
    if not names:
        raise errors[0][1]
    recipes = [(name, error) for name, error in errors if isinstance(error, RecipeError)]
    if len(recipes) == len(errors):
        found = [Fault(f"{name}: {fault.path}", fault.message) for name, error in recipes for fault in error.faults]
        raise RecipeError(found)
    text = "\n".join(f"in the merge '{name}': {error}" for name, error in errors)
    if any(isinstance(error, CheckpointNotFoundError) for _, error in errors):
        text += f"\nA recipe's own merges go by their names: {', '.join(names)}"
    kinds = [type(error) for _, error in errors if not isinstance(error, RecipeError)]
    checkpoint = next((kind for kind in kinds if issubclass(kind, CheckpointError)), None)
    raise (checkpoint or kinds[0])(text)
