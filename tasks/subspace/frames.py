"""The nearest orthonormal frame, and the nearest simplex equiangular tight frame, to a set of columns.

Both are orthogonal Procrustes problems. The orthonormal columns nearest to `x` are its polar factor: with the thin SVD
``x = P S B.T`` that is ``P B.T``. A simplex frame of K vectors is ``sqrt(K / (K - 1)) * Q C`` with orthonormal Q and
the centring ``C = I - 1 1.T / K``; the nearest one is the polar factor of ``x C``, scaled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mergepipe.tasks.subspace.factor import WELL_CONDITIONED
from mergepipe.tasks.subspace.panels import multiply_rows
from mergepipe.tasks.subspace.route import Route

if TYPE_CHECKING:
    import torch

Target = Literal["polar", "etf", "none"]

NEWTON_STEPS = 40
"""Scaled Newton steps at most; nine do for any matrix whose inverse can be computed."""


@dataclass(slots=True)
class Frame:
    """A frame of K vectors, ``basis @ mix`` (or `basis` itself where `mix` is None).

    Attributes
    ----------
    basis : float64 tensor, shape (n, K)
    mix : float64 tensor, shape (K, K), or None
        What is still to be multiplied: put off, so that nothing of the size of the basis has to be copied.
    rank : int
        Dimensions that the frame spans.
    ratio : float
        Smallest kept over largest squared singular value of what the frame was made from: its conditioning.
    repeated : bool
        Whether the Gram step had to be repeated.
    """

    basis: torch.Tensor
    mix: torch.Tensor | None
    rank: int
    ratio: float
    repeated: bool = False

    def dense(self) -> torch.Tensor:
        """The vectors, in the memory of `basis`."""
        return self.basis if self.mix is None else multiply_rows(self.basis, self.mix)


def nearest(x: torch.Tensor, target: Target, way: Route, rtol: float) -> Frame:
    """The frame nearest to the columns of `x`.

    Parameters
    ----------
    x : float64 tensor, shape (n, K)
        Overwritten on the Gram route.
    target : {'polar', 'etf', 'none'}
        Orthonormal vectors, a simplex frame, or `x` as it is.
    way : {'full', 'gram'}
    rtol : float
        Singular values of at most this share of the largest are truncated.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    >>> nearest(x, "polar", "full", 1e-10).basis.tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
    """
    count = x.shape[1]
    if target == "none" or count == 0 or (target == "etf" and count == 1):
        return Frame(x, None, count, 1.0)
    centred = target == "etf"
    frame = _by_gram(x, centred, rtol) if way == "gram" else _by_svd(x, centred, rtol)
    if centred:
        scaled = frame.basis if frame.mix is None else frame.mix
        scaled *= math.sqrt(count / (count - 1))
    return frame


def _by_svd(x: torch.Tensor, centred: bool, rtol: float) -> Frame:
    import torch

    left, values, right = torch.linalg.svd(x - x.mean(1, keepdim=True) if centred else x, full_matrices=False)
    rank = max(1, int((values > rtol * values[0]).sum()))
    ratio = float((values[rank - 1] / values[0]) ** 2) if values[0] > 0 else 0.0
    return Frame(left[:, :rank] @ right[:rank], None, rank, ratio)


def _by_gram(x: torch.Tensor, centred: bool, rtol: float) -> Frame:
    """``x (x.T x)^(-1/2)``, the inverse root from an eigendecomposition."""
    import torch

    count = x.shape[1]
    product, middling = x.T @ x, 0.0
    if centred:
        # Centring makes the vector of ones a null vector. It is given a middling eigenvalue while the root is taken,
        # which leaves all other eigenvectors alone, and centred away again.
        _centre(product)
        middling = float(torch.trace(product)) / (count - 1)
        product += middling / count
    eigenvalues, vectors = torch.linalg.eigh(product)
    del product
    ratio = float(eigenvalues[0] / eigenvalues[-1])
    if not ratio > WELL_CONDITIONED:
        if centred:
            x -= x.mean(1, keepdim=True)
            eigenvalues -= middling * vectors.sum(0) ** 2 / count
        return _repeat(x, eigenvalues, vectors, rtol)
    mix = (vectors * eigenvalues.rsqrt()) @ vectors.T
    return Frame(x, _centre(mix) if centred else mix, count - centred, ratio)


def _centre(square: torch.Tensor) -> torch.Tensor:
    """``C square C``, in place."""
    square -= square.mean(0, keepdim=True)
    square -= square.mean(1, keepdim=True)
    return square


def _repeat(x: torch.Tensor, eigenvalues: torch.Tensor, vectors: torch.Tensor, rtol: float) -> Frame:
    """The Gram step once more, on columns that the first one has made nearly orthonormal; then truncation.

    ``x = x1 D V.T`` with the first step's eigenvectors and roots; ``x1 = q sqrt(M) Z.T`` with those of the second, q
    orthonormal. So ``x = q small``, and the polar factor of `x` is q times that of `small`.
    """
    import torch

    count, epsilon = x.shape[1], torch.finfo(x.dtype).eps
    roots = eigenvalues.clamp(min=count * epsilon * float(eigenvalues.max())).sqrt()
    multiply_rows(x, vectors / roots)
    second, rotation = torch.linalg.eigh(x.T @ x)
    # What is noise after two steps is far below rtol: it gets a tiny value here, so that `small` can be inverted.
    lengths = second.clamp(min=1e-12 * float(second[-1])).sqrt()
    small = lengths[:, None] * (rotation.T @ (roots[:, None] * vectors.T))
    del vectors
    polar, rank, ratio = truncated_polar(small, rtol)
    polar /= lengths[:, None]
    return Frame(x, rotation @ polar, rank, ratio, repeated=True)


def truncated_polar(small: torch.Tensor, rtol: float) -> tuple[torch.Tensor, int, float]:
    """Polar factor of a square matrix without the directions of singular values of at most `rtol` of the largest.

    By scaled Newton steps (Higham 1986), which need a third of the memory of an SVD and no squared condition number.

    Returns
    -------
    factor : float64 tensor, shape (K, K)
    rank : int
    ratio : float
        Smallest kept over largest squared singular value.
    """
    import torch

    count = small.shape[0]
    factor = small.clone()
    left = 3
    for _ in range(NEWTON_STEPS):
        inverse = torch.linalg.inv(factor)
        scale = math.sqrt(float(torch.linalg.norm(inverse)) / float(torch.linalg.norm(factor)))
        factor *= scale / 2
        factor.add_(inverse.T, alpha=1 / (2 * scale))
        del inverse
        # From the first step on all singular values are 1 or more, and fall to 1, in the end quadratically.
        if float(torch.linalg.norm(factor)) ** 2 - count < 1e-3:
            left -= 1
        if not left:
            break
    stretch = factor.T @ small
    stretch = (stretch + stretch.T) / 2
    values, vectors = torch.linalg.eigh(stretch)
    del stretch
    kept = values > rtol * values[-1]
    rank = int(kept.sum())
    vectors = vectors[:, kept]
    return (factor @ vectors) @ vectors.T, rank, float((values[kept][0] / values[-1]) ** 2)


def frame_floats(rows: int, count: int, way: Route) -> int:
    """float64 values that :func:`nearest` takes at its peak beside `x`."""
    if way == "full":
        return 3 * rows * count + 8 * count * count
    return 6 * count * count
