"""Solutions of symmetric positive semi-definite systems in float64: Cholesky, else the eigenvectors of the range."""

from __future__ import annotations

from merganser._torch import torch
from merganser.operators._base import ClosedForm

__all__ = ["eigenbasis", "largest_eigenvalue", "rank_tolerance", "smallest_eigenvalue", "solve_psd"]

_STEPS = 8
_VECTORS = 4


def rank_tolerance(dtype: torch.dtype, size: int) -> float:
    """The eigenvalue, relative to the largest, below which a direction counts as null space.

    Statistics of type `dtype` carry rounding errors of a few units of their last digit relative to the largest
    eigenvalue; float64 arithmetic on n x n matrices adds n units of its own.
    """
    return max(4 * torch.finfo(dtype).eps, size * torch.finfo(torch.float64).eps)


def eigenbasis(
    matrix: torch.Tensor, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Eigenvalues, eigenvectors and which of them span the range, of a matrix ``[n, n]``, in float64.

    Args:
        matrix: symmetric positive semi-definite.
        dtype: the type of what it was computed from, by default its own.

    Returns:
        Values ``[n]`` (0 outside the range), vectors ``[n, n]`` in columns, and a mask ``[n]``. O(n^3).
    """
    values, vectors = torch.linalg.eigh(matrix.double())
    tolerance = rank_tolerance(dtype or matrix.dtype, matrix.shape[-1])
    kept = values > tolerance * values[..., -1:].clamp(min=0)
    return values * kept, vectors, kept


def largest_eigenvalue(matrix: torch.Tensor) -> float:
    """An estimate of the largest eigenvalue of M ``[n, n]``, never too large, by iteration on a few vectors. O(n^2)."""
    vectors = _vectors(matrix)
    for _ in range(_STEPS):
        vectors = torch.linalg.qr(matrix @ vectors).Q
    return float(torch.linalg.eigvalsh(vectors.mT @ matrix @ vectors)[-1])


def _vectors(matrix: torch.Tensor) -> torch.Tensor:
    """Any few vectors, the same every time."""
    size = len(matrix)
    phases = torch.arange(1, size * min(size, _VECTORS) + 1, dtype=matrix.dtype, device=matrix.device)
    return torch.sin(phases * phases).view(size, -1)


def smallest_eigenvalue(factor: torch.Tensor) -> float:
    """An estimate of the smallest eigenvalue of ``L L'``, never too small, by inverse iteration on a few vectors.

    Args:
        factor: L, lower triangular ``[n, n]``, of a positive definite matrix.

    O(n^2).
    """
    vectors = _vectors(factor)
    for _ in range(_STEPS):
        vectors = torch.linalg.qr(torch.cholesky_solve(vectors, factor)).Q
    return float(torch.linalg.svdvals(factor.mT @ vectors)[-1].square())


def solve_psd(
    matrix: torch.Tensor, b: torch.Tensor, dtype: torch.dtype | None = None, *, cutoff: float | None = None
) -> ClosedForm:
    """``M^+ b`` for a symmetric positive semi-definite M ``[n, n]`` and ``b`` ``[n, k]``.

    Cholesky where M is safely positive definite, which its pivots tell; otherwise a solve in the range of M, which
    leaves out directions whose eigenvalue is below `rank_tolerance` of the largest.

    Args:
        matrix: M.
        b: right-hand sides in columns.
        dtype: the type of what M was computed from, by default its own.
        cutoff: the eigenvalue, relative to the largest, below which a direction is left out, instead of
            `rank_tolerance`. Cholesky is used where an estimate of the smallest eigenvalue is well above it.

    Returns:
        The solution in float64, with the rank that was used and the extreme eigenvalues. O(n^3 + n^2 k).
    """
    wide = matrix.double()
    factor, failed = torch.linalg.cholesky_ex(wide)
    if not int(failed) and len(wide):
        limit = rank_tolerance(dtype or matrix.dtype, len(wide)) if cutoff is None else 2 * cutoff
        smallest = smallest_eigenvalue(factor)
        lowest = float(factor.diagonal().square().min()) if cutoff is None else smallest
        highest = float(wide.diagonal().max() if cutoff is None else torch.linalg.matrix_norm(wide, 1))
        if lowest > limit * highest:
            return ClosedForm(torch.cholesky_solve(b.double(), factor), len(wide), smallest, largest_eigenvalue(wide))
    values, vectors, kept = eigenbasis(matrix, dtype)
    if cutoff is not None:
        kept = values > cutoff * values[-1:].clamp(min=0)
    values, vectors = values[kept], vectors[:, kept]
    x = vectors @ ((vectors.mT @ b.double()) / values[:, None])
    return ClosedForm(x, len(values), *((float(values[0]), float(values[-1])) if len(values) else ()))
