"""What is wrong with a merge: the first thing that is found, or everything.

A build stops at the first stage that finds a fault, a check goes on with what is left. Both go the same way; all that
differs is the :class:`Faults` they take along.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches

from mergepipe.errors import Fault, MergepipeError, RecipeError


class Faults:
    """Takes in what is wrong: raises it at once, or keeps it.

    Parameters
    ----------
    keep : bool
        Whether the work goes on after a fault.

    Attributes
    ----------
    errors : list of MergepipeError
        What was kept, in the order in which it was found.

    Examples
    --------
    >>> faults = Faults(keep=True)
    >>> with faults.taken():
    ...     raise RecipeError([Fault("$.models", "is empty")])
    >>> [str(error) for error in faults.errors], faults.in_recipe("$.models"), faults.in_recipe("$.rules")
    (['$.models: is empty'], True, False)
    """

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.errors: list[MergepipeError] = []

    def take(self, error: MergepipeError) -> None:
        """Raise the error, or keep it; of a recipe's faults only those that do not follow from others kept before."""
        if not self.keep:
            raise error
        if isinstance(error, RecipeError):
            fresh = independent(error.faults, self.of_recipe())
            if fresh:
                self.errors.append(RecipeError(fresh))
        else:
            self.errors.append(error)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Take what the block raises; a block that fails ends there."""
        try:
            yield
        except MergepipeError as error:
            self.take(error)

    def of_recipe(self) -> list[Fault]:
        """The faults of the recipe that were kept."""
        return [fault for error in self.errors if isinstance(error, RecipeError) for fault in error.faults]

    def in_recipe(self, *parts: str) -> bool:
        """Whether a fault was kept that lies in one of these parts of the recipe."""
        return any(fault.path.startswith(parts) for fault in self.of_recipe())


FIRST = Faults(keep=False)
"""Raises the first error; holds nothing, so that it can be shared."""


def independent(found: list[Fault] | tuple[Fault, ...], before: list[Fault]) -> list[Fault]:
    """Of the faults `found` those that do not merely follow from faults found before.

    What is said of a part of the recipe that is at fault already, or of a parameter that is (or whose name may have
    been misspelt there), is no news.

    Examples
    --------
    >>> misspelt = [Fault("$.parameters.weigth", "did you mean 'weight'?")]
    >>> independent([Fault("$.parameters.weight", "is missing"), Fault("$.parameters.t", "is missing")], misspelt)
    [Fault(path='$.parameters.t', message='is missing')]
    """
    paths = [fault.path for fault in before]
    names = [_name(path) for path in paths]
    return [
        fault
        for fault in found
        if not any(_contains(path, fault.path) or _contains(fault.path, path) for path in paths)
        and not get_close_matches(_name(fault.path), names, n=1, cutoff=0.6)
    ]


def _name(path: str) -> str:
    """The last key of a path that ends in a parameter; a path of its own for anything else."""
    found = re.search(r"parameters\.(\w+)", path)
    return found[1] if found else path


def _contains(outer: str, inner: str) -> bool:
    return inner == outer or (outer != "$" and inner.startswith((f"{outer}.", f"{outer}[")))
