"""Kronecker-factored metrics (K-FAC): inputs times output gradients of a linear layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.errors import RecipeError
from merganser.operators._base import ClosedForm, Operator, check_factor, check_matrix, reciprocal, spread
from merganser.operators._exact import eigenbasis
from merganser.operators._linear import product
from merganser.operators.gram import add_to_diagonal, mean_eigenvalue, shrink

__all__ = ["Kronecker"]


@dataclass(frozen=True, eq=False)
class Kronecker(Operator):
    """``C X = G X A``, that is ``A (x) G`` on weights ``X`` ``[out, in]``.

    Attributes:
        a: A ``[in, in]``, the second moment of the layer's inputs.
        g: G ``[out, out]``, the second moment of the gradients of its outputs.
        damping: what A and G were damped by, relative to their mean eigenvalues; 0 for not at all.

    Product O(out in (out + in)). Closed form by two eigendecompositions, O(out^3 + in^3). A sum of Kronecker products
    is none; it stays a list of terms, and costs the sum of their products.

    Source: Martens and Grosse, Optimizing neural networks with Kronecker-factored approximate curvature, 2015,
    arXiv:1503.05671; as a merging metric Tam, Bansal, Raffel, 2024, arXiv:2312.04339.
    """

    a: torch.Tensor
    g: torch.Tensor
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_matrix(self.a, "the input factor of a Kronecker product", stacked=self.stacked)
        check_matrix(self.g, "the output factor of a Kronecker product", stacked=self.stacked)

    @property
    def shape(self) -> tuple[int, ...]:
        """``(out, in)``."""
        return (self.g.shape[-1], self.a.shape[-1])

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """A and G."""
        return (self.a, self.g)

    @property
    def undamped(self) -> bool:
        """Whether it has no damping."""
        return self.damping == 0

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        """``G X A``."""
        product(self.g, x, work, add=False)
        product(work, self.a, out, add=add)

    def diagonal(self) -> torch.Tensor:
        """``G_oo A_ii``."""
        outer = self.g.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        return outer * self.a.diagonal(dim1=-2, dim2=-1).unsqueeze(-2)

    def trace(self) -> torch.Tensor:
        """``tr A tr G``."""
        return mean_eigenvalue(self.a) * mean_eigenvalue(self.g) * self.numel

    def closed_form(self, b: torch.Tensor) -> ClosedForm | None:
        """``G^+ B A^+``, in the eigenbases of the factors."""
        return None if self.stacked else self.closed_form_shifted(b, None)

    def closed_form_shifted(self, b: torch.Tensor, shift: torch.Tensor | None) -> ClosedForm:
        """``(A (x) G + shift I)^+ b``, in the eigenbases of the factors. A shift counts as positive definite."""
        inner, right, seen_in = eigenbasis(self.a)
        outer, left, seen_out = eigenbasis(self.g)
        values = outer[:, None] * inner
        kept = seen_out[:, None] & seen_in
        if shift is not None:
            values, kept = values + shift.double(), torch.ones_like(kept)
        rotated = left.mT @ b.double() @ right
        rotated = torch.where(kept, rotated / torch.where(kept, values, 1), 0)
        solved = values[kept]
        extremes = (float(solved.min()), float(solved.max())) if solved.numel() else (None, None)
        return ClosedForm((left @ rotated @ right.mT).to(b.dtype), int(kept.sum()), *extremes)

    def scaled(self, factor: float | torch.Tensor) -> Kronecker:
        """The factor goes to the smaller matrix; the other one is shared."""
        if self.a.shape[-1] <= self.g.shape[-1]:
            return replace(self, a=self.a * spread(factor, self.a))
        return replace(self, g=self.g * spread(factor, self.g))

    def scale_off_diagonal(self, factor: float) -> Kronecker:
        """S of both factors, as in MaTS."""
        return replace(self, a=shrink(self.a, factor), g=shrink(self.g, factor))

    def normalized(self) -> Kronecker:
        """Each factor divided by its mean eigenvalue."""
        inner, outer = (spread(reciprocal(mean_eigenvalue(m)), m) for m in (self.a, self.g))
        return replace(self, a=self.a * inner, g=self.g * outer)

    def damped(self, ratio: float, *, side: str = "both") -> Kronecker:
        """``(A + r m(A) I) (x) (G + r m(G) I)`` with the mean eigenvalues m, or of G alone (side ``"output"``).

        The product stays a Kronecker product, and is used in A and b of the system alike: directions that a task says
        nothing about pull gently towards that task's weights.

        Raises:
            RecipeError: E0306, for an unknown side or an unusable ratio.
        """
        check_factor(ratio, "damping")
        if side not in ("both", "output"):
            raise RecipeError("E0306", f"damping is on the side `both` or `output`, not `{side}`")
        if not ratio:
            return self
        inner = add_to_diagonal(self.a, ratio * mean_eigenvalue(self.a)) if side == "both" else self.a
        outer = add_to_diagonal(self.g, ratio * mean_eigenvalue(self.g))
        return replace(self, a=inner, g=outer, damping=self.damping + ratio)
