"""The exact merge of two Kronecker-factored models, by two generalised eigenproblems."""

from __future__ import annotations

import time
from dataclasses import dataclass

from merganser._torch import torch
from merganser.errors import RecipeError
from merganser.operators import ClosedForm, Gram, Identity, Kronecker, Operator, rank_tolerance
from merganser.operators._exact import eigenbasis
from merganser.solvers._base import Solution, finish, require_damping, start

__all__ = ["TwoModel", "two_model_form"]


@dataclass(frozen=True)
class TwoModel:
    """``G_1 D A_1 + G_2 D A_2 = R``, ``R = b - A x0``, ``x = x0 + D``.

    With ``P' (A_1 + A_2) P = I``, ``P' A_k P = diag(a_k)`` and ``Q' (G_1 + G_2) Q = I``, ``Q' G_k Q = diag(b_k)``::

        D = Q [(Q' R P) / (b_1 a_1' + b_2 a_2')] P'

    Attributes:
        undamped: allow metrics without damping. A singular system is then solved in its range; x0 is kept elsewhere.

    Raises:
        RecipeError: E0312, without damping or for other than two terms ``A (x) G``, ``A (x) I`` or ``s I``.

    Complexity: O(out^3 + in^3) in float64, at the cost of some ten products of plain conjugate gradients.

    Source: the simultaneous diagonalisation of Golub and Van Loan, Matrix Computations, section 8.7, for both factors.
    """

    undamped: bool = False

    def solve(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> Solution:
        """Solve for one block; the arguments are those of `Solver.solve`."""
        began = time.perf_counter()
        require_damping(operator, "the exact solution for two models", undamped=self.undamped)
        b, x0, r0 = start(operator, b, x0, r0, stacked=False)
        found = two_model_form(operator, r0) if bool(r0.isfinite().all()) else None
        if found is None and _pairs(operator) is None:
            raise RecipeError(
                "E0312",
                f"the solver for two models does not fit a metric of {len(operator.terms)} terms",
                fix="use conjugate gradients, preconditioned and damped",
            )
        return finish(operator, b, x0, r0, found, began)

    def solve_stack(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> tuple[Solution, ...]:
        """Solve for every block of a stack, one after the other."""
        b, x0, r0 = start(operator, b, x0, r0, stacked=True)
        return tuple(self.solve(operator[i], b[i], x0=x0[i], r0=r0[i]) for i in range(len(b)))


def two_model_form(operator: Operator, r: torch.Tensor) -> ClosedForm | None:
    """``C^+ r`` for a sum of two Kronecker products, Grams or identities, or None for any other operator."""
    pairs = _pairs(operator)
    if pairs is None:
        return None
    (a_1, g_1), (a_2, g_2) = (_balanced(a, g) for a, g in pairs)
    right, in_1, in_2 = _pencil(a_1, a_2, operator.dtype)
    left, out_1, out_2 = _pencil(g_1, g_2, operator.dtype)
    tolerance = rank_tolerance(operator.dtype, max(operator.shape))
    unseen = [
        (out_2 <= tolerance, in_1 <= tolerance),
        (out_1 <= tolerance, in_2 <= tolerance),
    ]
    values = torch.outer(out_1, in_1) + torch.outer(out_2, in_2)
    null = torch.zeros_like(values, dtype=torch.bool)
    for rows, columns in unseen:
        null |= rows[:, None] & columns
    inner = left.mT @ r.double() @ right
    inner = torch.where(null, 0, inner / torch.where(null, 1, values))
    correction = left @ inner @ right.mT
    if bool(null.any()):
        spans = [(_orthonormal(left[:, rows]), _orthonormal(right[:, columns])) for rows, columns in unseen]
        correction = _without(correction, *spans)
    return ClosedForm(correction.to(r.dtype), int((~null).sum()))


def _pairs(operator: Operator) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """The factors A and G of both terms, in float64."""
    if operator.stacked or len(operator.terms) != 2 or len(operator.shape) != 2:
        return None
    pairs = []
    for term in operator.terms:
        if isinstance(term, Kronecker):
            a, g = term.a.double(), term.g.double()
        elif isinstance(term, Gram):
            a, g = term.a.double(), _eye(term, 0)
        elif isinstance(term, Identity):
            a, g = term.scale.double() * _eye(term, 1), _eye(term, 0)
        else:
            return None
        pairs.append((a, g))
    return pairs


def _eye(term: Operator, side: int) -> torch.Tensor:
    return torch.eye(term.shape[side], dtype=torch.float64, device=term.device)


def _balanced(a: torch.Tensor, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same product with a first factor of mean eigenvalue 1, so that both models' first factors weigh alike."""
    mean = a.diagonal().mean()
    return (a / mean, g * mean) if float(mean) > 0 else (a, g)


def _pencil(
    one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P ``[n, k]`` with ``P' (M_1 + M_2) P = I`` on the sum's range, and the diagonals of each ``P' M_k P``."""
    values, vectors, kept = eigenbasis(one + other, dtype)
    white = vectors[:, kept] / values[kept].sqrt()
    _, turn = torch.linalg.eigh(white.mT @ one @ white)
    both = white @ turn
    first, second = ((both * (matrix @ both)).sum(0).clamp(min=0) for matrix in (one, other))
    return both, first, second


def _orthonormal(columns: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(columns).Q
    return basis


def _without(
    x: torch.Tensor, one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """X without its part in the sum of two spaces ``{E Z F'}``, given by orthonormal E ``[out, k]`` and F ``[in, l]``.

    In the bases in which ``E_1' E_2`` and ``F_1' F_2`` are diagonal, with s and t on the diagonals, the best
    ``E_1 Z_1 F_1' + E_2 Z_2 F_2'`` satisfies ``Z_1 + s t' Z_2 = E_1' X F_1`` and ``s t' Z_1 + Z_2 = E_2' X F_2``.
    """
    e_1, e_2, s = _principal(one[0], other[0])
    f_1, f_2, t = _principal(one[1], other[1])
    first, second = e_1.mT @ x @ f_1, e_2.mT @ x @ f_2
    cosines = torch.outer(s, t)
    shared_1, shared_2 = (z[: len(s), : len(t)] for z in (first, second))
    determinant = (1 - cosines.square()).clamp(min=torch.finfo(x.dtype).eps)
    shared_1_new = (shared_1 - cosines * shared_2) / determinant
    shared_2_new = (shared_2 - cosines * shared_1) / determinant
    shared_1.copy_(shared_1_new)
    shared_2.copy_(shared_2_new)
    return x - e_1 @ first @ f_1.mT - e_2 @ second @ f_2.mT


def _principal(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bases of the same two spaces whose inner products are diagonal, and the diagonal: cosines of principal angles."""
    u, s, vh = torch.linalg.svd(one.mT @ other, full_matrices=True)
    return one @ u, other @ vh.mT, s
