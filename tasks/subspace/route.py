"""Which way the singular vectors of a matrix are found: decided by its shape and by `svd` alone."""

from __future__ import annotations

from typing import Literal

from mergepipe.errors import Fault, RecipeError

Route = Literal["full", "gram", "randomized"]
ROUTES: tuple[Route, ...] = ("full", "gram", "randomized")
"""In a state a route is its number here."""

FULL_ELEMENTS = 1 << 22
"""Matrices with up to this many elements are decomposed whole: 2048 x 2048, 32 MiB of float64."""

OVERSAMPLE = 10
POWER_STEPS = 2


def route(shape: tuple[int, int], svd: str) -> Route:
    """The route of a matrix.

    Parameters
    ----------
    shape : (int, int)
    svd : {'exact', 'full', 'gram', 'randomized'}
        'exact' takes the full route up to 4,194,304 elements and the Gram route beyond; the others force theirs.
        'randomized' concerns single factors (:func:`factor_route`); what is made of them goes by 'exact'.

    Examples
    --------
    >>> route((2048, 2048), "exact"), route((4096, 14336), "exact"), route((8, 8), "gram")
    ('full', 'gram', 'gram')
    """
    if svd in ("full", "gram"):
        return "full" if svd == "full" else "gram"
    return "full" if shape[0] * shape[1] <= FULL_ELEMENTS else "gram"


def factor_route(shape: tuple[int, int], svd: str, rank: int) -> Route:
    """The route by which `rank` components of one matrix are found; random only for less than a quarter of them all.

    Examples
    --------
    >>> factor_route((400, 500), "randomized", 50), factor_route((400, 500), "randomized", 200)
    ('randomized', 'full')
    """
    if svd == "randomized" and 4 * rank < min(shape):
        return "randomized"
    return route(shape, svd)


def resolve_rank(rank: str | float, shape: tuple[int, int], models: int, cap: int | None, name: str) -> int:
    """How many components of each task vector are kept.

    Parameters
    ----------
    rank : 'auto', int or float
        'auto' is ``max(1, floor(q / models))`` with q the smaller side; a float is a fraction of q.
    shape : (int, int)
    models : int
    cap : int or None
        No more than this.
    name : str
        The tensor's, for the error.

    Raises
    ------
    RecipeError
        If an integer rank is larger than the matrix.

    Examples
    --------
    >>> [resolve_rank(rank, (4096, 14336), 3, None, "w") for rank in ("auto", 16, 0.25)]
    [1365, 16, 1024]
    """
    side = min(shape)
    if rank == "auto":
        found = max(1, side // models)
    elif isinstance(rank, int):
        if rank > side:
            message = (
                f"rank {rank} is larger than '{name}', which has {shape[0]} x {shape[1]} elements and {side} singular "
                f"values: lower it, use auto or a fraction, or exclude the tensor"
            )
            raise RecipeError([Fault("$.parameters.rank", message)])
        found = rank
    else:
        found = max(1, int(float(rank) * side))
    return found if cap is None else min(found, cap)


def full_floats(rows: int, columns: int) -> int:
    """float64 values that a thin SVD holds at its peak: the matrix, torch's copy, both factors, LAPACK's workspace."""
    side = min(rows, columns)
    return 2 * rows * columns + side * (rows + columns) + 6 * side * side + 64 * (rows + columns)


def factor_floats(shape: tuple[int, int], rank: int, way: Route) -> int:
    """float64 values that finding `rank` components of one matrix takes at the peak, the result included."""
    rows, columns = shape
    side = min(shape)
    result = (rows + columns) * rank
    if way == "full":
        return full_floats(rows, columns) + result
    if way == "gram":
        # Gram matrix, torch's copy that becomes the vectors, LAPACK's two; then the vectors beside the kept ones.
        return max(4 * side * side, side * side + side * rank, result + 9 * rank * rank) + 64 * side
    width = min(rank + OVERSAMPLE, side)
    return (rows + columns) * width * 2 + full_floats(columns, width) + max(rows, columns) * width
