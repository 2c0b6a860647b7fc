"""The sparsifier `della`: drops elements at random, the smaller ones of a row more often than the larger ones.

The element of 0-based ascending rank r by magnitude in a row of n (along the last axis; among equals the lower index
first) is kept with probability ``density - epsilon + 2 * epsilon * r / (n - 1)``; in a row of one, with `density`.
Survivors are scaled so that the tensor keeps its L1 norm, as mergekit does, or each by one over its own probability, as
in the paper.

The probability of every element depends on its whole row in order, so a row has to lie within one tile: tensors with
rows of more than 65,536 elements are refused while planning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import philox
from mergepipe.tasks.blocks import BLOCK_ELEMENTS
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import Array, Job, Paper, Reduction, Sparsifier, State, Tile
from mergepipe.tasks.parameter import Parameter
from mergepipe.tasks.random_drop import DENSITY, RESCALE, Drawn, restored
from mergepipe.tasks.select import order_keys
from mergepipe.tasks.shrinkage import Shrinkage, restore

STAGE = "della"

EPSILON = Parameter(
    "epsilon", "number", "how far the probability falls and rises around the density, from the smallest element of a "
    "row to its largest", default=0.15, per_model=True, minimum=0, maximum=0.5,
)  # fmt: skip


def ascending(row: Array) -> Array:
    """Indices of each row by ascending magnitude, lower index first among equals.

    Parameters
    ----------
    row : ndarray, shape (rows, n)
        Of the working type; n up to 65,536.

    Returns
    -------
    int32 ndarray, shape (rows, n)

    Examples
    --------
    >>> ascending(np.array([[-2.0, 1.0, 2.0, 0.0]], np.float32)).tolist()
    [[3, 1, 0, 2]]
    """
    keys = order_keys(row)
    sizes = keys & np.iinfo(keys.dtype).max
    # As few passes as their counters, which every row begins with, are worth while for.
    digit = 11 if row.shape[1] >= 2048 else 8
    order = np.empty(row.shape, np.int32)
    _sort_rows(sizes, digit, -(-(8 * keys.dtype.itemsize - 1) // digit), order)
    return order


@kernel
def _sort_rows(sizes: Array, bits: int, passes: int, order: Array) -> None:
    """Stable radix sort of each row, `bits` at a time: keys go along with their indices, so that both lie in order.

    A digit that all of a row have in common is passed over.
    """
    n, mask = sizes.shape[1], (1 << bits) - 1
    counts = np.empty((passes, mask + 1), np.int32)
    keys, indices = np.empty((2, n), sizes.dtype), np.empty((2, n), np.int32)
    for row in range(sizes.shape[0]):
        source, places = sizes[row], order[row]
        counts[:] = 0
        for i in range(n):
            places[i] = i
            key = source[i]
            for k in range(passes):
                counts[np.uintp(k), np.uintp((key >> (bits * k)) & mask)] += np.int32(1)
        side = 0
        for k in range(passes):
            own, shift = counts[k], bits * k
            if own[np.uintp((source[0] >> shift) & mask)] == n:
                continue
            start = np.int32(0)
            for value in range(mask + 1):
                count = own[value]
                own[value] = start
                start += count
            target, there = keys[side], indices[side]
            for i in range(n):
                key = source[i]
                digit = np.uintp((key >> shift) & mask)
                place = np.uintp(own[digit])
                own[digit] += np.int32(1)
                target[place] = key
                there[place] = places[i]
            source, places = target, there
            side = 1 - side
        order[row] = places


@kernel
def _drop_ranked(values: Array, order: Array, words: Array, chances: Array, inverse: bool) -> None:
    """Keep the element at rank r if its word is below ``2**32 * chances[r]``."""
    n, zero = order.shape[1], values.dtype.type(0)
    limits = np.empty(n, np.int64)
    for rank in range(n):
        limits[rank] = np.int64(np.floor(chances[rank] * 4294967296.0))
    for row in range(order.shape[0]):
        own, drawn, places = values[row * n : (row + 1) * n], words[row * n : (row + 1) * n], order[row]
        for rank in range(n):
            i = np.uintp(places[rank])
            kept = values.dtype.type(own[i] / chances[rank]) if inverse else own[i]
            own[i] = kept if np.int64(drawn[i]) < limits[rank] else zero


def drop(job: Job, tile: Tile, drawn: Sequence[Drawn], stream: str = "") -> None:
    """Drop from every row of every model, and apply ``inverse_keep``. In place.

    Parameters
    ----------
    drawn : sequence of mapping
        `density`, `epsilon` and `rescale` of each model.
    stream : str
        As of :func:`mergepipe.tasks.random_drop.drop`.
    """
    n = job.shape[-1] if job.shape else 1
    words = np.empty(tile.values.shape[1], np.uint32)
    for k, params in enumerate(drawn):
        density, epsilon = params["density"], params["epsilon"]
        if density >= 1:
            continue
        if density <= 0:
            tile.values[k] = 0
            continue
        philox.words(np.uint64(philox.mask_key(job.seed, job.offset + k, job.name + stream)), tile.start, words)
        order = ascending(tile.values[k].reshape(-1, n))
        chances = density - epsilon + 2 * epsilon * (np.arange(n) / (n - 1)) if n > 1 else np.array([density])
        _drop_ranked(tile.values[k], order, words, chances, params["rescale"] == "inverse_keep")


def check(job: Job, drawn: Sequence[Mapping[str, Any]]) -> None:
    """Refuse, while planning, what can't be done.

    Raises
    ------
    RecipeError
        If a probability would leave 0 to 1, or a row of the tensor is longer than a tile.
    """
    thinned = [params for params in drawn if 0 < params["density"] < 1]
    for params in thinned:
        density, epsilon = params["density"], params["epsilon"]
        if density - epsilon <= 0 or density + epsilon >= 1:
            message = (
                f"density {density:g} and epsilon {epsilon:g} of {job.name!r} make probabilities from "
                f"{density - epsilon:g} to {density + epsilon:g}, which must lie between 0 and 1: choose a smaller "
                "epsilon"
            )
            raise RecipeError([Fault("$.parameters.epsilon", message)])
    if thinned and job.size and job.shape and job.shape[-1] > BLOCK_ELEMENTS:
        message = (
            f"{job.name!r} has rows of {job.shape[-1]:,} elements, della ranks rows of {BLOCK_ELEMENTS:,} at most: "
            "give the tensor another method or a density of 1 with an entry of `rules`"
        )
        raise RecipeError([Fault("$.merge_method", message)])


def _thin(job: Job, state: State, tile: Tile) -> None:
    drop(job, tile, job.sparsify_params)


def _mask(job: Job, state: State, tile: Tile) -> None:
    _thin(job, state, tile)
    restore(job, state, tile, STAGE)


def _reductions(job: Job) -> tuple[Reduction, ...]:
    check(job, job.sparsify_params)
    return (Shrinkage(STAGE, lambda job: restored(job.sparsify_params), _thin),)


DELLA = Sparsifier(
    name="della",
    title="DELLA (MagPrune)",
    summary="drops random elements of each row of a task vector, small ones more often than large ones",
    parameters=(DENSITY, EPSILON, RESCALE),
    reductions=_reductions,
    mask=_mask,
    paper=Paper("DELLA-Merging: Reducing Interference in Model Merging", "https://arxiv.org/abs/2406.11617"),
)
