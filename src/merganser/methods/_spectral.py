"""What the spectral methods share: thin singular value decompositions, polar factors, and the tensors they leave."""

from __future__ import annotations

import math
from collections.abc import Sequence

from merganser._torch import torch
from merganser.methods._block import Block
from merganser.operators import rank_tolerance

__all__ = [
    "Triple",
    "join",
    "matrix_delta",
    "polar",
    "range_basis",
    "svd_elements",
    "thin_svd",
]

Triple = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]
"""Left singular vectors in columns, singular values, right singular vectors in rows."""


def thin_svd(matrix: torch.Tensor, dtype: torch.dtype, rank: int | None = None, *, floor: float = 0.0) -> Triple:
    """The leading singular triples of a matrix ``[m, n]``, without those of its null space.

    Vectors of a zero singular value are arbitrary, so they are left out: directions whose singular value is within
    `rank_tolerance` of zero, relative to the largest.

    Values that came from float32 are decomposed by the eigenvectors of the smaller Gram matrix in float64: the
    squares of singular values down to the tolerance lie within float64's precision, and it costs less than half a
    singular value decomposition. Values that came from float64 need the decomposition itself.

    Args:
        matrix: in float64.
        dtype: the type that its values came from.
        rank: the largest number of triples.
        floor: a singular value up to which a direction also counts as null space, where the matrix is what is left of
            larger ones.

    Returns:
        ``U [m, k], s [k]`` in descending order, ``V' [k, n]``, in float64. O(m n min(m, n)).
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    rows = matrix if wide else matrix.mT
    size = len(rows)
    limit = size if rank is None else min(rank, size)
    if not bool(rows.any()):
        return matrix[:, :0], matrix.new_zeros(0), matrix[:0]
    if not bool(rows.isfinite().all()):  # where the user allows that: everything becomes NaN
        nan = matrix.new_full((1,), math.nan)
        return nan.expand(matrix.shape[0], 1), nan, nan.expand(1, matrix.shape[1])
    if dtype == torch.float64:
        right, values, left = torch.linalg.svd(rows.mT, full_matrices=False)
        kept = int((values > max(floor, rank_tolerance(dtype, max(matrix.shape)) * float(values[0]))).sum())
        short, values, long = left.mT[:, :kept][:, :limit], values[:kept][:limit], right.mT[:kept][:limit]
    else:
        short = range_basis(rows @ rows.mT, dtype, floor)[:, :limit]
        long = short.mT @ rows
        values = torch.linalg.vector_norm(long, dim=1)
        long = long.div_(values[:, None])
    return (short, values, long) if wide else (long.mT, values, short.mT)


def range_basis(gram: torch.Tensor, dtype: torch.dtype, floor: float = 0.0) -> torch.Tensor:
    """Orthonormal eigenvectors ``[n, k]`` of the range of ``M M'``, in descending order of their eigenvalues.

    Args:
        gram: ``M M'``, in float64 and finite.
        dtype: the type that the values of M came from.
        floor: a singular value of M up to which a direction also counts as null space. O(n^3).
    """
    squares, vectors = torch.linalg.eigh(gram)
    largest = math.sqrt(max(0.0, float(squares[-1])))
    kept = int((squares > max(floor, rank_tolerance(dtype, 1) * largest) ** 2).sum())
    basis: torch.Tensor = vectors.flip(1)[:, :kept]
    return basis


def polar(matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest partial isometry ``U V'`` of ``M = U S V'`` (orthogonal Procrustes): ``M (M' M)^(-1/2)``.

    Args:
        matrix: ``[m, n]`` in float64.
        dtype: the type that its values came from.

    Returns:
        ``[m, n]``, zero on the null space of the matrix. O(m n min(m, n)).
    """
    left, _, right = thin_svd(matrix, dtype)
    return left @ right


def join(triples: Sequence[Triple]) -> Triple:
    """The triples of several matrices side by side: ``[U_1..U_n], (s_1..s_n), [V_1..V_n]'``."""
    lefts, values, rights = zip(*triples, strict=True)
    return torch.cat(lefts, dim=1), torch.cat(values), torch.cat(rights)


def matrix_delta(block: Block, index: int) -> torch.Tensor:
    """The weighted task vector ``w_i t_i`` of a model as a matrix in float64, a copy of its own."""
    delta = block.delta(index, slot=0).view(block.spec.shape)
    return delta.to(torch.float64, copy=True).mul_(block.weights[index])


def svd_elements(rows: int, columns: int) -> int:
    """Elements of the compute type that `thin_svd` of a matrix and its copy take, their doubles counted twice."""
    small = min(rows, columns)
    return 2 * (2 * rows * columns + 4 * small * small)
