"""Leading singular vectors of one matrix that is read in panels, by each route."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergepipe.tasks.subspace.panels import Panels, gram, multiply_rows, spans, times, transposed_times
from mergepipe.tasks.subspace.route import OVERSAMPLE, POWER_STEPS, Route

if TYPE_CHECKING:
    import torch

WELL_CONDITIONED = 1e-10
"""Where the smallest kept eigenvalue of a Gram matrix is not above this share of the largest, its step is repeated."""


@dataclass(slots=True)
class Factors:
    """``left @ diag(values) @ right.T`` is the matrix, or the best approximation of its rank.

    Attributes
    ----------
    left : float64 tensor, shape (rows, k)
    values : float64 tensor, shape (k,)
        Descending; those of at most `rtol` times the first are left out, so k may be less than was asked for.
    right : float64 tensor, shape (columns, k)
    repeated : bool
        Whether the Gram step had to be repeated.
    """

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    repeated: bool = False

    @property
    def rank(self) -> int:
        """Components kept."""
        return self.values.shape[0]


def factorize(
    panels: Panels, rank: int, way: Route, like: torch.Tensor, *, rtol: float = 1e-10, seed: int = 0
) -> Factors:
    """The `rank` leading components of a matrix.

    Parameters
    ----------
    panels : Panels
    rank : int
    way : {'full', 'gram', 'randomized'}
    like : tensor
        Says which device.
    rtol : float
        Components of at most this share of the largest are left out.
    seed : int
        Of the randomized route.
    """
    if way == "full":
        found = _full(panels, rank)
    elif way == "gram":
        found = _by_gram(panels, rank, like, rtol)
    else:
        found = _randomized(panels, rank, like, seed)
    kept = int((found.values > rtol * found.values[:1]).sum()) if found.rank else 0
    if kept < found.rank:
        found.left, found.values, found.right = found.left[:, :kept], found.values[:kept], found.right[:, :kept]
    return found


def _full(panels: Panels, rank: int) -> Factors:
    import torch

    whole = torch.cat([panels.panel(span) for span in spans(panels.shape)])
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    return Factors(left[:, :rank].contiguous(), values[:rank], right[:rank].T.contiguous())


def _by_gram(panels: Panels, rank: int, like: torch.Tensor, rtol: float) -> Factors:
    """Vectors of the smaller side from its Gram matrix, those of the other by one more pass over the panels."""
    import torch

    wide = panels.shape[0] < panels.shape[1]
    eigenvalues, vectors = torch.linalg.eigh(gram(panels, like))
    side = vectors[:, -rank:].flip(1).contiguous()
    top = eigenvalues[-rank:].flip(0)
    del vectors
    other = transposed_times(panels, side) if wide else times(panels, side)
    values = torch.linalg.vector_norm(other, dim=0)  # far more accurate than the roots of small eigenvalues
    repeated = not bool(top[-1] > WELL_CONDITIONED * top[0])
    if repeated:
        side, values, other = _repeat(side, values, other, rtol)
    else:
        other /= values
    return Factors(side, values, other, repeated) if wide else Factors(other, values, side, repeated)


def _repeat(
    side: torch.Tensor, lengths: torch.Tensor, other: torch.Tensor, rtol: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Singular vectors from nearly singular ones: `other` = matrix x `side`, its columns of these lengths.

    The columns are made unit vectors, so that their Gram matrix is well conditioned; what is left to decompose is a
    small square matrix.
    """
    import torch

    kept = lengths > rtol * lengths.max()
    side, lengths, other = side[:, kept], lengths[kept], other[:, kept]
    if not lengths.shape[0]:
        return side, lengths, other
    other /= lengths
    eigenvalues, vectors = torch.linalg.eigh(other.T @ other)
    roots = eigenvalues.clamp(min=1e-14 * float(eigenvalues[-1])).sqrt()
    small = roots[:, None] * (vectors.T * lengths)
    left, values, right = torch.linalg.svd(small)
    multiply_rows(other, (vectors / roots) @ left)
    return multiply_rows(side, right.T), values, other


def _randomized(panels: Panels, rank: int, like: torch.Tensor, seed: int) -> Factors:
    """A seeded range finder with power steps; the random numbers are drawn on the CPU, the same for every device."""
    import torch

    width = min(rank + OVERSAMPLE, *panels.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(panels.shape[1], width, generator=generator, dtype=torch.float64).to(like.device)
    basis = torch.linalg.qr(times(panels, start))[0]
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(transposed_times(panels, basis))[0]
        basis = torch.linalg.qr(times(panels, basis))[0]
    right, values, left = torch.linalg.svd(transposed_times(panels, basis), full_matrices=False)
    return Factors((basis @ left.T)[:, :rank].contiguous(), values[:rank], right[:, :rank].contiguous())
