"""The vocabulary of a merge: which row of which model becomes which row of the output.

Every model's vocabulary-indexed tensors are read as if they had the merged vocabulary: the row of a token is the
model's own where it has that token. A missing row is the base's; where the base has none either, that of the one model
that has the token, or the mean of those that have it; zeros where nobody has. A recipe may say otherwise for single
tokens. Rows that belong to no token (a table padded beyond its tokenizer) are left out.

Decided from tokenizers and headers; the few rows that stand nowhere yet are made by
:mod:`mergepipe.pipeline.vocabulary_rows`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from mergepipe.errors import CheckpointError, Fault, RecipeError, TensorMismatchError
from mergepipe.pipeline.tokenizer_keys import TokenizerSpec, TokenSource
from mergepipe.pipeline.tokenizers import (
    MergedVocabulary,
    Tokenizer,
    finds_entries,
    merged_vocabulary,
    need_tokenizer,
    read_tokenizer,
)
from mergepipe.pipeline.vocabulary_tensors import vocabulary_sizes, vocabulary_tensors
from mergepipe.storage.gather import RowMap

if TYPE_CHECKING:
    from pathlib import Path

    from mergepipe.pipeline.models import InputModel
    from mergepipe.pipeline.recipe import Recipe
    from mergepipe.storage.checkpoint import Checkpoint, TensorEntry

I64 = NDArray[np.int64]

NOBODY = -1
"""Stands for "does not have it" where the number of a row is expected."""


@dataclass(frozen=True, eq=False, slots=True)
class MadeRows:
    """Rows of one tensor of one model that stand nowhere yet: each the mean of some rows, or zeros.

    Attributes
    ----------
    peers : tuple of int
        The models that lend rows.
    rows : int64 ndarray, shape (made, peers)
        For each row to be made, the row of each peer that it is the mean of, or `NOBODY`; zeros where all are.
    padding : bool
        Whether one more row is made, the mean of all rows of the tensor.
    """

    peers: tuple[int, ...]
    rows: I64
    padding: bool

    @property
    def count(self) -> int:
        """How many rows are made."""
        return len(self.rows) + self.padding


@dataclass(frozen=True, eq=False, slots=True)
class Gather:
    """One tensor of one model, read with the rows of the merged vocabulary.

    Attributes
    ----------
    model : int
        Position in `Recipe.inputs`.
    name : str
    axis : int
        The axis of the rows; all axes before it have length 1.
    row_map : RowMap
        Its sources are positions in `Recipe.inputs`, and one past the last of them for the rows that are made.
    made : MadeRows
    tokens : int
        How many of its rows are no padding.
    """

    model: int
    name: str
    axis: int
    row_map: RowMap
    made: MadeRows
    tokens: int

    def shape(self, entry: TensorEntry) -> tuple[int, ...]:
        """Shape of the gathered tensor."""
        return (*entry.shape[: self.axis], self.row_map.rows, *entry.shape[self.axis + 1 :])


@dataclass(frozen=True, eq=False, slots=True)
class Vocabulary:
    """What becomes of all vocabularies.

    Attributes
    ----------
    merged : MergedVocabulary
    own : tuple of Tokenizer or None
        The tokenizer of each source.
    inputs : int
        How many checkpoints are read: what row maps call the rows that are made.
    rows : int
        Rows of every vocabulary-indexed tensor of the output, padding included.
    gathers : tuple of Gather
        Only what is not read as it lies there.
    sizes : tuple of str
        Keys of the first source's configuration that hold a vocabulary size.
    notes : tuple of str
    """

    merged: MergedVocabulary
    own: tuple[Tokenizer | None, ...]
    inputs: int
    rows: int
    gathers: tuple[Gather, ...]
    sizes: tuple[str, ...]
    notes: tuple[str, ...]

    def fitted(self, checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
        """The checkpoints as they are read: with the shapes that gathered tensors have; bytes and places unchanged."""
        tensors = [dict(checkpoint.tensors) for checkpoint in checkpoints]
        for gather in self.gathers:
            entry = tensors[gather.model][gather.name]
            tensors[gather.model][gather.name] = replace(entry, shape=gather.shape(entry))
        return [replace(checkpoint, tensors=found) for checkpoint, found in zip(checkpoints, tensors, strict=True)]


def merge_vocabularies(
    recipe: Recipe, checkpoints: Sequence[Checkpoint], staged: Mapping[str, Path] | None = None
) -> Vocabulary | None:
    """Decide about tokens and rows; None where the recipe leaves tokenizers alone.

    Parameters
    ----------
    recipe : Recipe
    checkpoints : sequence of Checkpoint
        One per entry of `recipe.inputs`. Headers, configurations and tokenizer files are looked at.
    staged : mapping of str to Path, optional
        For models that are yet to be made, where their other files are.

    Raises
    ------
    RecipeError
        If a token is to be taken from a place that does not exist, or importances stand for two vocabularies.
    CheckpointError
        If a tokenizer is missing or can't be used, or no tensor has a row per token.
    UsageError
        If the libraries that read tokenizers are not installed.
    """
    if recipe.tokenizer is None:
        return None
    return _Deciding(recipe, recipe.tokenizer, checkpoints, staged or {}).decide()


def refuse_adjusted(vocabulary: Vocabulary | None, checkpoints: Sequence[InputModel]) -> None:
    """Rows are gathered as they are stored: no scale and no adapter may have to be applied to them afterwards.

    Raises
    ------
    CheckpointError
        Naming the first tensor that has one.
    """
    for gather in () if vocabulary is None else vocabulary.gathers:
        made = gather.made.peers if gather.made.count else ()
        for number in (gather.model, *made):
            if gather.name in checkpoints[number].adjust:
                raise CheckpointError(
                    f"'{gather.name}' of '{checkpoints[number].reference}' has scales or an adapter, and its rows are "
                    f"not those of the merged vocabulary. Make that model in a document of its own before this one "
                    f"({{name: tuned, merge_method: passthrough, models: [{{model: …}}]}}), and merge `tuned` here"
                )


class _Deciding:
    """Looks at all tokenizers once, then at each tensor."""

    def __init__(
        self, recipe: Recipe, spec: TokenizerSpec, checkpoints: Sequence[Checkpoint], staged: Mapping[str, Path]
    ) -> None:
        self.staged = staged
        self.spec = spec
        self.paths = recipe.sources
        self.inputs = recipe.inputs
        self.checkpoints = checkpoints[: len(self.paths)]
        self.read = checkpoints
        self.listed = recipe.listed
        self.has_base = recipe.base_model is not None
        self.names = vocabulary_tensors(self.checkpoints)
        if not self.names:
            raise CheckpointError(
                f"no tensor of '{self.paths[0]}' has one row per token (`vocab_size` in its config.json, or an "
                f"embedding by its name): leave `tokenizer_source` out"
            )
        self.notes: dict[str, None] = {}
        # A model of a hub, or one with an adapter, has its files in another place than its name says.
        folders = [staged.get(path) or one.root for path, one in zip(self.paths, self.checkpoints, strict=True)]
        self.tokenizers = [read_tokenizer(path, at) for path, at in zip(self.paths, folders, strict=True)]

    def decide(self) -> Vocabulary:
        origin = self._origin()
        others = [one for one in self.tokenizers if one is not None] if self.spec.source == "union" else []
        merged = merged_vocabulary(origin, others, list(self.spec.tokens))
        rows = self._padded(merged.rows)
        self.ids = self._all_ids(merged)
        self.exact = self._exact(merged)
        self.forced = {merged.ids[token]: source.force for token, source in self.spec.tokens.items()}
        gathers = []
        for name, axis in self.names.items():
            for model, checkpoint in enumerate(self.checkpoints):
                if name in checkpoint.tensors:
                    gather = self._gather(model, name, axis, rows)
                    if not gather.row_map.is_identity(model, checkpoint.tensors[name].shape[axis]):
                        gathers.append(gather)
        gathers += self._importances(rows)
        self._note_rows(merged, rows, gathers)
        sizes = tuple(key for key in vocabulary_sizes(self.checkpoints[0]) if key)
        inputs = len(self.inputs)
        return Vocabulary(merged, tuple(self.tokenizers), inputs, rows, tuple(gathers), sizes, tuple(self.notes))

    def _origin(self) -> Tokenizer:
        """The tokenizer whose ids are kept."""
        model = self.spec.model
        if model is None:
            return need_tokenizer(self.tokenizers[0], self.paths[0])
        if model in self.paths:
            return need_tokenizer(self.tokenizers[self.paths.index(model)], model)
        return need_tokenizer(read_tokenizer(model, self.staged.get(model)), model)

    def _padded(self, rows: int) -> int:
        step = self.spec.pad_to_multiple_of or 1
        return -(-rows // step) * step

    def _all_ids(self, merged: MergedVocabulary) -> I64:
        """For each model and each id of the merge the model's own id of that token, or `NOBODY`."""
        found = np.full((len(self.paths), merged.rows), NOBODY, np.int64)
        where = np.fromiter(merged.ids.values(), np.int64, len(merged.ids))
        for model, path in enumerate(self.paths):
            own = self._vocab_of(model)
            found[model, where] = np.fromiter((own.get(token, NOBODY) for token in merged.ids), np.int64, len(where))
            if path == merged.origin.path:
                # An id without a token keeps its row, as ids with one do.
                holes = np.setdiff1d(np.arange(merged.rows), where)
                found[model, holes] = holes
        return found

    def _vocab_of(self, model: int) -> Mapping[str, int]:
        """The ids of a model; those of the first source where it has no tokenizer but as many rows."""
        own = self.tokenizers[model]
        if own is not None:
            return own.vocab
        sizes = [set(vocabulary_sizes(self.checkpoints[number]).values()) for number in (0, model)]
        if sizes[0] != sizes[1]:
            need_tokenizer(None, self.paths[model])
        self.notes[f"'{self.paths[model]}' has no tokenizer: it is taken to have that of '{self.paths[0]}'"] = None
        return need_tokenizer(self.tokenizers[0], self.paths[0]).vocab

    def _exact(self, merged: MergedVocabulary) -> dict[int, tuple[int, int] | None]:
        """For tokens that the recipe gives a source: model and row, or None for zeros; by id in the merge."""
        faults: list[Fault] = []
        found: dict[int, tuple[int, int] | None] = {}
        for token, source in self.spec.tokens.items():
            try:
                found[merged.ids[token]] = self._place(token, source)
            except ValueError as error:
                faults.append(Fault(f"$.tokenizer.tokens[{token!r}].source", str(error)))
        if faults:
            raise RecipeError(faults)
        return found

    def _place(self, token: str, source: TokenSource) -> tuple[int, int] | None:
        if source.kind == "zero":
            return None
        assert source.model is not None, "the parser sees to it"
        if source.model not in self.paths:
            raise ValueError(f"{source.model} is none of the models: name one that is merged, or kind: zero")
        model = self.paths.index(source.model)
        wanted = token if source.kind == "model" else source.token
        row = source.token_id if wanted is None else self._vocab_of(model).get(wanted)
        if row is None:
            raise ValueError(f"the tokenizer of {source.model} has no {wanted!r}: name a model that has it")
        rows = self._rows_of(model)
        if row >= min(rows):
            raise ValueError(f"row {row} is not in the tables of {source.model}, which have {min(rows)} rows")
        return model, row

    def _rows_of(self, model: int) -> list[int]:
        """Rows of the vocabulary-indexed tensors of a model."""
        tensors = self.checkpoints[model].tensors
        return [tensors[name].shape[axis] for name, axis in self.names.items() if name in tensors] or [0]

    def _gather(self, model: int, name: str, axis: int, rows: int) -> Gather:
        """Where every row of one tensor of one model comes from."""
        entries = {n: one.tensors[name] for n, one in enumerate(self.checkpoints) if name in one.tensors}
        row = entries[model].shape[axis + 1 :]
        peers = tuple(number for number, entry in entries.items() if entry.shape[axis + 1 :] == row)
        has = np.stack([self._known(number, entries[number].shape[axis]) for number in peers])
        own = has[peers.index(model)].copy()
        own[[number for number in self.exact if self.forced[number]]] = NOBODY
        # Bytes can be taken over as they are from models of the same type only.
        same = np.array([entries[number].dtype == entries[model].dtype for number in peers])
        sources, firsts, wanted = _resolve(own, self._lent(peers, has), peers.index(model), same)
        made = len(self.inputs)
        sources = np.append(np.array([*peers, made])[sources], np.full(rows - len(sources), made))
        firsts = np.append(firsts, np.full(rows - len(firsts), len(wanted)))
        return Gather(model, name, axis, RowMap.of(sources, firsts), MadeRows(peers, wanted, rows > len(own)), len(own))

    def _importances(self, rows: int) -> list[Gather]:
        """The tables of importances, with the rows of their models: zeros where a model has no row of its own."""
        faults: list[Fault] = []
        found = []
        for number, path in enumerate(self.inputs[len(self.paths) :], start=len(self.paths)):
            models = [self.paths.index(spec.model) for spec in self.listed if spec.importance == path]
            if any(not np.array_equal(self.ids[model], self.ids[models[0]]) for model in models):
                message = f"the importances '{path}' stand beside models of different vocabularies: give each its own"
                faults.append(Fault("$.tokenizer_source", message))
                continue
            for name, axis in self.names.items():
                gather = self._importance(number, models[0], name, axis, rows)
                if gather is not None:
                    found.append(gather)
        if faults:
            raise RecipeError(faults)
        return found

    def _importance(self, number: int, model: int, name: str, axis: int, rows: int) -> Gather | None:
        """One table of them; None where there is none, or its rows are those of the merge as they lie."""
        entry, own = self.read[number].tensors.get(name), self.checkpoints[model].tensors.get(name)
        if entry is None or own is None:
            return None
        if entry.shape != own.shape:
            raise TensorMismatchError(
                f"'{name}' is {own.shape} in '{self.paths[model]}' but {entry.shape} of its importances "
                f"'{self.inputs[number]}': compute them for the model as it is"
            )
        firsts = np.append(self._known(model, own.shape[axis]), np.full(rows - self.ids.shape[1], NOBODY))
        lacks = firsts == NOBODY
        # What a model has no row for it has no say in: where nobody has, the weights decide.
        zeros = np.full((int(lacks.any()), 1), NOBODY)
        row_map = RowMap.of(np.where(lacks, len(self.inputs), number), np.where(lacks, 0, firsts))
        if row_map.is_identity(number, own.shape[axis]):
            return None
        return Gather(number, name, axis, row_map, MadeRows((number,), zeros, False), rows)

    def _known(self, model: int, rows: int) -> I64:
        """For each id of the merge the row of a model's tensor, which may have fewer rows than there are tokens."""
        beyond = self.ids[model] >= rows
        if beyond.any():
            path, count = self.paths[model], np.count_nonzero(beyond)
            self.notes[f"tokens of '{path}' for which its tables have no row: {count:,}"] = None
        return np.where(beyond, NOBODY, self.ids[model])

    def _lent(self, peers: tuple[int, ...], has: I64) -> I64:
        """For each peer and id the row that is lent to a model which has none: several are averaged."""
        lent = has.copy()
        if self.has_base and 0 in peers:
            others = np.array([peer != 0 for peer in peers])
            lent[np.ix_(others, has[peers.index(0)] != NOBODY)] = NOBODY
        for number, place in self.exact.items():
            lent[:, number] = NOBODY
            if place is not None and place[0] in peers:
                lent[peers.index(place[0]), number] = place[1]
        return lent

    def _note_rows(self, merged: MergedVocabulary, rows: int, gathers: Sequence[Gather]) -> None:
        """Say what the vocabulary is, and what is left out of it or made for it."""
        padding = f", rows of padding: {rows - merged.rows:,}" if rows > merged.rows else ""
        what = f"that of '{merged.origin.path}'" + (f" and, of others, {len(merged.new):,} more" if merged.new else "")
        self.notes[f"the vocabulary is {what}; tokens: {len(merged.ids):,}{padding}"] = None
        plain = sum(added is None for added in merged.new.values())
        if plain and (how := finds_entries(merged.origin)) is not None:
            self.notes[
                f"the tokenizer of '{merged.origin.path}' {how}: texts with any of the {plain:,} plain entries that "
                f"others bring are cut otherwise than before"
            ] = None
        for model, path in enumerate(self.paths):
            unused = max(self._rows_of(model)) - len(np.unique(self.ids[model][self.ids[model] != NOBODY]))
            if unused > 0:
                self.notes[f"rows of '{path}' that belong to no token of the merge and are left out: {unused:,}"] = None
            made = max((gather.made.count for gather in gathers if gather.model == model), default=0)
            lent = max((_lent_rows(gather) for gather in gathers if gather.model == model), default=0)
            if made or lent:
                self.notes[
                    f"rows that '{path}' lacks: {lent + made:,}, of them other models' {lent:,}, made {made:,}"
                ] = None


def _lent_rows(gather: Gather) -> int:
    lengths = np.diff(gather.row_map.starts)
    foreign = (gather.row_map.sources != gather.model) & (gather.row_map.sources <= max(gather.made.peers))
    return int(lengths[foreign].sum())


def _resolve(own: I64, lent: I64, position: int, same: NDArray[np.bool_]) -> tuple[I64, I64, I64]:
    """The source and the row there of each row of one tensor, and the rows that have to be made.

    Parameters
    ----------
    own : int64 ndarray, shape (ids,)
        The model's own row, or `NOBODY`.
    lent : int64 ndarray, shape (peers, ids)
        What it takes else.
    position : int
        Of the model among its peers.
    same : bool ndarray, shape (peers,)
        Whose rows can be taken as they are.

    Returns
    -------
    tuple
        Positions of peers (one past the last for a row that is made), rows, and the `rows` of :class:`MadeRows`.
    """
    sources, firsts = np.full(len(own), position), own.copy()
    lenders = np.count_nonzero(lent != NOBODY, axis=0)
    lender = np.argmax(lent != NOBODY, axis=0)
    lacks = own == NOBODY
    whole = lacks & (lenders == 1) & same[lender]
    sources[whole], firsts[whole] = lender[whole], lent[lender[whole], np.flatnonzero(whole)]
    averaged = lacks & ~whole & (lenders > 0)
    sources[averaged], firsts[averaged] = len(same), np.arange(np.count_nonzero(averaged))
    wanted = lent[:, averaged].T
    zeros = lacks & (lenders == 0)
    if zeros.any():
        sources[zeros], firsts[zeros] = len(same), len(wanted)
        wanted = np.vstack([wanted, np.full((1, len(same)), NOBODY)])
    return sources, firsts, wanted
