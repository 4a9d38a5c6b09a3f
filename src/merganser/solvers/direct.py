"""Exact solutions in closed form: elementwise, Cholesky, Woodbury, two Kronecker models, small matrices."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.errors import RecipeError
from merganser.operators import ClosedForm, Identity, Operator
from merganser.operators._base import check_factor
from merganser.operators._exact import solve_psd
from merganser.solvers._base import Solution, finish, require_damping, start
from merganser.solvers.two_model import two_model_form

__all__ = ["Direct"]


@dataclass(frozen=True)
class Direct:
    """``x = x0 + (A + ridge m(A) I)^+ (b - A x0)`` in closed form, m being the mean eigenvalue.

    A singular system is solved in its range; elsewhere x0 is kept. A ridge pulls towards x0 (damping, which is part of
    the metrics and of b, pulls towards the models instead). Factorisations are in float64.

    =========================================  =======================================================
    identity, diagonal                         elementwise
    Gram, dense                                Cholesky, or the eigenvectors of the range
    low rank, alone or with a diagonal         by the matrix of its rows; Woodbury
    Kronecker, alone or with a ridge           eigendecompositions of both factors
    two Kronecker products                     two generalised eigenproblems (`TwoModel`)
    any other of at most `dense_limit` entries its matrix is written out
    =========================================  =======================================================

    Attributes:
        ridge: added to the diagonal, relative to the mean eigenvalue.
        undamped: allow Kronecker metrics without damping.
        dense_limit: the largest number of unknowns for which a matrix is written out.

    Raises:
        RecipeError: E0306 (ridge), E0312 (no damping, or no closed form).
    """

    ridge: float = 0.0
    undamped: bool = False
    dense_limit: int = 2048

    def __post_init__(self) -> None:
        check_factor(self.ridge, "ridge")

    def solve(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> Solution:
        """Solve for one block; the arguments are those of `Solver.solve`."""
        began = time.perf_counter()
        require_damping(operator, "an exact solution", undamped=self.undamped or self.ridge > 0)
        b, x0, r0 = start(operator, b, x0, r0, stacked=False)
        if not bool(r0.isfinite().all()):
            return finish(operator, b, x0, r0, None, began)
        shifted = operator
        if self.ridge:
            shifted = operator + Identity(self.ridge * operator.trace() / operator.numel, operator.shape)
        found = shifted.closed_form(r0) or two_model_form(shifted, r0) or self._written_out(shifted, r0)
        return finish(operator, b, x0, r0, found, began, ridge=self.ridge)

    def solve_stack(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> tuple[Solution, ...]:
        """Solve for every block of a stack, one after the other."""
        b, x0, r0 = start(operator, b, x0, r0, stacked=True)
        return tuple(self.solve(operator[i], b[i], x0=x0[i], r0=r0[i]) for i in range(len(b)))

    def _written_out(self, operator: Operator, r0: torch.Tensor) -> ClosedForm:
        if operator.numel > self.dense_limit:
            raise RecipeError(
                "E0312",
                f"there is no closed form for this metric, and {operator.numel} unknowns are too many for a matrix",
                fix="use conjugate gradients, preconditioned and damped",
            )
        found = solve_psd(operator.to(torch.float64).dense(), r0.reshape(-1, 1), operator.dtype)
        return replace(found, x=found.x.view(r0.shape).to(r0.dtype))
