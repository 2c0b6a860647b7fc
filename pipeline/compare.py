"""In what checkpoints differ: by their headers, and by the size of their task vectors.

A comparison streams like a merge does: it holds one window of the base and of one other model at a time.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mergepipe.pipeline.events import Announcer
from mergepipe.pipeline.models import InputModel, as_stored, find_folder, open_model
from mergepipe.pipeline.references import parse_reference
from mergepipe.pipeline.remote import HeadersOnly
from mergepipe.pipeline.weights import Weights
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.readers import MmapReader

WINDOW = 1 << 20
"""Elements decoded at a time."""


def open_shown(texts: Sequence[str], announce: Announcer, *, values: bool) -> list[InputModel]:
    """Open models to look at them.

    Parameters
    ----------
    texts : sequence of str
        As a recipe names models; relative paths start from the current folder.
    announce : Announcer
        Told what is downloaded.
    values : bool
        Whether values are to be read, so that models come as a merge sees them. Otherwise they are shown as they are
        stored, codes and scales too, unless there is an adapter on top; and of a hub id only headers are fetched.

    Raises
    ------
    CheckpointError
    """
    opened = []
    with tempfile.TemporaryDirectory(prefix="mergepipe-inspect-") as name:
        find = find_folder if values else HeadersOnly(Path(name)).find
        for text in texts:
            reference = parse_reference(text, Path.cwd())
            if values or reference.adapter is not None:
                opened.append(open_model(str(reference), announce, find=find))
            else:
                opened.append(as_stored(open_checkpoint(find(reference.model, announce)), reference))
    return opened


@dataclass(frozen=True, slots=True)
class Difference:
    """In what each of several checkpoints differs from the first: for each other one the names of tensors, sorted.

    Attributes
    ----------
    missing, extra : tuple of tuple of str
        Tensors that only the first has, and that only the other has.
    reshaped, retyped : tuple of tuple of str
        Tensors that both have, in another shape or another dtype.
    """

    missing: tuple[tuple[str, ...], ...]
    extra: tuple[tuple[str, ...], ...]
    reshaped: tuple[tuple[str, ...], ...]
    retyped: tuple[tuple[str, ...], ...]

    @property
    def same(self) -> bool:
        """Whether they differ in nothing."""
        return not any(map(any, (self.missing, self.extra, self.reshaped, self.retyped)))


def compare_headers(checkpoints: Sequence[Checkpoint]) -> Difference:
    """Compare all checkpoints with the first, without reading a tensor."""
    first, *others = (checkpoint.tensors for checkpoint in checkpoints)
    common = [sorted(first.keys() & other.keys()) for other in others]
    return Difference(
        missing=tuple(tuple(sorted(first.keys() - other.keys())) for other in others),
        extra=tuple(tuple(sorted(other.keys() - first.keys())) for other in others),
        reshaped=tuple(
            tuple(name for name in names if first[name].shape != other[name].shape)
            for other, names in zip(others, common, strict=True)
        ),
        retyped=tuple(
            tuple(name for name in names if first[name].dtype != other[name].dtype)
            for other, names in zip(others, common, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class TensorStatistics:
    """Sizes of the task vectors of one tensor.

    Attributes
    ----------
    name : str
    size : int
        Number of elements.
    base_norm : float
        Euclidean norm of the base.
    norms : tuple of float
        Euclidean norm of each model's difference to the base.
    densities : tuple of float
        Fraction of each difference that is not zero; 0 for an empty tensor.
    """

    name: str
    size: int
    base_norm: float
    norms: tuple[float, ...]
    densities: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def total_statistics(tensors: Sequence[TensorStatistics], models: int) -> TensorStatistics:
    """Statistics of all tensors taken as one.

    Examples
    --------
    >>> wide, tall = TensorStatistics("a", 4, 3.0, (3.0,), (1.0,)), TensorStatistics("b", 12, 4.0, (4.0,), (0.0,))
    >>> total_statistics([wide, tall], models=1)
    TensorStatistics(name='total', size=16, base_norm=5.0, norms=(5.0,), densities=(0.25,))
    """
    size = sum(tensor.size for tensor in tensors)
    return TensorStatistics(
        "total",
        size,
        math.hypot(*(tensor.base_norm for tensor in tensors)),
        tuple(math.hypot(*(tensor.norms[k] for tensor in tensors)) for k in range(models)),
        tuple(sum(t.densities[k] * t.size for t in tensors) / max(size, 1) for k in range(models)),
    )


def task_vector_statistics(checkpoints: Sequence[Checkpoint]) -> Iterator[TensorStatistics]:
    """Statistics of every tensor that all checkpoints have in one shape and in floating point; the first is the base.

    Differences are taken and summed up in float64, in an order that is a function of the shape alone.

    Raises
    ------
    NonFiniteError
        If a tensor holds a NaN or an infinity.
    """
    base, *others = checkpoints
    with MmapReader() as reader:
        models = [Weights(checkpoint, reader, "it can be neither measured nor merged") for checkpoint in checkpoints]
        for name, tensor in base.tensors.items():
            entries = [checkpoint.tensors.get(name) for checkpoint in others]
            if all(comparable(tensor, entry) for entry in (tensor, *entries)):
                yield _statistics(name, tensor.shape, models)


def comparable(first: TensorEntry, other: TensorEntry | None) -> bool:
    """Whether the difference of two tensors can be taken."""
    return other is not None and other.shape == first.shape and DTYPES[other.dtype].role == "merged"


def _statistics(name: str, shape: tuple[int, ...], models: Sequence[Weights]) -> TensorStatistics:
    size = math.prod(shape)
    squares = np.zeros(len(models))
    nonzero = np.zeros(len(models), np.int64)
    base, values = np.empty(min(size, WINDOW)), np.empty(min(size, WINDOW))
    for start in range(0, size, WINDOW):
        count = min(WINDOW, size - start)
        for k, model in enumerate(models):
            out = (values if k else base)[:count]
            model.read(name, start, out, base[:count] if k else None)
            squares[k] += np.dot(out, out)
            nonzero[k] += np.count_nonzero(out)
    for model in models:
        model.release(name)
    norms = np.sqrt(squares)
    densities = nonzero[1:] / max(size, 1)
    return TensorStatistics(name, size, float(norms[0]), tuple(norms[1:].tolist()), tuple(densities.tolist()))
