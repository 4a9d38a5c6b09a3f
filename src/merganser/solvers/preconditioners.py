"""Preconditioners: an orthogonal change of basis, and an elementwise division there."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.errors import RecipeError
from merganser.operators import Gram, Identity, Kronecker, Operator, rank_tolerance

__all__ = ["EKron", "Jacobi", "Preconditioner", "Prepared"]

_FLOOR = 1e-8
"""What is added to a preconditioner's diagonal, relative to its mean."""


@dataclass(frozen=True)
class Prepared:
    """A system in the basis in which it is preconditioned elementwise: ``x = V y U'``.

    Attributes:
        operator: the operator on y.
        inverse: what residuals are multiplied with; None for no preconditioning.
        left: V ``[out, out]``, orthogonal; None for the identity.
        right: U ``[in, in]``, orthogonal; None for the identity.
    """

    operator: Operator
    inverse: torch.Tensor | None = None
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """``V' x U``."""
        if self.left is None or self.right is None:
            return x
        return torch.matmul(torch.matmul(self.left.mT, x), self.right)

    def leave(self, y: torch.Tensor) -> torch.Tensor:
        """``V y U'``."""
        if self.left is None or self.right is None:
            return y
        return torch.matmul(torch.matmul(self.left, y), self.right.mT)


class Preconditioner(ABC):
    """How a system is made easier for conjugate gradients."""

    @abstractmethod
    def prepare(self, operator: Operator) -> Prepared:
        """The system in the preconditioner's basis."""


@dataclass(frozen=True)
class Jacobi(Preconditioner):
    """Division by the operator's diagonal. O(d), and an elementwise product per iteration."""

    def prepare(self, operator: Operator) -> Prepared:
        """The operator itself, and the inverse of its diagonal."""
        return Prepared(operator, _inverse(operator, operator.diagonal()))


@dataclass(frozen=True)
class EKron(Preconditioner):
    """Division by the operator's diagonal in the eigenbasis of its nearest Kronecker product (by traces).

    For ``sum_i A_i (x) G_i``: ``sum_i tr(G_i) A_i = U L U'``, ``sum_i tr(A_i) G_i = V K V'``, and in the basis
    ``y = V' x U`` the diagonal is ``sum_i diag(V' G_i V) diag(U' A_i U)'``. All factors are rotated once, so that an
    iteration costs what it costs without preconditioning. It is exact for one term.

    Set-up: two eigendecompositions and two products per factor, O(out^3 + in^3) for each model, and a copy of the
    factors. Directions in which all A_i or all G_i vanish are left alone.

    Raises:
        RecipeError: E0312, for operators that are no sum of Kronecker products, Grams and identities.
    """

    def prepare(self, operator: Operator) -> Prepared:
        """The rotated operator, and the inverse of its diagonal."""
        pairs = [_factors(term) for term in operator.terms]
        inner = functools.reduce(torch.add, (_trace(g) * a for a, g in pairs))
        outer = functools.reduce(torch.add, (_trace(a) * g for a, g in pairs))
        (right, seen_in), (left, seen_out) = _eigenbasis(inner), _eigenbasis(outer)
        rotated = functools.reduce(Operator.__add__, (_rotate(term, left, right) for term in operator.terms))
        seen = seen_out.unsqueeze(-1) & seen_in.unsqueeze(-2)
        return Prepared(rotated, _inverse(rotated, rotated.diagonal(), seen), left, right)


def _inverse(operator: Operator, diagonal: torch.Tensor, seen: torch.Tensor | None = None) -> torch.Tensor:
    """``1 / (D + floor mean(D))`` for each block, and 0 where D is not positive or the direction is not seen."""
    mean = diagonal.flatten(1).mean(-1) if operator.stacked else diagonal.mean()
    mean = mean.view(-1, *[1] * len(operator.shape)) if operator.stacked else mean
    used = diagonal > 0 if seen is None else (diagonal > 0) & seen
    # relative to the mean, so that the inverses of tiny diagonals do not overflow
    relative = torch.where(used, diagonal / torch.where(mean > 0, mean, 1) + _FLOOR, 1)
    return torch.where(used, 1 / relative, 0)


def _factors(term: Operator) -> tuple[torch.Tensor, torch.Tensor]:
    """A and G of a term, with ones on the diagonal for what it leaves alone."""
    if isinstance(term, Kronecker):
        return term.a, term.g
    if isinstance(term, Gram):
        return term.a, _eye(term, term.rows)
    if isinstance(term, Identity) and len(term.shape) == 2:
        scale = term.scale.unsqueeze(-1).unsqueeze(-1) if term.stacked else term.scale
        return scale * _eye(term, term.shape[1]), _eye(term, term.shape[0])
    raise RecipeError(
        "E0312",
        "the eKron preconditioner needs a metric of Kronecker products",
        fix="use the Jacobi preconditioner, or none",
    )


def _eye(term: Operator, size: int) -> torch.Tensor:
    unit = torch.eye(size, dtype=term.dtype, device=term.device)
    return unit.expand(term.count or 0, size, size) if term.stacked else unit


def _trace(matrix: torch.Tensor) -> torch.Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _eigenbasis(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvectors in columns, and which of them span the range."""
    size = matrix.shape[-1]
    scale = _trace(matrix) / size
    values, vectors = torch.linalg.eigh(matrix / torch.where(scale > 0, scale, 1))
    return vectors, values > rank_tolerance(matrix.dtype, size) * values[..., -1:].clamp(min=0)


def _rotate(term: Operator, left: torch.Tensor, right: torch.Tensor) -> Operator:
    if isinstance(term, Kronecker):
        return replace(term, a=_congruent(right, term.a), g=_congruent(left, term.g))
    if isinstance(term, Gram):
        return replace(term, a=_congruent(right, term.a))
    return term


def _congruent(basis: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """``U' M U``, made symmetric again after rounding."""
    rotated = torch.matmul(basis.mT, torch.matmul(matrix, basis))
    return torch.add(rotated, rotated.mT).mul_(0.5)
