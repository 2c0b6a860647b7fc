"""Which tensor of which model goes into which tensor of the output: decided from headers alone.

The output has the tensors of the base (of the first model where there is no base), in the order of its files; with
`differing` those of any model, or of all. Every model has to have each of them, in the same shape and of the same kind,
and no other; what does not fit is an error that names the tensor, the models and the remedy, all of them at once.
There are four exceptions, each noted: a tensor that a rule passes through, heads where the recipe says `heads`, the
stored twin of a tied embedding, and buffers that models compute for themselves. Nothing else is left out.

A recipe of slices or modules is lined up part by part, each from views of its models that fit each other like whole
models (:mod:`mergepipe.pipeline.stacking`); then it is made sure that the slices fit each other, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mergepipe.errors import CheckpointError, TensorMismatchError
from mergepipe.pipeline.adapters import check_adapters
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.heads import head_of, is_lm_head, ties
from mergepipe.pipeline.names import is_buffer, is_made_anew, is_position, refuse_quantised
from mergepipe.pipeline.recipe import ModelSpec, Recipe
from mergepipe.pipeline.stacked import Stack
from mergepipe.pipeline.stacking import View, views_of
from mergepipe.pipeline.vocabulary_tensors import vocabulary_tensors
from mergepipe.storage.dtypes import DTYPES

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint, TensorEntry

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class AlignedTensor:
    """One tensor of the output and where it comes from. Every index is a position in `Recipe.sources`.

    Attributes
    ----------
    name : str
    shape : tuple of int
    dtype : str
        Safetensors name, as stored in the checkpoint `source`; what the recipe says of dtypes is not in it.
    action : {'merge', 'copy'}
    source : int
        The checkpoint that is copied from; for a merge, the one that lends shape and type (the base, else the first).
    models : tuple of int
        For a merge, the checkpoint of each model of `Recipe.experts_for(name)` that has it, in that order; empty for a
        copy.
    base : int or None
        For a merge, the checkpoint of the base if the tensor's method takes one.
    importances : tuple of (int, str)
        For a method that takes them, the checkpoint of each model's importances, as a position in `Recipe.inputs`, and
        what the tensor is called there.
    part : int
        Position in `Alignment.views` of the part that it belongs to.
    kept : tuple of int or None
        For a merge of some of the models only, which of `Recipe.experts_for(name)` these are.
    names : dict of int to str
        What it is called in a checkpoint that calls it otherwise, by position.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["merge", "copy"]
    source: int
    models: tuple[int, ...] = ()
    base: int | None = None
    importances: tuple[tuple[int, str], ...] = ()
    part: int = 0
    kept: tuple[int, ...] | None = None
    names: dict[int, str] = field(default_factory=dict)

    def name_in(self, number: int) -> str:
        """What it is called in the checkpoint at a position."""
        return self.names.get(number, self.name)


@dataclass(frozen=True, slots=True)
class Alignment:
    """All tensors of the output, in the order of the base's files, and what is not in it.

    Attributes
    ----------
    tensors : tuple of AlignedTensor
    side : dict
        With `heads: separate`: names of the head tensors that each model keeps for itself, by position in
        `Recipe.sources`.
    notes : tuple of str
        What was left out or copied without being asked for, and why.
    left_out : int
        Names of tensors that are neither in the output nor in a side file.
    views : tuple of View
        The parts of the recipe and what each sees.
    config : dict
        What changes in the first source's configuration: new values, in mappings as deep as theirs.
    """

    tensors: tuple[AlignedTensor, ...]
    side: dict[int, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: int = 0
    views: tuple[View, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def merged(self) -> int:
        """How many tensors are merged."""
        return sum(tensor.action == "merge" for tensor in self.tensors)

    @property
    def copied(self) -> int:
        """How many tensors are copied."""
        return sum(tensor.action == "copy" for tensor in self.tensors)


Differing = Literal["union", "intersection"]
"""What becomes of a tensor that not every model has, where that is no error."""


def align(
    recipe: Recipe,
    checkpoints: Sequence[Checkpoint],
    faults: Faults = FIRST,
    differing: Differing | None = None,
) -> Alignment:
    """Line up the tensors of the checkpoints.

    Parameters
    ----------
    recipe : Recipe
    checkpoints : sequence of Checkpoint
        One per entry of `recipe.inputs`, in that order. Only the dtypes and shapes of their tensors and their
        `config` are looked at.
    faults : Faults, optional
        Takes in the disagreements; where it keeps them, the tensors that fit come back.
    differing : {'union', 'intersection'}, optional
        Tensors that not every model has are merged from those that have them, or left out; by default an error.

    Raises
    ------
    TensorMismatchError
        If models disagree about tensors: one lacks it, or its shape or kind differs.
    CheckpointError
        If a checkpoint is quantised; if adapters and models are mixed, or merged by a method that is not for them.
    """
    if len(checkpoints) != len(recipe.inputs):
        raise ValueError(f"expected {len(recipe.inputs)} checkpoints, one per input, found {len(checkpoints)}")
    refuse_quantised(recipe, checkpoints)
    check_adapters(recipe, checkpoints)
    return _Whole(recipe, checkpoints, differing).align(faults)


class _Whole:
    """Puts the parts of a recipe together."""

    def __init__(self, recipe: Recipe, checkpoints: Sequence[Checkpoint], differing: Differing | None = None) -> None:
        self.recipe = recipe
        self.checkpoints = checkpoints[: len(recipe.sources)]
        self.found = views_of(recipe, self.checkpoints)
        inputs = {path: (number, checkpoints[number]) for number, path in enumerate(recipe.inputs)}
        self.aligners = [_Aligner(view, inputs, differing) for view in self.found.views]
        places = {path: position for position, path in enumerate(recipe.sources)}
        self.places = [[places[path] for path in aligner.recipe.sources] for aligner in self.aligners]
        self.problems = {text: [remedy] for text, remedy in self.found.problems.items()}
        self.notes = list(self.found.notes)

    def align(self, faults: Faults) -> Alignment:
        """All parts in one, as far as they fit; `faults` takes what is wrong with any."""
        noted: dict[str, list[str]] = {}
        for aligner in self.aligners:
            aligner.align()
            for reason, names in aligner.noted.items():
                noted.setdefault(reason, []).extend(names)
        left_out = {name for names in noted.values() for name in names}
        config = self._check_stacks(left_out)
        self._look_for_a_head()
        for aligner in self.aligners:
            for text, remedies in aligner.problems.items():
                self.problems.setdefault(text, []).extend(remedies)
        if self.problems:
            faults.take(self._error())
        self.notes += [f"{reason}: {_some(names, 2)}" for reason, names in noted.items()]
        tensors = tuple(
            self._placed(number, tensor) for number, each in enumerate(self.aligners) for tensor in each.tensors
        )
        side = {
            places[index]: tuple(names)
            for each, places in zip(self.aligners, self.places, strict=True)
            for index, names in each.side.items()
        }
        count = sum(each.left_out for each in self.aligners)
        views = tuple(self.found.views)
        return Alignment(tensors, dict(sorted(side.items())), tuple(self.notes), count, views, config)

    def _check_stacks(self, left_out: set[str]) -> dict[str, Any]:
        """Have the slices of each tower fit the first source; what changes in its configuration."""
        path, first = self.recipe.sources[0], self.checkpoints[0]
        configs = {path: found.config for path, found in zip(self.recipe.sources, self.checkpoints, strict=True)}
        config: dict[str, Any] = {}
        sliced = [number for number, view in enumerate(self.found.views) if view.part.sliced]
        for module in dict.fromkeys(self.found.views[number].part.module for number in sliced):
            mine = [number for number in sliced if self.found.views[number].part.module == module]
            stack = Stack([self.found.views[number] for number in mine], path, first)
            made = {tensor.name: tensor.shape for number in mine for tensor in self.aligners[number].tensors}
            mine_first = {name: t for name, t in first.tensors.items() if self.found.towers[name] == module}
            expected = {name: entry.shape for name, entry in mine_first.items()}
            spared = {name for name, entry in mine_first.items() if is_made_anew(name, entry, first)}
            if not any(self.aligners[number].problems for number in mine) and not self.found.problems:
                by_token = vocabulary_tensors(self.checkpoints) if self.recipe.tokenizer is None else {}
                found = stack.problems(made, expected, left_out | spared, by_token)
                self.problems |= {text: [remedy] for text, remedy in found.items()}
            changes, notes = stack.changes(configs)
            _join(config, changes)
            self.notes += notes
        return config

    def _placed(self, number: int, tensor: AlignedTensor) -> AlignedTensor:
        """A tensor of a part as one of the whole."""
        places, views = self.places[number], self.aligners[number].checkpoints
        models = tuple(places[index] for index in tensor.models)
        base = None if tensor.base is None else places[tensor.base]
        found = {place: view.tensors.get(tensor.name) for place, view in zip(places, views, strict=True)}
        names = {place: entry.name for place, entry in found.items() if entry and entry.name != tensor.name}
        return replace(tensor, source=places[tensor.source], models=models, base=base, part=number, names=names)

    def _look_for_a_head(self) -> None:
        """A language model without tied embeddings needs two tables: with one, it would load with a random head."""
        config, tensors = self.checkpoints[0].config, self.checkpoints[0].tensors
        kind = str((config.get("architectures") or [""])[0])
        words = config.get("vocab_size")
        tables = [name for name, entry in tensors.items() if len(entry.shape) == 2 and entry.shape[0] == words]
        if kind.endswith(("ForCausalLM", "LMHeadModel")) and ties(config) is False and len(tables) == 1:
            text = (
                f"'{self.recipe.sources[0]}' has no lm_head: '{tables[0]}' is its only table of {words} rows, and its "
                f"config.json says `tie_word_embeddings: false`"
            )
            remedy = "restore lm_head.weight, or say `tie_word_embeddings: true` in config.json if the two are one"
            self.problems[text] = [remedy]

    def _error(self) -> CheckpointError:
        shown = [f"  {text}" for text in list(self.problems)[:MAX_PROBLEMS]]
        if len(self.problems) > MAX_PROBLEMS:
            shown.append(f"  and {len(self.problems) - MAX_PROBLEMS} more")
        remedies = dict.fromkeys(remedy for each in self.problems.values() for remedy in each)
        lines = ["the models do not fit together:", *shown, *(f"Remedy: {remedy}." for remedy in remedies)]
        refused = any(each.refused for each in self.aligners)
        error = (CheckpointError if refused else TensorMismatchError)("\n".join(lines))
        error.problems = tuple(f"{text}: {'; or '.join(remedies)}" for text, remedies in self.problems.items())
        return error


class _Aligner:
    """Goes through all names of one part once and collects tensors, notes and problems."""

    def __init__(
        self, view: View, inputs: Mapping[str, tuple[int, Checkpoint]], differing: Differing | None = None
    ) -> None:
        self.recipe = view.part.recipe
        self.inputs = inputs
        self.where = f"{view.part.path}: " if view.part.sliced else ""
        self.checkpoints = view.checkpoints
        self.differing = differing
        self.tensors: list[AlignedTensor] = []
        self.side: dict[int, list[str]] = {}
        self.noted: dict[str, list[str]] = {}
        self.left_out = 0
        self.problems: dict[str, list[str]] = {}
        self.refused = False
        self.experts: dict[int, tuple[int, ...]] = {}
        """What `_experts` has found, by identity of the rule that applies."""
        self.strangers = self._strangers()
        self.everyone = [i for i in range(len(self.checkpoints)) if i not in self.strangers]
        self.names = list(dict.fromkeys(name for i in self.everyone for name in self.checkpoints[i].tensors))
        self.own_heads = set() if self.recipe.heads is None else self._heads_that_differ()

    def align(self) -> None:
        """Fill `tensors`, `side`, `noted`, `left_out` and `problems`."""
        for name in self.names:
            self._place(name)

    def _place(self, name: str) -> None:
        """Decide about one name."""
        owners = {i: self.checkpoints[i].tensors[name] for i in self.everyone if name in self.checkpoints[i].tensors}
        rule = self.recipe.rule_for(name)
        if rule is not None and rule.merge_method == "passthrough":
            self._pass_through(name, owners)
        elif is_buffer(name, next(iter(owners.values()))):
            self._leave_out(name, "left out, models compute these buffers themselves")
        elif is_position(name):
            self._positions(name, owners)
        elif len(owners) < len(self.everyone) and self._is_tied_twin(name, owners):
            self._leave_out(name, "left out, the configuration ties it to the embedding")
        elif head_of(name) in self.own_heads:
            self._head(name, owners)
        elif self.differing is not None and len(owners) < len(self.everyone):
            self._not_everyones(name, owners)
        elif self._fits(name, owners):
            self._merge_or_copy(name, owners)

    # -- what becomes of a tensor that fits

    def _merge_or_copy(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        from mergepipe.tasks.registry import METHODS

        method = self.recipe.method_for(name)
        experts = self._experts(name)
        if method == "passthrough" and not self._is_scaled(name):
            self._copy(name, experts[0], owners)
        elif DTYPES[owners[0].dtype].role == "copied":
            self._copy(name, experts[0] if method == "passthrough" else 0, owners)
        else:
            wants = METHODS[method].base
            base = None if wants == "ignored" or (wants == "optional" and self.recipe.base_model is None) else 0
            entry = owners[0]
            importances = self._importances(name, experts) if METHODS[method].importance else ()
            self.tensors.append(AlignedTensor(name, entry.shape, entry.dtype, "merge", 0, experts, base, importances))

    def _importances(self, name: str, experts: Sequence[int]) -> tuple[tuple[int, str], ...]:
        """The checkpoints of each model's importances; what does not fit in them is a problem."""
        remedy = "compute them for every tensor, or merge this one in another way: {match: NAME, merge_method: linear}"
        found = []
        for spec, index in zip(self.recipe.experts_for(name), experts, strict=True):
            if spec.importance is None or spec.importance not in self.inputs:
                continue
            number, checkpoint = self.inputs[spec.importance]
            # A slice's layer has another number in the output than in the model, whose names importances have.
            expected = self.checkpoints[index].tensors[name]
            entry = checkpoint.tensors.get(expected.name)
            where = f"of the importances '{spec.importance}'"
            if entry is None:
                self._problem(f"'{expected.name}' is not among the tensors {where}", remedy)
            elif entry.shape != expected.shape:
                text = f"'{expected.name}' is {expected.shape} in {self._path(index)} but {entry.shape} {where}"
                self._problem(text, remedy)
            elif DTYPES[entry.dtype].role != "merged":
                self._problem(f"'{expected.name}' is {entry.dtype} {where}", "importances are floating-point numbers")
            found.append((number, expected.name))
        return tuple(found)

    def _copy(self, name: str, source: int, owners: Mapping[int, TensorEntry]) -> None:
        entry = owners[source]
        self.tensors.append(AlignedTensor(name, entry.shape, entry.dtype, "copy", source))

    def _pass_through(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        if 0 not in owners:
            self._leave_out(name, f"left out, a rule passes it through and {self._path(0)} has none")
        elif self._is_scaled(name) and DTYPES[owners[0].dtype].role == "merged":
            entry = owners[0]
            self.tensors.append(AlignedTensor(name, entry.shape, entry.dtype, "merge", 0, (0,)))
        else:
            self._copy(name, 0, owners)

    def _positions(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        if 0 not in owners:
            self._leave_out(name, "left out, models compute these buffers themselves")
            return
        if len(owners) < len(self.everyone):
            self._note(name, f"copied from {self._path(0)}, not every model stores it")
        self._copy(name, 0, owners)

    def _head(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        """A tensor of a head that differs between models, as `heads` says."""
        heads = self.recipe.heads or "base"
        lender = self.recipe.sources[0] if heads in ("base", "separate") else heads.removeprefix("model:")
        if lender not in self.recipe.sources:
            self._problem(f"'{name}' is to be that of '{lender}', which is not merged there", "mend `heads`")
            return
        source = self.recipe.sources.index(lender)
        if source in owners:
            self._copy(name, source, owners)
            self._note(name, f"heads differ, taken from {self._path(source)}")
        if heads == "separate":
            first = 0 if self.recipe.base_model is None else 1
            for index in owners:
                if index >= first:
                    self.side.setdefault(index, []).append(name)
        elif source not in owners:
            self._leave_out(name, f"left out, heads differ and {self._path(source)} has none")

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out += 1
        self._note(name, reason)

    def _note(self, name: str, reason: str) -> None:
        self.noted.setdefault(reason, []).append(name)

    def _experts(self, name: str) -> tuple[int, ...]:
        rule = self.recipe.rule_for(name)
        if id(rule) not in self.experts:
            specs: tuple[ModelSpec, ...] = self.recipe.experts_for(name)
            self.experts[id(rule)] = tuple(self.recipe.sources.index(spec.model) for spec in specs)
        return self.experts[id(rule)]

    def _is_scaled(self, name: str) -> bool:
        rule = self.recipe.rule_for(name)
        scopes = [*self.recipe.shared, *(spec.parameters for spec in self.recipe.experts_for(name))]
        scopes += [] if rule is None else [rule.parameters]
        return any(scope.get("scale") is not None for scope in scopes)

    def _not_everyones(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        """A tensor that some models lack, as `differing` says."""
        if self.differing == "intersection":
            self._leave_out(name, "left out, not every model has it")
        elif self._is_same_kind(name, owners) and self._is_same_shape(name, owners):
            self._merge_some(name, owners)

    def _merge_some(self, name: str, owners: Mapping[int, TensorEntry]) -> None:
        """Merge what there is, if the method can do with it; else take the tensor from the first that has it."""
        from mergepipe.tasks.registry import METHODS

        first = min(owners)
        entry, method = owners[first], METHODS[self.recipe.method_for(name)]
        found = self._experts(name)
        kept = tuple(place for place, index in enumerate(found) if index in owners)
        experts = tuple(found[place] for place in kept)
        based = self.recipe.base_model is not None and method.base != "ignored"
        enough = method.min_models <= len(experts) <= (method.max_models or len(experts))
        if (
            enough
            and DTYPES[entry.dtype].role == "merged"
            and (not based or 0 in owners)
            and method.name != "passthrough"
        ):
            self._note(name, "merged from the models that have it")
            base = 0 if based else None
            self.tensors.append(AlignedTensor(name, entry.shape, entry.dtype, "merge", first, experts, base, kept=kept))
        else:
            self._note(name, f"copied from {self._path(first)}, too few models have it")
            self._copy(name, first, owners)

    # -- special tensors

    def _heads_that_differ(self) -> set[str | None]:
        """Heads of which any tensor is missing in a model, or has another shape there."""
        differ: set[str | None] = set()
        for name in self.names:
            head = head_of(name)
            if head is not None and head not in differ:
                found = [self.checkpoints[i].tensors.get(name) for i in self.everyone]
                shapes = {None if entry is None else entry.shape for entry in found}
                if len(shapes) > 1:
                    differ.add(head)
        return differ

    def _is_tied_twin(self, name: str, owners: Mapping[int, TensorEntry]) -> bool:
        """Whether this is a `lm_head.weight` that only some store, and that is the embedding under another name."""
        if not is_lm_head(name):
            return False
        tied = {index: ties(self.checkpoints[index].config) for index in {0, *owners}}
        if any(tied[index] is False for index in owners) or tied[0] is False:
            return False
        return tied[0] is True or (0 not in owners and all(tied[index] for index in owners))

    # -- what does not fit

    def _strangers(self) -> set[int]:
        """Models that share no name with the first source: one problem each, instead of one per tensor."""
        first = self.checkpoints[0].tensors
        models = enumerate(self.checkpoints[: len(self.recipe.sources)])
        strangers = {i for i, other in models if i and first.keys().isdisjoint(other.tensors)}
        for index in sorted(strangers):
            self._problem(
                f"{self._path(index)} has no tensor in common with {self._path(0)}",
                "a model of another architecture can't be merged: drop it from `models`",
            )
        return strangers

    def _fits(self, name: str, owners: Mapping[int, TensorEntry]) -> bool:
        """Whether every model has the tensor in the same shape and of the same kind; else a problem."""
        if 0 not in owners:
            return self._misfit(name, f"'{name}' is in {self._paths(list(owners))} but not in {self._path(0)}")
        lacking = [index for index in self.everyone if index not in owners]
        if lacking:
            self._misfit(name, f"'{name}' is missing in {self._paths(lacking)}")
        return self._is_same_kind(name, owners) and self._is_same_shape(name, owners) and not lacking

    def _is_same_kind(self, name: str, owners: Mapping[int, TensorEntry]) -> bool:
        roles = {index: DTYPES[entry.dtype].role for index, entry in owners.items()}
        refused = [index for index, role in roles.items() if role == "refused"]
        if refused:
            self.refused = True
            text = f"'{name}' is {owners[refused[0]].dtype} in {self._paths(refused)}"
            return self._problem(text, "the codes of 8-bit floats can't be averaged without scales: dequantise first")
        different = [index for index, role in roles.items() if role != roles[min(owners)]]
        if different:
            text = f"'{name}' is {self._described(owners, different, lambda entry: entry.dtype)}"
            return self._problem(text, "integers can't be merged with floating-point numbers: was a model quantised?")
        return True

    def _is_same_shape(self, name: str, owners: Mapping[int, TensorEntry]) -> bool:
        first = owners[min(owners)]
        different = [index for index, entry in owners.items() if entry.shape != first.shape]
        if different:
            text = f"'{name}' is {self._described(owners, different, lambda entry: str(entry.shape))}"
            axis = vocabulary_tensors(self.checkpoints).get(name)
            rows_only = axis is not None and len({entry.shape[axis + 1 :] for entry in owners.values()}) == 1
            return self._misfit(name, text, vocabulary=rows_only)
        return True

    def _misfit(self, name: str, text: str, *, vocabulary: bool = False) -> Literal[False]:
        if vocabulary and self.recipe.tokenizer is None:
            return self._problem(text, "for vocabularies that differ, say `tokenizer_source: union` or `base`")
        if head_of(name) is not None and self.recipe.heads is None:
            self._problem(text, "for heads that differ, say `heads: base`, `separate` or `model:<path>`")
        if self.checkpoints[0].is_adapter:
            return self._problem(
                text, "adapters are merged pair by pair: train or extract all for one rank and modules"
            )
        remedy = "drop the model, or add a rule {match: NAME, merge_method: passthrough} to take the first source's"
        if not any(checkpoint.config for checkpoint in self.checkpoints):
            remedy += ", or build with --tensors union or intersection"
        return self._problem(text, remedy)

    def _problem(self, text: str, remedy: str) -> Literal[False]:
        remedies = self.problems.setdefault(self.where + text, [])
        if remedy not in remedies:
            remedies.append(remedy)
        return False

    def _described(
        self, owners: Mapping[int, TensorEntry], different: list[int], show: Callable[[TensorEntry], str]
    ) -> str:
        found: dict[str, list[int]] = {}
        for index in different:
            found.setdefault(show(owners[index]), []).append(index)
        rest = ", ".join(f"{value} in {self._paths(indices)}" for value, indices in found.items())
        first = min(owners)
        return f"{show(owners[first])} in {self._path(first)} but {rest}"

    def _path(self, index: int) -> str:
        return f"'{self.recipe.sources[index]}'"

    def _paths(self, indices: Sequence[int]) -> str:
        return _some([self._path(index) for index in indices], 4)


def _join(target: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Put nested values into nested values."""
    for key, value in more.items():
        if isinstance(value, Mapping):
            _join(target.setdefault(key, {}), value)
        else:
            target[key] = value


def _some(names: Sequence[str], limit: int) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
