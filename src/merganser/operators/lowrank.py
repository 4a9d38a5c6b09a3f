"""Low-rank metrics: one row per example, such as its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.operators._base import ClosedForm, Operator, check_matrix, spread
from merganser.operators._exact import eigenbasis, solve_psd
from merganser.operators._linear import flat_product
from merganser.operators.dense import check_sizes
from merganser.operators.diagonal import Diagonal

__all__ = ["LowRank"]


@dataclass(frozen=True, eq=False)
class LowRank(Operator):
    """``C x = Z' Z x`` on flattened blocks.

    Attributes:
        rows: Z ``[r, d]``. For a mean over r examples, divide their gradients by the root of r.
        sizes: the shape of a block, of d elements; None for vectors ``[d]``.

    Product O(r d). The closed form solves in the range of Z', by the r x r matrix ``Z Z'``: O(r^2 d + r^3). The sum of
    two is one with the rows of both; with a positive diagonal see `woodbury`.
    """

    rows: torch.Tensor
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_matrix(self.rows, "the rows of a low-rank metric", stacked=self.stacked, square=False)
        check_sizes(self.sizes, self.rows.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return (self.rows.shape[-1],) if self.sizes is None else self.sizes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Z."""
        return (self.rows,)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``Z' (Z x)``; the r coefficients are allocated."""
        lead = (self.rows.shape[0], -1) if self.stacked else (-1,)
        coefficients = torch.matmul(x.view(*lead, self.numel), self.rows.mT)
        flat_product(coefficients, self.rows, out, width=self.rows.shape[-2], add=add, stacked=self.stacked)

    def diagonal(self) -> torch.Tensor:
        """The squared norms of the columns of Z."""
        norms: torch.Tensor = torch.linalg.vector_norm(self.rows, dim=-2)
        return norms.square_().view(*norms.shape[:-1], *self.shape)

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``Z' (Z Z')^+ (Z Z')^+ Z b``."""
        if self.stacked:
            return None
        wide, flat = self.rows.double(), b.reshape(-1).double()
        if len(wide) > self.numel:
            found = solve_psd(wide.mT @ wide, flat[:, None], self.dtype)
            return replace(found, x=found.x.view(b.shape).to(b.dtype))
        values, vectors, kept = eigenbasis(wide @ wide.mT, self.dtype)
        values, vectors = values[kept], vectors[:, kept]
        coefficients = vectors @ ((vectors.mT @ (wide @ flat)) / values.square())
        extremes = (float(values[0]), float(values[-1])) if len(values) else (None, None)
        return ClosedForm((wide.mT @ coefficients).view(b.shape).to(b.dtype), len(values), *extremes)

    def woodbury(self, b: torch.Tensor, diagonal: torch.Tensor) -> ClosedForm:
        """``(D + Z' Z)^-1 b = D^-1 b - D^-1 Z' (I + Z D^-1 Z')^-1 Z D^-1 b`` with a positive diagonal D.

        O(r^2 d + r^3), in float64. Source: Woodbury, Inverting modified matrices, 1950.
        """
        inverse = 1 / diagonal.reshape(-1).double()
        wide = self.rows.double()
        scaled = inverse * b.reshape(-1).double()
        inner = (wide * inverse) @ wide.mT
        inner.diagonal().add_(1)
        coefficients = solve_psd(inner, (wide @ scaled)[:, None]).x
        x = scaled - inverse * (wide.mT @ coefficients).view(-1)
        return ClosedForm(x.view(b.shape).to(b.dtype), self.numel)

    def scaled(self, factor: float | torch.Tensor) -> LowRank:
        """``sqrt(factor) Z``."""
        root = factor.sqrt() if isinstance(factor, torch.Tensor) else factor**0.5
        return replace(self, rows=self.rows * spread(root, self.rows))

    def scale_off_diagonal(self, factor: float) -> Operator:
        """``factor Z'Z`` and a diagonal."""
        if factor == 1:
            return self
        return self.scaled(factor) + Diagonal(self.diagonal() * (1 - factor), stacked=self.stacked)

    def absorb(self, other: Operator) -> Operator | None:
        """The rows of another one."""
        if isinstance(other, LowRank):
            return replace(self, rows=torch.cat((self.rows, other.rows), dim=-2))
        return None
