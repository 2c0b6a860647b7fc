"""TADrop to an overall density: keep rates that follow each tensor's own density and add up to a given share.

``keep_l = min(1, kappa * (1 - d_l))`` with the one kappa for which ``sum(n_l * keep_l) = rho * sum(n_l)``, found
exactly by water filling: tensors in order of falling ``1 - d``, one after another saturates at 1 until the next one
would not. The sum goes over the tensors of one task, or of all tasks together (`calibrate_scope`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mergepipe.errors import Fault, RecipeError
from mergepipe.tasks import slices
from mergepipe.tasks.method import Array, Job, Reduction, Round, Shared, State


def water_fill(densities: Array, sizes: Array, target: float) -> tuple[float, Array]:
    """Kappa and the keep rates for an overall share.

    Parameters
    ----------
    densities, sizes : ndarray, shape (tensors,)
    target : float
        rho, in (0, 1].

    Returns
    -------
    kappa : float
        Infinite where everything is kept and no finite factor says so; 0 where no tensor has anything to give.
    keep : float64 ndarray, shape (tensors,)

    Examples
    --------
    >>> kappa, keep = water_fill(np.array([0.1, 0.5, 0.9]), np.array([100, 200, 300]), 0.5)
    >>> round(kappa, 10), keep.round(6).tolist()
    (1.5384615385, [1.0, 0.769231, 0.153846])
    """
    weights = 1.0 - densities
    order = np.argsort(-weights, kind="stable")
    total, saturated = float(sizes.sum()), 0.0
    for position, index in enumerate(order):
        rest = math.fsum((sizes[order[position:]] * weights[order[position:]]).tolist())
        kappa = (target * total - saturated) / rest if rest > 0 else 0.0
        if kappa * weights[index] <= 1:
            return kappa, np.where(np.isin(np.arange(len(weights)), order[:position]), 1.0, kappa * weights)
        saturated += float(sizes[index])
    return math.inf, np.ones(len(weights))


@dataclass(frozen=True, slots=True)
class Calibrate:
    """The round that measures every tensor and settles its keep rate.

    Leaves ``kappa`` (float64, (models,)), ``metric`` and ``_keep_rates`` (float64, (models,) for each tensor; NaN where
    a tensor is excluded or a model has no target).
    """

    measure: Callable[[Job], tuple[Reduction, ...]]
    name: str = "densities"

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """Those that give the metric."""
        return self.measure(job)

    def counts(self, job: Job, state: State) -> Array | None:
        """None."""
        return None

    def values(self, job: Job, state: State) -> Array | None:
        """The metric of every model, in a row for each slice of a stack; None for an empty tensor."""
        if slices.COUNT not in state:
            return state.get("metric")
        return np.stack([state[f"_slice{number}_metric"] for number in range(int(state[slices.COUNT]))])

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """Water filling, task by task or over all."""
        models = jobs[0].models
        none = np.full(models, math.nan)
        rows = [np.atleast_2d(none if value is None else value) for value in values]
        metric = np.concatenate(rows)
        each = [[job.size / len(row)] for job, row in zip(jobs, rows, strict=True) for _ in row]
        sizes = np.broadcast_to(np.array(each), metric.shape)
        keep, kappas = np.full(metric.shape, math.nan), np.full(models, math.nan)
        for columns, target in _pools(jobs[0]):
            chosen = np.zeros(metric.shape, bool)
            chosen[:, columns] = True
            chosen &= ~np.isnan(metric)
            if chosen.any():
                kappas[columns], keep[chosen] = water_fill(metric[chosen], sizes[chosen], target)
        # Tensors are of one row each, but for stacks: rows that they don't have are filled up.
        ends, most = np.cumsum([len(row) for row in rows]), max(len(row) for row in rows)
        parts = {"_by_slice__keep_rates": np.split(keep, ends[:-1]), "_by_slice_metric": rows}
        filled = {
            name: np.stack([np.concatenate([row, np.full((most - len(row), models), math.nan)]) for row in found])
            for name, found in parts.items()
        }
        return Shared({"kappa": kappas}, {**filled, "metric": np.stack([row.mean(axis=0) for row in rows])})


def _pools(job: Job) -> list[tuple[list[int], float]]:
    """Models that are calibrated together, and to what."""
    targets = [params["target_density"] for params in job.sparsify_params]
    together = [k for k, params in enumerate(job.sparsify_params) if params["calibrate_scope"] == "all"]
    pooled = [k for k in together if targets[k] is not None]
    if len({targets[k] for k in pooled}) > 1:
        message = "models that are calibrated together (`calibrate_scope: all`) need one target_density for all of them"
        raise RecipeError([Fault("$.sparsify.target_density", message)])
    alone = [([k], target) for k, target in enumerate(targets) if target is not None and k not in pooled]
    return [*alone, *([(pooled, targets[pooled[0]])] if pooled else [])]


def rounds(jobs: Sequence[Job], measure: Callable[[Job], tuple[Reduction, ...]]) -> tuple[Round, ...]:
    """The round, where a model has a target.

    Raises
    ------
    RecipeError
        If models are to be calibrated together but to different targets.
    """
    return (Calibrate(measure),) if _pools(jobs[0]) else ()
