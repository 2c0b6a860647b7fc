"""How far the leading directions of a matrix can have turned: the gaps between its singular values.

With ``x = norm(W - A) / (s_k(A) - s_(k+1)(A))`` below 1, Wedin's theorem bounds the sine of the largest angle between
the spaces of the `k` leading singular vectors of A and of W by ``x / (1 - x)``; above, it says nothing. Frobenius norms
bound spectral ones, so one decomposition of A does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergepipe.tasks.subspace.panels import Panels, gram, panel_floats, spans
from mergepipe.tasks.subspace.route import route

if TYPE_CHECKING:
    import torch

LEADING = (1, 4, 16, 64)
"""Numbers of leading directions that are looked at, where there are more."""

HELD_PANELS = 3
"""Two panels that are multiplied, and what a panel is made from."""


def gaps(panels: Panels, like: torch.Tensor) -> list[float]:
    """``s_k - s_(k+1)`` for every `k` of :data:`LEADING` that is smaller than the matrix.

    Parameters
    ----------
    panels : Panels
    like : tensor
        float64; says which device.
    """
    import torch

    if route(panels.shape, "exact") == "full":
        values = torch.linalg.svdvals(torch.cat([panels.panel(span) for span in spans(panels.shape)]))
    else:
        values = torch.linalg.eigvalsh(gram(panels, like)).flip(0).clamp(min=0).sqrt()
    found = values.tolist()
    return [found[k - 1] - found[k] for k in LEADING if k < len(found)]


def gap_floats(shape: tuple[int, int]) -> int:
    """float64 values that :func:`gaps` holds at its peak."""
    if route(shape, "exact") == "full":
        # The matrix and LAPACK's copy, or the panels that it is put together from.
        return 2 * shape[0] * shape[1] + panel_floats(shape) + 64 * sum(shape)
    side = min(shape)
    return 3 * side * side + 64 * side + HELD_PANELS * panel_floats(shape)
