"""The plan: every model, tensor and output byte of a merge, decided before a tensor byte is read.

A plan is data: frozen records that are saved as `plan.json` and read back as the same records. It says *what* is to be
done. How it is cut into units, by how many workers and under which ceiling, is decided when it is run (see
:mod:`mergepipe.pipeline.schedule`), and changes no byte of the result: that is why none of it is in the plan's id.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydantic

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline.beside import Beside
from mergepipe.pipeline.references import is_hub_id, parse_reference, split_revision
from mergepipe.pipeline.vocabulary_rows import PlannedVocabulary
from mergepipe.storage.checkpoint import FileInfo
from mergepipe.storage.collector import paused_collector
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.layout import OutputLayout, OutputTensor, lay_out
from mergepipe.tasks.adjust import Adjustment, held_bytes
from mergepipe.tasks.method import Job

PLAN_FORMAT = 1
"""Format of `plan.json`; another one is refused."""

RESULT_VERSION = 7
"""Raised with every change that changes an output byte of an unchanged recipe; part of the plan's id."""


@dataclass(frozen=True, slots=True)
class Source:
    """An input tensor: number of the model in the plan, its name there, its safetensors dtype as stored.

    `adjust` is what has to be done to its values before they are the model's; see :mod:`mergepipe.tasks.adjust`.
    """

    model: int
    name: str
    dtype: str
    adjust: tuple[Adjustment, ...] = ()


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model that is read.

    Attributes
    ----------
    label : str
        Its folder's name, made unique; for messages, statistics and side files.
    path : str
        Absolute.
    role : {'base', 'model', 'importance', 'carried'}
        Whether it is the base (or the primary), one of the models merged, what says how much their elements count, or
        what an earlier merge or stage has carried over (see :mod:`mergepipe.pipeline.stages`).
    store : {'virtual', 'copy'}
        Kind of its zarr hierarchy.
    why : str
        Why it is of that kind.
    tensors, nbytes, copied_bytes : int
        What it holds, and how many bytes the hierarchy takes on disk.
    fingerprint : str
        Hash of the sizes and headers of its files.
    made : bool
        Whether an earlier merge of the same recipe makes it.
    reference : str
        What the recipe calls it: its path, or more.
    adapter : str
        Folder of the adapter that is applied to it; empty if none is.
    drops : tuple of str
        Keys of its configuration that are not true of a merge.
    """

    label: str
    path: str
    role: Literal["base", "model", "importance", "carried"]
    store: Literal["virtual", "copy"]
    why: str
    tensors: int
    nbytes: int
    copied_bytes: int
    fingerprint: str
    made: bool = False
    reference: str = ""
    adapter: str = ""
    drops: tuple[str, ...] = ()

    @property
    def public(self) -> str:
        """What to call it where other people read it: an id of the hub with the commit, else the label."""
        if not self.reference:
            return self.label
        found = parse_reference(self.reference)
        parts = [(found.model, self.path), *([(found.adapter, self.adapter)] if found.adapter else [])]
        if not any(is_hub_id(name) for name, _ in parts):
            return self.label
        return "+".join(
            f"{split_revision(name)[0]}@{Path(folder).name}" if is_hub_id(name) else Path(folder).name
            for name, folder in parts
        )


@dataclass(frozen=True, slots=True)
class Earlier:
    """A merge that comes before, for the model card: its recipe, and the labels of the models it began from."""

    recipe: dict[str, Any]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """An output tensor.

    Attributes
    ----------
    name, shape, dtype
        As it will be written.
    action : {'merge', 'copy'}
        'copy' takes the bytes of `base` as they are.
    base : Source or None
        What deltas are taken to; for 'copy' what is copied.
    models : tuple of Source
        What is merged; empty for 'copy'.
    method, params, model_params, sparsify, sparsify_params
        The settings of this tensor; see :class:`mergepipe.tasks.method.Job`.
    scope : {'tensor', 'model'}
        Where its thresholds are taken.
    work : str
        "float32", or "float64" where an input is F64.
    importances : tuple of Source
        One per model, for a method that takes them.
    carried : Source or None
        What an earlier merge, or an earlier stage of this one, has carried over.
    offset : int
        Position of its first model among all that the merge has.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    action: Literal["merge", "copy"]
    base: Source | None
    models: tuple[Source, ...]
    method: str = ""
    params: dict[str, Any] | None = None
    model_params: tuple[dict[str, Any], ...] = ()
    sparsify: str = "none"
    sparsify_params: tuple[dict[str, Any], ...] = ()
    work: str = "float32"
    scope: str = "tensor"
    importances: tuple[Source, ...] = ()
    carried: Source | None = None
    offset: int = 0

    @property
    def sources(self) -> tuple[Source, ...]:
        """All tensors it is made from, the base first, importances and what was carried over last."""
        first = () if self.base is None else (self.base,)
        return (*first, *self.models, *self.importances, *(() if self.carried is None else (self.carried,)))

    @property
    def output(self) -> OutputTensor:
        """As the layout sees it."""
        return OutputTensor(self.name, self.dtype, self.shape)

    def input_bytes(self) -> int:
        """Bytes of one read of all its sources."""
        size = math.prod(self.shape)
        return sum(size * DTYPES[source.dtype].itemsize for source in self.sources)

    def held_bytes(self) -> int:
        """Memory that the adjustments of its sources take while it is worked on."""
        itemsize = np.dtype(self.work).itemsize
        return sum(held_bytes(source.adjust, self.shape, itemsize) for source in self.sources)

    def job(self, seed: int) -> Job:
        """What its method sees of it."""
        return Job(
            self.name,
            self.shape,
            len(self.models),
            np.dtype(self.work),
            self.params or {},
            self.model_params,
            self.sparsify,
            self.sparsify_params,
            seed,
            self.scope,
            all(source.dtype == "BF16" and not source.adjust for source in self.sources),
            self.offset,
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a run needs to know.

    Attributes
    ----------
    format : int
        Of this record.
    id : str
        Names the result: the same id, the same bytes.
    version : str
        Of the mergepipe that made it.
    recipe : dict
        The recipe, for the model card and the header; model paths shortened to folder names.
    models : tuple of PlannedModel
        The base first, if there is one.
    tensors : tuple of PlannedTensor
        In the order in which they are made: byte order of the base's files.
    groups : tuple of tuple of str
        Names of the tensors of each output shard.
    metadata : dict of str to str
        The `__metadata__` of each shard.
    output : str
        The output folder, absolute.
    side : dict of str to tuple of Source
        Tensors kept beside the merge, by label of the model they come from.
    side_bytes : int
        Bytes of all of these.
    sidecar : int or None
        Number of the model whose configuration and tokenizer are copied; None for an output that is no model.
    dtype : str or None
        The output dtype the recipe asks for, by its alias.
    notes : tuple of str
        What the user should know.
    allowed : int
        Memory ceiling in bytes.
    chunk_bytes : int
        Wanted size of a unit.
    seed : int
    stem : str
        What the names of the weights files begin with: "model", or "adapter_model" for a LoRA adapter.
    config : dict
        What changes in the sidecar model's `config.json`, besides the dtype: new values, in mappings as deep as theirs.
    earlier : tuple of Earlier
        The merges that come before, for a recipe of several documents.
    first_stage : Plan or None
        What is made first, for this plan to read; see :mod:`mergepipe.pipeline.stages`.
    merged_before : tuple of PlannedModel
        Models that were merged before and are not read again.
    norms : tuple of float
        Of a first stage: the norms of their task vectors.
    added : str or None
        The model that was added, if the plan adds one to a finished merge: its path.
    vocabulary : PlannedVocabulary or None
        Which rows of vocabulary-indexed tensors come from where, if they are not all read as they lie.
    beside : Beside
        What differs between the files beside the weights and those of the model `sidecar`.
    side_files : tuple of FileInfo or None
        The files of that model that are copied; None if there are none yet, as an earlier merge makes it. Not part of
        the id: a plan built anew after a change goes on with the weights.
    head_files : dict of str to tuple of FileInfo
        The same of the models in `side`, by label; copied beside their heads. Of those that an earlier merge makes
        there are none yet.
    """

    format: int
    id: str
    version: str
    recipe: dict[str, Any]
    models: tuple[PlannedModel, ...]
    tensors: tuple[PlannedTensor, ...]
    groups: tuple[tuple[str, ...], ...]
    metadata: dict[str, str]
    output: str
    side: dict[str, tuple[Source, ...]]
    sidecar: int | None
    dtype: str | None
    notes: tuple[str, ...]
    allowed: int
    chunk_bytes: int
    seed: int
    side_bytes: int = 0
    config: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Earlier, ...] = ()
    stem: str = "model"
    first_stage: Plan | None = None
    merged_before: tuple[PlannedModel, ...] = ()
    norms: tuple[float, ...] = ()
    added: str | None = None
    vocabulary: PlannedVocabulary | None = None
    beside: Beside = field(default_factory=Beside)
    side_files: tuple[FileInfo, ...] | None = None
    head_files: dict[str, tuple[FileInfo, ...]] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[Plan, ...]:
        """What is carried out, in order: a first stage if there is one, then the plan itself."""
        return (self,) if self.first_stage is None else (self.first_stage, self)

    def is_gathered(self, source: Source) -> bool:
        """Whether the rows of an input are gathered from several places."""
        return self.vocabulary is not None and self.vocabulary.is_gathered(source.model, source.name)

    def layout(self) -> OutputLayout:
        """The place of every output byte."""
        by_name = {tensor.name: tensor.output for tensor in self.tensors}
        return lay_out([[by_name[name] for name in group] for group in self.groups], self.metadata, self.stem)

    def to_json(self) -> bytes:
        """As saved in the workspace."""
        return _ADAPTER.dump_json(self, indent=1)

    @staticmethod
    def from_json(data: bytes) -> Plan:
        """Read a saved plan.

        Raises
        ------
        WorkspaceError
            If it is damaged or of another format.
        """
        try:
            with paused_collector():
                _check_format(data)
                return _ADAPTER.validate_json(data)
        except (ValueError, AttributeError) as error:
            if isinstance(error, WorkspaceError):
                raise
            raise WorkspaceError(f"the plan is damaged ({str(error).splitlines()[0]}): build it again") from error


_ADAPTER = pydantic.TypeAdapter(Plan)
_AS_WRITTEN = re.compile(rb'\s*\{\s*"format":\s*(\d+)\s*,')


def _check_format(data: bytes) -> None:
    # What we write begins with it; all else is looked through.
    start = _AS_WRITTEN.match(data)
    found = int(start[1]) if start else json.loads(data).get("format")
    if found != PLAN_FORMAT:
        raise WorkspaceError(f"the plan is of format {found}, this version reads {PLAN_FORMAT}: build it again")


def plan_id(
    tensors: tuple[PlannedTensor, ...],
    models: tuple[PlannedModel, ...],
    groups: tuple[tuple[str, ...], ...],
    metadata: Mapping[str, str],
    side: Mapping[str, tuple[Source, ...]],
    seed: int,
    config: Mapping[str, Any],
    vocabulary: PlannedVocabulary | None = None,
) -> str:
    """Hash of everything that the output's bytes depend on; folders, memory, chunks and workers are not among it."""
    record = {
        "result": RESULT_VERSION,
        "tensors": _TENSORS.dump_python(tensors, mode="json"),
        "models": [model.fingerprint for model in models],
        "groups": groups,
        "metadata": dict(metadata),
        "side": _SIDE.dump_python(dict(side), mode="json"),
        "seed": seed,
        "config": dict(config),
    }
    if vocabulary is not None:
        record["vocabulary"] = vocabulary.digest
    return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


_TENSORS = pydantic.TypeAdapter(tuple[PlannedTensor, ...])
_SIDE = pydantic.TypeAdapter(dict[str, tuple[Source, ...]])
