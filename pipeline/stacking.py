"""Views: each part of a recipe sees its models as if they were whole models that fit each other.

A view of a checkpoint is the checkpoint with some of its tensors, under the names that they have in the output: the
layers that a slice takes, numbered as they will be, and the tensors before all layers or after them where it is the
first or the last slice; the tensors of one tower where the recipe goes by modules. Lining views up is then like lining
whole models up, and an entry of a view still knows its name in its own file.

Layers find their place by their number alone. A tensor outside the layers goes with the first or the last slice, as its
name says; one whose name does not say is refused by name, unless a rule passes it through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergepipe.errors import Fault, RecipeError
from mergepipe.pipeline.heads import is_lm_head, ties
from mergepipe.pipeline.parse_values import nearest
from mergepipe.pipeline.parts import Part, parts_of
from mergepipe.pipeline.recipe import ModelSpec, Recipe
from mergepipe.pipeline.towers import kinds_of, main_stacks, side_of, tower_of, usual_names
from mergepipe.pipeline.values import layer_counts, layer_of, stack_of

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint, TensorEntry

Tensors = dict[str, "TensorEntry"]


@dataclass(frozen=True, slots=True)
class View:
    """What one part sees.

    Attributes
    ----------
    part : Part
    stack : str or None
        The layers that are stacked, for a part made from slices.
    checkpoints : tuple of Checkpoint
        One per source of the part's recipe, with the part's tensors only, under their names in the output.
    """

    part: Part
    stack: str | None
    checkpoints: tuple[Checkpoint, ...]

    def place(self, tensor_name: str, counts: Mapping[str, int]) -> tuple[int | None, int]:
        """Layer of a tensor among those that gradients run over, and how many these are.

        Parameters
        ----------
        tensor_name : str
            In the output.
        counts : mapping of str to int
            Layers of each stack that the part makes from whole models.
        """
        stack, layer = stack_of(tensor_name), layer_of(tensor_name)
        if not self.part.sliced:
            return layer, 0 if stack is None else counts.get(stack, 0)
        if layer is None or stack != self.stack:
            return None, 0
        return layer - self.part.first_layer, self.part.layers


@dataclass(slots=True)
class Views:
    """All views of a recipe, and what is to be said about them.

    Attributes
    ----------
    views : list of View
    towers : mapping of str to (str or None)
        The module that each tensor belongs to, by its name in its checkpoint; None for all where there are no modules.
    problems : dict of str to str
        What does not fit, with its remedy.
    notes : list of str
    """

    towers: Mapping[str, str | None]
    views: list[View] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def views_of(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> Views:
    """The views of all parts of a recipe.

    Parameters
    ----------
    recipe : Recipe
    checkpoints : sequence of Checkpoint
        One per entry of `recipe.sources`.

    Raises
    ------
    RecipeError
        If a module is none of the models'.
    """
    towers = _towers(recipe, checkpoints)
    found = Views(towers)
    opened = dict(zip(recipe.sources, checkpoints, strict=True))
    parts = parts_of(recipe)
    for module in dict.fromkeys(part.module for part in parts):
        mine = [part for part in parts if part.module == module]
        if mine[0].sliced:
            _stack(mine, opened, checkpoints[0], found)
            continue
        part = mine[0]
        chosen = tuple(_only(opened[path], towers, module) for path in part.recipe.sources)
        found.views.append(View(part, None, chosen))
    if recipe.modules:
        _rest(recipe, checkpoints[0], towers, found)
    return found


def _towers(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> Mapping[str, str | None]:
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors)
    if not recipe.modules:
        return dict.fromkeys(names)
    kinds = kinds_of(names)
    towers = {name: tower_of(name, recipe.modules, kinds) for name in names}
    empty = set(recipe.modules) - set(towers.values())
    if empty:
        there = {name.partition(".")[0] for name in names} | usual_names(kinds)
        raise RecipeError(
            [
                Fault(
                    f"$.modules.{name}", f"is no tower of these models: no tensor belongs to it; {nearest(name, there)}"
                )
                for name in sorted(empty)
            ]
        )
    return towers


def _only(checkpoint: Checkpoint, towers: Mapping[str, str | None], module: str | None) -> Checkpoint:
    """The tensors of one module."""
    if module is None:
        return checkpoint
    return replace(checkpoint, tensors={name: t for name, t in checkpoint.tensors.items() if towers[name] == module})


def _rest(recipe: Recipe, first: Checkpoint, towers: Mapping[str, str | None], found: Views) -> None:
    """What no module claims is the first source's."""
    left = [name for name in first.tensors if towers[name] is None]
    if not left:
        return
    path = recipe.sources[0]
    found.notes.append(
        f"{len(left)} tensors belong to none of the modules named and are copied from '{path}': {', '.join(left[:2])}"
        + (" …" if len(left) > 2 else "")
    )
    plain = replace(
        recipe, merge_method="passthrough", models=(ModelSpec(path),), base_model=None, parameters={}, modules={}
    )
    part = Part("$.modules", "$.modules", replace(plain, sparsify=None))
    found.views.append(View(part, None, (_only_names(first, left),)))


def _only_names(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    return replace(checkpoint, tensors={name: checkpoint.tensors[name] for name in names})


def _stack(parts: Sequence[Part], opened: Mapping[str, Checkpoint], first: Checkpoint, found: Views) -> None:
    """The views of the slices of one tower."""
    module = parts[0].module
    paths = dict.fromkeys(path for part in parts for path in part.recipe.sources)
    inside = {path: _only(opened[path], found.towers, module).tensors for path in paths}
    stacks = {path: _stack_in(path, inside[path], opened[path], found) for path in paths}
    if None in stacks.values():
        return
    names = set(stacks.values())
    if len(names) > 1:
        listed = ", ".join(f"{stack} in '{path}'" for path, stack in stacks.items())
        found.problems[f"the layers have different names: {listed}"] = (
            "slices of models of one architecture can be stacked"
        )
        return
    stack = names.pop()
    assert stack is not None
    counts = {path: layer_counts(inside[path])[stack] for path in paths}
    for part in parts:
        for path, (_, stop) in part.ranges.items():
            if stop > counts[path]:
                text = (
                    f"{part.listing}: layers up to {stop - 1} are asked of '{path}', which has 0 to {counts[path] - 1}"
                )
                found.problems[text] = "mend `layer_range`: its end is one past the last layer taken"
    for path in paths:
        _drop_twin(parts, path, inside, opened[path], first, found)
    layers = {path: _by_layer(inside[path], stack) for path in paths}
    for part in parts:
        seen = tuple(
            replace(opened[path], tensors=_renamed(part, path, layers[path], stack, found))
            for path in part.recipe.sources
        )
        if any(checkpoint.tensors for checkpoint in seen):
            found.views.append(View(part, stack, seen))


def _stack_in(path: str, tensors: Tensors, checkpoint: Checkpoint, found: Views) -> str | None:
    stacks = main_stacks(tensors, checkpoint.config)
    if len(stacks) == 1:
        return stacks[0]
    if stacks:
        counts = layer_counts(tensors)
        listed = ", ".join(f"{stack} ({counts[stack]})" for stack in stacks)
        remedy = "say under `modules:` which slices are of which tower"
        found.problems[f"'{path}' has several stacks of layers: {listed}"] = remedy
    else:
        found.problems[f"'{path}' has no numbered layers that could be sliced"] = "list it under `models`"
    return None


def within_layer(tensor_name: str, stack: str) -> str:
    """What a tensor is called in its layer: the same in all layers."""
    return tensor_name.removeprefix(f"{stack}.").partition(".")[2]


def only_in_first(tensor_names: Iterable[str], stack: str) -> set[str]:
    """What the first layer of a stack has and no other, such as the position table that all layers of T5 share."""
    layers: dict[str, set[int | None]] = {}
    for name in tensor_names:
        if stack_of(name) == stack:
            layers.setdefault(within_layer(name, stack), set()).add(layer_of(name))
    several = len(set().union(*layers.values())) > 1
    return {kind for kind, where in layers.items() if several and where == {0}}


Layers = dict[int | None, list[tuple[str, "TensorEntry"]]]
"""The tensors of each layer, with their names in it; those outside the layers at None, with their whole names."""


def _by_layer(tensors: Tensors, stack: str) -> Layers:
    found: Layers = {None: []}
    for name, entry in tensors.items():
        inside = stack_of(name) == stack
        key, called = (layer_of(name), within_layer(name, stack)) if inside else (None, name)
        found.setdefault(key, []).append((called, entry))
    return found


def _renamed(part: Part, path: str, layers: Layers, stack: str, found: Views) -> Tensors:
    """The tensors that a part takes of one model, by their names in the output, in the order of its files."""
    start, stop = part.ranges[path]
    taken = {name: entry for name, entry in layers[None] if _is_in(part, name, path, found)}
    others = {name for layer, inside in layers.items() if layer for name, _ in inside}
    for layer in range(start, stop):
        number = part.first_layer + layer - start
        for rest, entry in layers.get(layer, ()):
            if layer == 0 != number and others and rest not in others:
                note = f"'{entry.name}' of '{path}' is left out, models have one in layer 0 only"
                found.notes.append(f"{part.path}: {note}")
                continue
            taken[f"{stack}.{number}.{rest}" if rest else f"{stack}.{number}"] = entry
    return dict(sorted(taken.items(), key=lambda item: (item[1].file, item[1].offset)))


def _is_in(part: Part, name: str, path: str, found: Views) -> bool:
    """Whether a tensor outside the layers goes with this slice."""
    if part.first and part.last:
        return True
    side = side_of(name)
    if side is None:
        rule = part.recipe.rule_for(name)
        if rule is not None and rule.merge_method == "passthrough":
            return part.first
        if part.first or part.last:
            text = (
                f"'{name}' in '{path}' is in no layer, and its name does not say whether it comes before or after them"
            )
            found.problems[text] = "a rule {match: NAME, merge_method: passthrough} takes it from the first slice"
        return False
    return part.first if side == "before" else part.last


def _drop_twin(
    parts: Sequence[Part],
    path: str,
    inside: dict[str, Tensors],
    checkpoint: Checkpoint,
    first: Checkpoint,
    found: Views,
) -> None:
    """Leave out a stored twin of the embedding where that of the output is another model's, and tied."""
    if len(parts) < 2 or not ties(first.config) or not ties(checkpoint.config):
        return
    twins = [name for name in inside[path] if is_lm_head(name)]
    if twins:
        found.notes.append(f"left out of '{path}', the configuration ties it to the embedding: {', '.join(twins)}")
        inside[path] = {name: entry for name, entry in inside[path].items() if name not in twins}
