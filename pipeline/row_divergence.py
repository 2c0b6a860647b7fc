"""How far the softmaxed rows of two checkpoints' weights diverge: SCF-RKL's measure, over all of their tensors.

A proxy in weight space. What it has to do with the divergence of the models' outputs is an empirical question, which
`mergepipe stability` puts both numbers side by side for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mergepipe.errors import NonFiniteError
from mergepipe.pipeline.compare import WINDOW, comparable
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.readers import MmapReader, Reader
from mergepipe.tasks.convert import decode
from mergepipe.tasks.method import Array
from mergepipe.tasks.rows import measure_rows


@dataclass(frozen=True, slots=True)
class RowDivergence:
    """Of one tensor, or of several taken together.

    Attributes
    ----------
    name : str
    rows : int
        A row runs along the last axis; a vector is one row.
    forward, backward : float
        Mean over the rows of KL(first || second) and of KL(second || first), in nats.
    """

    name: str
    rows: int
    forward: float
    backward: float


def row_divergences(first: Checkpoint, second: Checkpoint) -> Iterator[RowDivergence]:
    """Of every tensor that both have in one shape and in floating point, in the first's order.

    Rows are whole: working memory is that of about a million elements of each model, or of one row if that is more.

    Raises
    ------
    NonFiniteError
        If a tensor holds a NaN or an infinity.
    """
    manifests = (virtual_manifest(first), virtual_manifest(second))
    with MmapReader() as reader:
        for name, tensor in first.tensors.items():
            other = second.tensors.get(name)
            if comparable(tensor, other) and comparable(tensor, tensor) and 0 not in tensor.shape:
                yield _measure(name, tensor.shape, manifests, reader)


def mean_row_divergence(first: Checkpoint, second: Checkpoint) -> RowDivergence:
    """Of all rows of :func:`row_divergences` together, each with the same weight; 0 if there is none."""
    found = list(row_divergences(first, second))
    rows = sum(tensor.rows for tensor in found)
    forward, backward = (
        sum(getattr(tensor, direction) * tensor.rows for tensor in found) / max(rows, 1)
        for direction in ("forward", "backward")
    )
    return RowDivergence("all", rows, forward, backward)


def _measure(name: str, shape: tuple[int, ...], manifests: tuple[ChunkManifest, ...], reader: Reader) -> RowDivergence:
    width = shape[-1] if shape else 1
    rows = math.prod(shape) // width
    totals = np.zeros(2)
    step = max(1, WINDOW // width)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        a, b = (_values(name, row * width, count * width, manifest, reader) for manifest in manifests)
        out = np.empty((count, 1))
        for k, (reverse, forward) in enumerate(((0.0, 1.0), (1.0, 0.0))):
            measure_rows(a, b, width, reverse, forward, out)
            totals[k] += out.sum()
    return RowDivergence(name, rows, *(totals / rows).tolist())


def _values(name: str, start: int, size: int, manifest: ChunkManifest, reader: Reader) -> Array:
    """Elements of a tensor in float64."""
    dtype = manifest.arrays[name].dtype
    segments = manifest.segments(name, start, start + size)
    out = np.empty(size, np.float64 if dtype == "F64" else np.float32)
    with reader.window(segments, last=False) as window:
        bad = decode(window.view(DTYPES[dtype].bits), dtype, out)
    if bad >= 0:
        raise NonFiniteError(f"'{name}' in '{segments[0].path}' holds a NaN or an infinity at flat index {start + bad}")
    return out.astype(np.float64, copy=False)
