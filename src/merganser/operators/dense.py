"""Full metrics of small blocks: one matrix over all entries, as for the vectors of (IA)^3."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.errors import InputError
from merganser.operators._base import ClosedForm, Operator, check_matrix, spread
from merganser.operators._exact import solve_psd
from merganser.operators._linear import flat_product
from merganser.operators.diagonal import Diagonal
from merganser.operators.gram import add_to_diagonal, shrink
from merganser.operators.identity import Identity

__all__ = ["Dense"]


@dataclass(frozen=True, eq=False)
class Dense(Operator):
    """``C x = M x`` on flattened blocks.

    Attributes:
        matrix: M ``[d, d]``, symmetric positive semi-definite.
        sizes: the shape of a block, of d elements; None for vectors ``[d]``.

    Product O(d^2). Closed form: Cholesky, or a solve in the range of M, O(d^3).
    """

    matrix: torch.Tensor
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_matrix(self.matrix, "the metric of a block", stacked=self.stacked)
        check_sizes(self.sizes, self.matrix.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block."""
        return (self.matrix.shape[-1],) if self.sizes is None else self.sizes

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """M."""
        return (self.matrix,)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``M x``."""
        flat_product(x, self.matrix, out, width=self.numel, add=add, stacked=self.stacked)

    def diagonal(self) -> torch.Tensor:
        """The diagonal of M."""
        diagonal = self.matrix.diagonal(dim1=-2, dim2=-1)
        return diagonal.reshape(*diagonal.shape[:-1], *self.shape)

    def dense(self) -> torch.Tensor:
        """M."""
        return self.matrix

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``M^+ b``."""
        if self.stacked:
            return None
        found = solve_psd(self.matrix, b.reshape(-1, 1))
        return replace(found, x=found.x.view(b.shape).to(b.dtype))

    def scaled(self, factor: float | torch.Tensor) -> Dense:
        """``factor M``."""
        return replace(self, matrix=self.matrix * spread(factor, self.matrix))

    def scale_off_diagonal(self, factor: float) -> Dense:
        """``factor M + (1 - factor) diag(M)``."""
        return replace(self, matrix=shrink(self.matrix, factor))

    def absorb(self, other: Operator) -> Operator | None:
        """Another matrix, a diagonal, or a multiple of the identity."""
        if isinstance(other, Dense):
            return replace(self, matrix=self.matrix + other.matrix)
        if isinstance(other, Identity):
            return replace(self, matrix=add_to_diagonal(self.matrix, other.scale))
        if isinstance(other, Diagonal):
            matrix = self.matrix.clone()
            diagonal = matrix.diagonal(dim1=-2, dim2=-1)
            diagonal.add_(other.entries.reshape(diagonal.shape))
            return replace(self, matrix=matrix)
        return None


def check_sizes(sizes: tuple[int, ...] | None, width: int) -> None:
    """Refuse a block shape that has another number of elements.

    Raises:
        InputError: E0418.
    """
    if sizes is not None and math.prod(sizes) != width:
        raise InputError("E0418", f"a metric over {width} entries does not fit a tensor of shape {list(sizes)}")
