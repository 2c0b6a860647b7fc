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
from mergepipe.tasks.jit import kernel
from mergepipe.tasks.method import BLOCK_ELEMENTS, Array, Job, Paper, Parameter, Reduction, Sparsifier, State, Tile
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
    int64 ndarray, shape (rows, n)

    Examples
    --------
    >>> ascending(np.array([[-2.0, 1.0, 2.0, 0.0]], np.float32)).tolist()
    [[3, 1, 0, 2]]
    """
    keys = order_keys(row)
    sizes = keys & np.iinfo(keys.dtype).max
    order = np.empty(row.shape, np.int64)
    _sort_rows(sizes, keys.dtype.itemsize, order, np.empty(row.shape[1], np.int64))
    return order


@kernel
def _sort_rows(sizes: Array, nbytes: int, order: Array, spare: Array) -> None:
    """Stable radix sort of the indices of each row, a byte at a time; one that all have in common is passed over."""
    counts = np.empty(256, np.int64)
    n = sizes.shape[1]
    for row in range(sizes.shape[0]):
        keys = sizes[row]
        source, target = order[row], spare
        for i in range(n):
            source[i] = i
        for byte in range(nbytes):
            counts[:] = 0
            for i in range(n):
                counts[np.uintp((keys[i] >> (8 * byte)) & 0xFF)] += 1
            if counts[np.uintp((keys[0] >> (8 * byte)) & 0xFF)] == n:
                continue
            start = 0
            for value in range(256):
                start, counts[value] = start + counts[value], start
            for i in range(n):
                index = source[i]
                digit = np.uintp((keys[np.uintp(index)] >> (8 * byte)) & 0xFF)
                target[np.uintp(counts[digit])] = index
                counts[digit] += 1
            source, target = target, source
        order[row] = source


@kernel
def _drop_ranked(
    values: Array, order: Array, words: Array, least: float, slope: float, lone: float, inverse: bool
) -> None:
    """Keep the element at rank r if its word is below ``2**32 * (least + slope * r / (n - 1))``."""
    n = order.shape[1]
    for row in range(order.shape[0]):
        for rank in range(n):
            i = row * n + order[row, rank]
            p = least + slope * (rank / (n - 1)) if n > 1 else lone
            if np.float64(words[i]) >= np.floor(p * 4294967296.0):
                values[i] = 0
            elif inverse:
                values[i] = values.dtype.type(values[i] / p)


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
        inverse = params["rescale"] == "inverse_keep"
        _drop_ranked(tile.values[k], order, words, density - epsilon, 2 * epsilon, density, inverse)


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
