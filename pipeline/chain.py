"""Recipes of several documents: merges that feed on each other, the last one being the result.

Each document but one has a `name:`, which other documents use as they use the folder of a model. Such a merge is made
first, into the workspace, and is a model like any other from then on. The result is the document without a name, or the
last one. This module finds out which merges there are and in which order they have to be made; it puts the folder that
each will be made in for its name, and from there each document is a recipe of its own.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from mergepipe.errors import Fault, RecipeError, UsageError, WorkspaceError
from mergepipe.pipeline.document import apply_overrides, load_documents
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.recipe import Recipe, parse_recipe
from mergepipe.storage.workspace import Workspace

REFERENCES = frozenset({"model", "path", "base_model", "importance", "source", "tokenizer_source", "heads"})
"""Keys whose values may name a model."""


@dataclass(frozen=True, slots=True)
class Merge:
    """One merge of a chain.

    Attributes
    ----------
    name : str
        What the other documents call it; empty for the result where that has no name.
    recipe : Recipe
    workspace : Workspace
    output : str or None
        Where it is made; None for the result, which goes where its recipe or the user says.
    reads : tuple of str
        Names of the merges that it reads.
    """

    name: str
    recipe: Recipe
    workspace: Workspace
    output: str | None
    reads: tuple[str, ...] = ()


def load_chain(
    path: str | os.PathLike[str], work: Path, overrides: Sequence[str] = (), *, faults: Faults = FIRST
) -> tuple[Merge, ...]:
    """Read a recipe of one or several documents.

    Parameters
    ----------
    path : path
        A YAML file.
    work : Path
        The workspace.
    overrides : sequence of str
        As of `--set`, for the result; those that begin with ``documents[N].`` for document N, counted from 0.
    faults : Faults, optional
        Takes in the faults of a single document; where it keeps them, see
        :func:`mergepipe.pipeline.recipe.load_recipe`. Those of several are raised.

    Returns
    -------
    tuple of Merge
        In the order in which they have to be made, the result last; those that the result does not need left out.

    Raises
    ------
    RecipeError
        With the faults of all documents, each with the document's name.
    UsageError
        If an override does not fit.
    """
    return chain_of(load_documents(Path(path)), work, overrides, faults=faults)


def chain_of(
    documents: Sequence[Mapping[str, Any]],
    work: Path,
    overrides: Sequence[str] = (),
    *,
    relative_to: str | os.PathLike[str] | None = None,
    faults: Faults = FIRST,
) -> tuple[Merge, ...]:
    """The merges that documents describe; see :func:`load_chain`."""
    given = [dict(document) for document in documents]
    last = _result(given)
    given = _overridden(given, last, overrides)
    root = Workspace(work)
    if len(given) == 1:
        return (Merge("", parse_recipe(given[0], relative_to=relative_to, faults=faults), root, None),)
    wrong, names = _names(given)
    folders = {name: str(root.merged(_safe(name))) for number, name in names.items() if number != last}
    reads = [_bound(document, folders)[1] for document in given]
    order = _order(reads, names, last, wrong)
    merges = []
    for number in order:
        name, label = names.get(number, ""), _label(number, names)
        try:
            recipe = parse_recipe(_bound(given[number], folders)[0], relative_to=relative_to)
        except RecipeError as error:
            wrong += [Fault(f"{label}: {fault.path}", fault.message) for fault in error.faults]
            continue
        workspace = root if number == last else root.merge(_safe(name))
        unread = [names[n] for n in names if n not in order] if number == last else []
        recipe = _noted(recipe, number, last, label, unread)
        merges.append(Merge(name, recipe, workspace, folders.get(name), tuple(sorted(reads[number]))))
    if wrong:
        raise RecipeError(wrong)
    return tuple(merges)


def check_dropped(root: Workspace, merges: Sequence[Merge], force: bool) -> None:
    """Refuse to drop the unfinished work of a merge that is not in the recipe any more.

    Raises
    ------
    WorkspaceError
        Unless `force`.
    """
    kept = {merge.workspace.root.name for merge in merges}
    dropped = [name for name in root.earlier() if name not in kept and root.merge(name).begun()]
    if dropped and not force:
        raise WorkspaceError(
            f"'{root.root}' holds work of the merge '{dropped[0]}', not in the recipe any more: finish the older one "
            f"with `mergepipe run`, drop it with --force, or use another --work"
        )


def _result(documents: Sequence[Mapping[str, Any]]) -> int:
    """Number of the document that is the result."""
    unnamed = [number for number, document in enumerate(documents) if document.get("name") is None]
    return unnamed[-1] if unnamed else len(documents) - 1


def _overridden(documents: list[dict[str, Any]], last: int, overrides: Sequence[str]) -> list[dict[str, Any]]:
    found = list(documents)
    for override in overrides:
        match = re.match(r"(?:\$\.)?documents\[(\d{1,3})\]\.", override)
        number = last if match is None else int(match[1])
        if number >= len(found):
            raise UsageError(f"--set {override}: there are {len(found)} documents, counted from 0")
        found[number] = apply_overrides(found[number], [override if match is None else override[match.end() :]])
    return found


def _label(number: int, names: Mapping[int, str]) -> str:
    return names.get(number, f"document {number + 1}")


def _names(documents: Sequence[Mapping[str, Any]]) -> tuple[list[Fault], dict[int, str]]:
    """What is wrong with the names, and the name of each document that has one."""
    faults: list[Fault] = []
    names: dict[int, str] = {}
    unnamed = [number for number, document in enumerate(documents) if document.get("name") is None]
    for number in unnamed[:-1]:
        message = "is missing: of several documents one may have none, the result; others read the rest by name"
        faults.append(Fault(f"document {number + 1}: $.name", message))
    for number, document in enumerate(documents):
        name = document.get("name")
        if isinstance(name, str) and name and name.isprintable():
            if name in names.values():
                faults.append(Fault(f"document {number + 1}: $.name", f"'{name}' is another document's name already"))
            else:
                names[number] = name
    return faults, names


def _safe(name: str) -> str:
    """A name for a folder: the same, or with a hash where it would not do."""
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:80].lstrip(".") or "merge"
    return safe if safe == name else f"{safe}-{sha256(name.encode()).hexdigest()[:8]}"


def _bound(value: Any, folders: Mapping[str, str], key: str = "") -> tuple[Any, set[str]]:
    """A document with folders in place of the names of merges, and the names that there were."""
    if isinstance(value, Mapping):
        pairs = {k: _bound(v, folders, str(k)) for k, v in value.items()}
        return {k: found for k, (found, _) in pairs.items()}, set().union(*(read for _, read in pairs.values()))
    if isinstance(value, list | tuple):
        items = [_bound(item, folders) for item in value]
        return [found for found, _ in items], set().union(*(read for _, read in items))
    if key in REFERENCES and isinstance(value, str):
        prefix = "model:" if value.startswith("model:") else ""
        name, plus, adapter = value.removeprefix(prefix).partition("+")
        for candidate, rest in ((value.removeprefix(prefix), ""), (name, plus + adapter)):
            if candidate in folders:
                return prefix + folders[candidate] + rest, {candidate}
    return value, set()


def _order(reads: Sequence[set[str]], names: Mapping[int, str], last: int, faults: list[Fault]) -> list[int]:
    """Numbers of the documents that the result needs, each after those that it reads; a circle is a fault."""
    numbers = {name: number for number, name in names.items()}
    order: list[int] = []
    done: dict[int, bool] = {}

    def visit(number: int, path: tuple[int, ...]) -> None:
        if done.get(number):
            return
        if number in path:
            circle = " reads ".join(_label(n, names) for n in (*path[path.index(number) :], number))
            faults.append(Fault(f"{_label(number, names)}: $", f"the merges read each other in a circle: {circle}"))
            return
        for name in sorted(reads[number], key=lambda name: numbers[name]):
            visit(numbers[name], (*path, number))
        if not done.get(number):
            done[number] = True
            order.append(number)

    visit(last, ())
    return order


def _noted(recipe: Recipe, number: int, last: int, label: str, unread: Sequence[str]) -> Recipe:
    """The recipe with notes on what has no effect in a chain."""
    notes = [f"'{name}' is read by no merge that the result needs: it is not made" for name in unread]
    if number != last and recipe.output is not None:
        notes.append(f"`output` of '{label}' has no effect: what other merges read is made in the workspace")
        recipe = replace(recipe, output=None)
    return replace(recipe, notes=(*recipe.notes, *notes))
