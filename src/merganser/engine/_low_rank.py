"""The leading singular triples of a matrix in memory."""

from __future__ import annotations

from merganser._torch import torch
from merganser.kernels import uniforms
from merganser.methods._spectral import Triple, thin_svd

__all__ = ["leading_triples"]

_OVERSAMPLING = 8
_ITERATIONS = 4
_EXACT = 4
_SEED = 0


def leading_triples(matrix: torch.Tensor, rank: int, name: str, *, floor: float = 0.0) -> Triple:
    """The leading singular triples of a matrix, without those of its null space.

    Randomised subspace iteration (Halko, Martinsson, Tropp, 2011, arXiv:0909.4061, algorithm 4.4) with four
    iterations, exact for matrices of that rank or less; a thin decomposition where the rank is no small part of the
    smaller side. The same matrix and name give the same triples.

    Args:
        matrix: ``[m, n]``, float32.
        rank: the largest number k of triples.
        name: keys the random start.
        floor: a singular value up to which a direction counts as null space.

    Returns:
        ``U [m, k], s [k]`` in descending order, ``V' [k, n]``, in float64. O(m n k).
    """
    rows, columns = matrix.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    if _EXACT * width >= min(rows, columns):
        return thin_svd(matrix.double(), torch.float32, rank, floor=floor)
    start = uniforms(_SEED, 0, name, 0, columns * width).view(columns, width).sub_(0.5)
    basis = torch.linalg.qr(matrix @ start.to(matrix.dtype)).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(matrix.mT @ basis).Q
        basis = torch.linalg.qr(matrix @ basis).Q
    inner, values, outer = thin_svd((basis.mT @ matrix).double(), torch.float32, rank, floor=floor)
    return basis.double() @ inner, values, outer
