"""Runs a merge method over arrays in memory, tile by tile, as the pipeline does over files."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mergepipe.tasks.blocks import block_bounds
from mergepipe.tasks.method import Accumulator, Array, Job, MergeMethod, Reduction, State, Tile
from mergepipe.tasks.parameter import REQUIRED, Parameter
from mergepipe.tasks.registry import method, sparsifier, trim_parameters


@dataclass
class Merged:
    """What came out: the output in the working type, the state, and the names of the sweeps that ran."""

    out: Array
    state: State
    sweeps: list[str] = field(default_factory=list)


def _filled(parameters: Sequence[Parameter], given: Mapping[str, Any]) -> dict[str, Any]:
    unknown = set(given) - {p.name for p in parameters}
    assert not unknown, f"no such parameter: {unknown}"
    values = {p.name: p.check(given.get(p.name, p.default)) for p in parameters}
    assert REQUIRED not in values.values()
    return values


def make_job(
    name: str,
    shape: tuple[int, ...],
    work: Any,
    models: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any] | None = None,
    sparsify: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    tensor: str = "layer.weight",
    seed: int = 0,
) -> tuple[MergeMethod, Job]:
    """A job with defaults filled in; `sparsify` is one mapping with `method`, or one per model."""
    found = method(name)
    own = [p for p in found.parameters if p.per_model]
    model_params = tuple(_filled(own, given) for given in models)
    kind, thinning = found.trim, trim_parameters(found, model_params)
    if sparsify is not None:
        each = [sparsify] * len(models) if isinstance(sparsify, Mapping) else list(sparsify)
        kind = each[0]["method"]
        rest = [{key: value for key, value in one.items() if key != "method"} for one in each]
        thinning = tuple(_filled(sparsifier(kind).parameters, one) for one in rest)
    shared = _filled([p for p in found.parameters if not p.per_model], params or {})
    return found, Job(tensor, shape, len(models), np.dtype(work), shared, model_params, kind, thinning, seed)


def merge(
    name: str,
    models: Sequence[Array],
    base: Array | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    params: Mapping[str, Any] | None = None,
    sparsify: Any = None,
    *,
    workers: int = 1,
    order: int | None = None,
    state: State | None = None,
    tensor: str = "layer.weight",
    seed: int = 0,
    importances: Sequence[Array] = (),
) -> Merged:
    """Merge arrays of the working type.

    Parameters
    ----------
    name : str
        The merge method.
    models, base : arrays of one shape
    each, params, sparsify
        Parameters as in a recipe: per model, shared, and the sparsifier's.
    workers : int
        How many accumulators share the counting of a sweep.
    order : int, optional
        Seed of the order in which tiles are worked on; ascending if None.
    state : dict, optional
        To begin with.
    """
    found, job = make_job(
        name, models[0].shape, models[0].dtype, each or [{} for _ in models], params, sparsify, tensor, seed
    )
    result = Merged(np.full(job.size, np.nan, job.work), dict(state or {}))
    tiles = list(range(job.blocks))
    if order is not None:
        random.Random(order).shuffle(tiles)
    for reduction in found.reductions(job):
        if reduction.needed(job, result.state):
            result.sweeps.append(reduction.name)
            result.state |= sweep(found, job, reduction, result.state, models, base, tiles, workers)
    for index in tiles:
        tile = load_tile(found, job, models, base, index)
        if importances:
            parts = [one.reshape(-1)[tile.start : tile.start + tile.values.shape[1]] for one in importances]
            tile.importance = np.stack(parts)
        found.kernel(job, result.state, tile, result.out[tile.start : tile.start + tile.values.shape[1]])
    result.out = result.out.reshape(job.shape)
    return result


def sweep(
    found: MergeMethod,
    job: Job,
    reduction: Reduction,
    state: State,
    models: Sequence[Array],
    base: Array | None,
    tiles: Sequence[int],
    workers: int,
) -> State:
    """What one sweep finds."""
    counts, row = reduction.shapes(job)
    blocks = None if row is None else np.zeros((job.blocks, *row))
    mine = [Accumulator(None if counts is None else np.zeros(counts, np.int64), blocks) for _ in range(workers)]
    for position, index in enumerate(tiles):
        reduction.update(job, state, mine[position % workers], load_tile(found, job, models, base, index))
    counted = [one.counts for one in mine if one.counts is not None]
    total = np.add.reduce(counted, axis=0) if counted else None
    return reduction.combine(job, state, Accumulator(total, blocks))


def load_tile(found: MergeMethod, job: Job, models: Sequence[Array], base: Array | None, index: int) -> Tile:
    """One block, with scratch full of NaN."""
    start, stop = block_bounds(job.shape, index)
    below = None if base is None else base.reshape(-1)[start:stop].copy()
    values = np.stack([model.reshape(-1)[start:stop] for model in models])
    if found.space == "deltas" and below is not None:
        values -= below
    scratch = np.full((found.scratch_rows, stop - start), np.nan, job.work)
    return Tile(index, start, below, values, scratch)
