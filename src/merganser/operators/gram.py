"""Gram metrics: the second moment of a linear layer's inputs, the same for every output (RegMean)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.operators._base import ClosedForm, Operator, check_matrix, spread
from merganser.operators._exact import solve_psd
from merganser.operators._linear import product
from merganser.operators.identity import Identity

__all__ = ["Gram"]


@dataclass(frozen=True, eq=False)
class Gram(Operator):
    """``C X = X A``, that is ``A (x) I`` on weights ``X`` ``[out, in]``.

    Attributes:
        a: A ``[in, in]``, symmetric positive semi-definite: the mean of ``a a'`` over the inputs a of the layer.
        rows: out.

    Product O(out in^2). Closed form: Cholesky of A, O(in^3 + out in^2). The sum of Grams is one Gram.
    """

    a: torch.Tensor
    rows: int

    def __post_init__(self) -> None:
        check_matrix(self.a, "a Gram matrix", stacked=self.stacked)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return (self.rows, self.a.shape[-1])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """A."""
        return (self.a,)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``X A``."""
        product(x, self.a, out, add=add)

    def diagonal(self) -> torch.Tensor:
        """The diagonal of A in every row."""
        diagonal = self.a.diagonal(dim1=-2, dim2=-1)
        return diagonal.unsqueeze(-2).expand(*diagonal.shape[:-1], *self.shape)

    def trace(self) -> torch.Tensor:
        """``out tr A``."""
        return self.a.diagonal(dim1=-2, dim2=-1).sum(-1) * self.rows

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``X A = B``: Cholesky, or a solve in the range of A."""
        if self.stacked:
            return None
        found = solve_psd(self.a, b.mT)
        x = found.x.mT.to(b.dtype).contiguous()
        return replace(found, x=x, rank=found.rank * self.rows)

    def scaled(self, factor: float | torch.Tensor) -> Gram:
        """``factor A``."""
        return replace(self, a=self.a * spread(factor, self.a))

    def scale_off_diagonal(self, factor: float) -> Gram:
        """``factor A + (1 - factor) diag(A)``."""
        return replace(self, a=shrink(self.a, factor))

    def absorb(self, other: Operator) -> Operator | None:
        """Another Gram, or a multiple of the identity, which is the Gram ``s I``."""
        if isinstance(other, Gram):
            return replace(self, a=self.a + other.a)
        if isinstance(other, Identity):
            return replace(self, a=add_to_diagonal(self.a, other.scale))
        return None


def shrink(matrix: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor M + (1 - factor) diag(M)``: the diagonal is copied, not computed; M itself if the factor is 1."""
    if factor == 1:
        return matrix
    scaled = matrix * factor
    scaled.diagonal(dim1=-2, dim2=-1).copy_(matrix.diagonal(dim1=-2, dim2=-1))
    return scaled


def add_to_diagonal(matrix: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``M + shift I``, with one shift per matrix of a stack."""
    shifted = matrix.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    return shifted


def mean_eigenvalue(matrix: torch.Tensor) -> torch.Tensor:
    """``tr M / n``, one per matrix of a stack."""
    return matrix.diagonal(dim1=-2, dim2=-1).mean(-1)
