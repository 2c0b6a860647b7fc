"""SVC: the singular values of a merged update, set right by how much of it each task vector already holds.

Of the update's SVD ``U S V.T``, direction r carries ``a = u_r.T update``; task t has ``a_t = u_r.T tau_t`` there. Where
tasks share a direction their sum is too long: with ``s_t = <a, a_t> / <a_t, a_t>`` the singular value is multiplied by
``T / sum_t max(alpha, s_t)``.

References
----------
arXiv:2602.05536
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergepipe.tasks.subspace.panels import Panels, transposed_times

if TYPE_CHECKING:
    import torch


def calibrate(
    left: torch.Tensor, right: torch.Tensor, sources: Sequence[Panels], alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The update ``left @ right.T`` with other singular values, again as two factors.

    Parameters
    ----------
    left, right : float64 tensor, shape (rows, K) and (columns, K)
    sources : sequence of Panels
        The task vectors.
    alpha : float
        Smaller overlaps count as this; it also stands for tasks that have nothing in a direction.
    """
    import torch

    if not left.shape[1]:
        return left, right
    first, upper = torch.linalg.qr(left)
    second, lower = torch.linalg.qr(right)
    turn, values, back = torch.linalg.svd(upper @ lower.T)
    first, second = first @ turn, second @ back.T
    return first * calibrated(first, values, second, sources, alpha), second


def calibrated(
    first: torch.Tensor, values: torch.Tensor, second: torch.Tensor, sources: Sequence[Panels], alpha: float
) -> torch.Tensor:
    """The singular values of ``first @ diag(values) @ second.T``, calibrated."""
    import torch

    total = torch.zeros_like(values)
    for source in sources:
        along = transposed_times(source, first)
        square = (along * along).sum(0)
        overlap = torch.where(square > 0, values * (second * along).sum(0) / square, 0.0)
        total += overlap.clamp(min=alpha)
    return values * len(sources) / total


def calibrate_floats(shape: tuple[int, int], count: int) -> int:
    """float64 values that :func:`calibrate` takes at its peak, its arguments included."""
    return 4 * sum(shape) * count + 2 * shape[1] * count + 10 * count * count
