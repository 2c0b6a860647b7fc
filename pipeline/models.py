"""Opening the models of a recipe: what lies on disk, and what has to be done to it first.

A recipe may name a folder, a file, a hub id, and an adapter on top of any of them. What comes out is always a
checkpoint with the tensors that are to be merged, in the types that they are meant to have, and beside it the
*adjustments* (:mod:`mergepipe.tasks.adjust`) that turn what is stored into that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.events import Announcer
from mergepipe.pipeline.faults import FIRST, Faults
from mergepipe.pipeline.references import Reference, is_hub_id, parse_reference
from mergepipe.storage.checkpoint import Checkpoint, open_checkpoint
from mergepipe.tasks.adjust import Adjustment

logger = logging.getLogger(__name__)

Found = TypeVar("Found", bound=Checkpoint)

Find = Callable[[str, Announcer], Path]
"""From one part of a parsed reference to the folder or the file; told what it downloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputModel(Checkpoint):
    """A checkpoint as a merge sees it: `tensors` and `config` are those of the model that the recipe names.

    Attributes
    ----------
    stored : Checkpoint
        What is read: also the scales of 8-bit weights and the factors of an adapter, all in the types that they are
        stored in.
    reference : Reference
        What the recipe calls it.
    adjust : dict
        By name of a tensor, what has to be done to its stored values.
    adapter : str
        Folder of the adapter; empty if there is none.
    drops : tuple of str
        Keys of the configuration that are not true of a merge.
    notes : tuple of str
        What the user should know.
    """

    stored: Checkpoint
    reference: Reference
    adjust: dict[str, tuple[Adjustment, ...]] = field(default_factory=dict)
    adapter: str = ""
    drops: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def as_stored(checkpoint: Checkpoint, reference: Reference | None = None) -> InputModel:
    """A checkpoint to which nothing has to be done."""
    return InputModel(
        checkpoint.root,
        checkpoint.files,
        checkpoint.tensors,
        checkpoint.config,
        checkpoint.twins,
        checkpoint.beside,
        stored=checkpoint,
        reference=reference or Reference(str(checkpoint.root)),
    )


def stored_of(checkpoint: Checkpoint) -> Checkpoint:
    """What is read of a model; of a plain checkpoint that itself."""
    return checkpoint.stored if isinstance(checkpoint, InputModel) else checkpoint


def as_models(checkpoints: Sequence[Checkpoint], texts: Sequence[str]) -> list[InputModel]:
    """Checkpoints as models, those as they are stored that are none yet; `texts` are what a recipe calls them."""
    pairs = zip(checkpoints, texts, strict=True)
    return [one if isinstance(one, InputModel) else as_stored(one, parse_reference(text)) for one, text in pairs]


def find_folder(place: str, announce: Announcer) -> Path:
    """Where one part of a reference lies; what is a hub id is downloaded, as far as the cache does not have it.

    Raises
    ------
    CheckpointError
        As :func:`mergepipe.pipeline.hub.fetch`.
    """
    from mergepipe.pipeline.hub import fetch

    return fetch(place, announce) if is_hub_id(place) else Path(place)


def open_model(
    text: str,
    announce: Announcer | None = None,
    made: Mapping[str, Checkpoint] | None = None,
    find: Find = find_folder,
) -> InputModel:
    """Open a model by what a parsed recipe calls it. No tensor is read.

    Parameters
    ----------
    text : str
    announce : Announcer, optional
        Told what is downloaded, if it is a model of the hub.
    made : mapping of str to Checkpoint, optional
        By folder, models that are not there yet, as they will be.
    find : callable, optional
        Says where models and adapters lie.

    Raises
    ------
    CheckpointError
        If it is missing or damaged; if it is quantised in a way that is not understood; if the adapter is none, is of a
        kind that is not understood, or does not fit the model.
    """
    from mergepipe.pipeline.adapter import apply_adapter
    from mergepipe.pipeline.quantised import dequantise

    reference = parse_reference(text)
    announce = announce or Announcer(None)
    found = (made or {}).get(reference.model) or open_checkpoint(find(reference.model, announce))
    model = dequantise(as_stored(found, reference))
    return model if reference.adapter is None else apply_adapter(model, find(reference.adapter, announce))


def open_models(
    texts: Sequence[str],
    announce: Announcer | None = None,
    made: Mapping[str, Checkpoint] | None = None,
    faults: Faults = FIRST,
    find: Find = find_folder,
) -> list[InputModel]:
    """Open several models; what is wrong with them is told together.

    Parameters
    ----------
    texts : sequence of str
    announce, made, find : optional
        As for :func:`open_model`.
    faults : Faults, optional
        Takes in what is wrong; where it keeps that, the models that are sound come back.

    Raises
    ------
    CheckpointError
    """
    return _together(lambda text: open_model(text, announce, made, find), texts, faults)


def _together(opening: Callable[[str], Found], texts: Sequence[str], faults: Faults) -> list[Found]:
    opened: list[Found] = []
    errors = []
    for text in texts:
        try:
            found = opening(text)
            logger.info("'%s': %d tensors in %d files", text, len(found.tensors), len(found.files))
            opened.append(found)
        except CheckpointError as error:
            errors.append(error)
    if len(errors) > 1 and not faults.keep:
        raise CheckpointError("\n".join(str(error) for error in errors))
    for each in errors:
        faults.take(each)
    return opened
