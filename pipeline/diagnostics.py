"""What a merge has found out about each tensor, as the manifest shows it: one record per tensor.

A record is made from the tensor's state alone, and the state of every finished tensor is in the journal: so the records
of a run that was interrupted are those of one that was not. A key is there where the method has something to say:

========================  ==============================================================================================
``densities``             fraction of each model's elements that was kept, by the sparsifier or by coordinate fusion
``kept_norms``            norm of what was kept over that of all: of the differences to each donor (`scf_rkl`,
                          `arcee_fusion`), of task vectors where a thinning restores a norm, or with ``--diagnostics``;
                          see :mod:`mergepipe.pipeline.kept_norms`
``row_kl``                mean divergence between the softmaxed rows of each donor and the primary's
``route``                 how a whole matrix was decomposed: full, gram or randomized
``ranks``                 components kept of each task vector
``spanned``               dimensions of the left and the right frame
``protected``             directions of the merge so far that were closed to each model (`opcm`)
``conditioning``          their smallest kept over largest squared singular value
``gram_steps_repeated``   Gram steps that were taken twice for its sake
``directions_lost``       components asked for that were zero or dependent on others
``device``                where that was worked on: "cpu" or "cuda:N"
``change``                with ``--diagnostics`` only; see :mod:`mergepipe.pipeline.changes`
========================  ==============================================================================================
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

from mergepipe.storage.statistics import StatisticsStore
from mergepipe.tasks.method import Array, State, lasting
from mergepipe.tasks.subspace.report import readable

PER_MODEL = ("densities", "kept_norms", "row_kl")
"""Entries of a state that hold one number per model."""


def record(state: State, device: str) -> dict[str, Any]:
    """The record of one tensor; empty where its method found nothing out.

    Parameters
    ----------
    state : State
        What its reductions, rounds and solver found.
    device : str
        Where that was.

    Examples
    --------
    >>> import numpy as np
    >>> record({"densities": np.array([0.5, math.nan]), "thresholds": np.array([1e-3, 0.0])}, "cpu")
    {'densities': [0.5, None], 'device': 'cpu'}
    >>> record({"thresholds": np.array([1e-3])}, "cpu")
    {}
    """
    found = {name: _numbers(state[name]) for name in PER_MODEL if name in state} | readable(state)
    return found | {"device": device} if found else {}


def remark(name: str, state: State) -> str | None:
    """What a user is told of a tensor while it is made, if anything."""
    lost = readable(state).get("directions_lost", 0)
    if not lost:
        return None
    return (
        f"'{name}': {lost} of the directions asked for are zero or follow from others (a model equal to another or to "
        f"the base, or a low-rank update): they are left out"
    )


def _numbers(values: Array) -> list[float | None]:
    """JSON has no NaN: what was not found is null."""
    return [float(value) if math.isfinite(value) else None for value in values]


class Findings:
    """Keeps what is found out about each tensor, as a statistic and for the manifest. Safe to use from several threads.

    Parameters
    ----------
    names : sequence of str
        Of the tensors, in plan order.
    statistics : StatisticsStore
    where : callable
        Which device a tensor, by its number, is worked on with.
    """

    def __init__(self, names: list[str], statistics: StatisticsStore, where: Callable[[int], str]) -> None:
        self._names = names
        self._statistics = statistics
        self._where = where
        self._lock = threading.Lock()
        self._records: dict[str, dict[str, Any]] = {}

    def keep(self, number: int, state: State) -> None:
        """Take in the state of a tensor that is settled."""
        self._statistics.put(number, lasting(state))
        found = record(state, self._where(number))
        if found:
            with self._lock:
                self._records[self._names[number]] = found

    @property
    def records(self) -> dict[str, dict[str, Any]]:
        """By name of the tensor."""
        with self._lock:
            return dict(sorted(self._records.items()))
