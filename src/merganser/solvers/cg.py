"""Matrix conjugate gradients, preconditioned or not, with the whole path in one solve."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from merganser._torch import torch
from merganser.errors import RecipeError
from merganser.operators import Operator
from merganser.solvers._base import Solution, Status, require_damping, scalar_dtype, start
from merganser.solvers._iteration import Trace, iterate
from merganser.solvers._lanczos import extreme_eigenvalues
from merganser.solvers.preconditioners import Preconditioner, Prepared

__all__ = ["CG"]


@dataclass(frozen=True)
class CG:
    """Conjugate gradients on ``A d = b - A x0``, ``x = x0 + d``; k iterations minimise over a space of dimension k.

    The iterates are those of conjugate gradients from x0, but the correction is accumulated by itself, so that small
    changes to large weights are not rounded at the weights' magnitude, and what A does not see of x0 stays bit by bit.
    Internally each block's residual is scaled by a power of two, so that the scale of the metrics changes nothing.

    A block stops when ``||b - A x|| < tolerance ||b||``; there is no absolute test. Its iterates are nested: one solve
    with ``keep=(5, 10, 20)`` returns what three solves would.

    Attributes:
        max_iterations: the most iterations.
        tolerance: relative to ``||b||``; 0 for a fixed number of iterations.
        keep: iterations whose tensors are returned; each costs a tensor of the block's size.
        preconditioner: `EKron`, `Jacobi` or None.
        dtype: the type of all arithmetic; by default the operator's.
        undamped: allow a preconditioner on Kronecker metrics without damping.

    Raises:
        RecipeError: E0306 (options), E0312 (preconditioning without damping).

    Complexity: a product per iteration, one at the end for the true residual, and eight tensors of the block's size.

    Source: Hestenes and Stiefel, 1952; as a merge Tam, Bansal, Raffel, 2024, arXiv:2312.04339.
    """

    max_iterations: int = 100
    tolerance: float = 1e-5
    keep: tuple[int, ...] = ()
    preconditioner: Preconditioner | None = None
    dtype: torch.dtype | None = None
    undamped: bool = False

    def __post_init__(self) -> None:
        if self.max_iterations < 0:
            raise RecipeError("E0306", f"the number of iterations must be at least 0, not {self.max_iterations}")
        if not 0 <= self.tolerance < float("inf"):
            raise RecipeError("E0306", f"the tolerance must be at least 0 and finite, not {self.tolerance}")
        if any(not 0 <= step <= self.max_iterations for step in self.keep):
            raise RecipeError("E0306", f"iterations to keep lie between 0 and {self.max_iterations}, not {self.keep}")

    def solve(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> Solution:
        """Solve for one block; the arguments are those of `Solver.solve`."""
        return self._solve(operator, b, x0, r0, stacked=False)[0]

    def solve_stack(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> tuple[Solution, ...]:
        """Solve for every block of a stack, in one batched iteration in which finished blocks stand still."""
        return self._solve(operator, b, x0, r0, stacked=True)

    def _solve(
        self,
        operator: Operator,
        b: torch.Tensor,
        x0: torch.Tensor | None,
        r0: torch.Tensor | None,
        *,
        stacked: bool,
    ) -> tuple[Solution, ...]:
        began = time.perf_counter()
        operator = operator.to(self.dtype)
        b, x0, r0 = start(operator, b, x0, r0, stacked=stacked)
        system = Prepared(operator)
        if self.preconditioner is not None:
            require_damping(operator, "a preconditioner", undamped=self.undamped)
            system = self.preconditioner.prepare(operator)

        scale = _power_of_two(r0, stacked=stacked)
        spread = scale.view(-1, *[1] * len(operator.shape)) if stacked else scale
        initial = system.enter(r0 * spread)
        wide = scale.to(scalar_dtype(operator.device)).view(-1)
        unit = _norms(b, stacked=stacked) * wide
        unit = torch.where(unit > 0, unit, _norms(initial, stacked=stacked))
        trace = iterate(
            system.operator,
            initial.clone(),
            self.tolerance * unit,
            inverse=system.inverse,
            max_iterations=self.max_iterations,
            keep=frozenset(self.keep),
        )
        x, valid = _corrected(x0, system.leave(trace.y) / spread, stacked=stacked)
        left = initial - system.operator.matvec(trace.y)
        residuals = torch.where(valid, _norms(left, stacked=stacked), trace.norms[0])
        unit = torch.where(unit > 0, unit, 1)
        steps = {k: _corrected(x0, system.leave(y) / spread, stacked=stacked)[0] for k, y in trace.kept.items()}
        iterates = {k: steps.get(k, x) for k in self.keep}
        trace = replace(trace, norms=trace.norms / unit, gains=trace.gains / wide**2, broken=trace.broken | ~valid)
        return _solutions(trace, residuals / unit, x, iterates, began, stacked=stacked)


def _solutions(
    trace: Trace,
    residuals: torch.Tensor,
    x: torch.Tensor,
    iterates: dict[int, torch.Tensor],
    began: float,
    *,
    stacked: bool,
) -> tuple[Solution, ...]:
    iterations, ended = trace.iterations.tolist(), residuals.tolist()
    converged, broken = trace.converged.tolist(), trace.broken.tolist()
    norms, alphas, betas = trace.norms.T.tolist(), trace.alphas.T.tolist(), trace.betas.T.tolist()
    objectives = trace.gains.cumsum(0).neg().T.tolist()
    seconds = (time.perf_counter() - began) / max(1, len(ended))
    solutions = []
    for index, count in enumerate(iterations):
        spectrum = extreme_eigenvalues(alphas[index][:count], betas[index][:count])
        status = Status.CONVERGED if converged[index] else Status.MAX_ITERATIONS
        solutions.append(
            Solution(
                x=x[index] if stacked else x,
                status=Status.BREAKDOWN if broken[index] else status,
                iterations=count,
                residual=ended[index],
                history=tuple(norms[index][: count + 1]),
                objective=(0.0, *objectives[index][:count]),
                iterates={k: tensor[index] if stacked else tensor for k, tensor in iterates.items()},
                smallest=spectrum[0] if spectrum else None,
                largest=spectrum[1] if spectrum else None,
                seconds=seconds,
            )
        )
    return tuple(solutions)


def _norms(x: torch.Tensor, *, stacked: bool) -> torch.Tensor:
    """The norm of every block, ``[n]``, accumulated in the scalars' type."""
    flat = x.reshape(len(x) if stacked else 1, -1)
    norms: torch.Tensor = torch.linalg.vector_norm(flat, dim=-1, dtype=scalar_dtype(x.device))
    return norms


def _power_of_two(x: torch.Tensor, *, stacked: bool) -> torch.Tensor:
    """The power of two that brings the largest entry of each block near 1; 1 for blocks of zeros."""
    largest = x.abs().flatten(1).amax(-1) if stacked else x.abs().amax()
    usable = (largest > 0) & largest.isfinite()
    exponent = torch.frexp(torch.where(usable, largest, 1)).exponent.clamp(-100, 100)
    return torch.ldexp(torch.ones_like(largest), -exponent)


def _corrected(x0: torch.Tensor, correction: torch.Tensor, *, stacked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``x0 + correction`` where that is finite, else x0; and for which blocks, ``[n]``, it is."""
    x = x0 + correction
    finite = x.isfinite()
    valid = finite.flatten(1).all(-1) if stacked else finite.all()
    chosen = valid.view(-1, *[1] * (x.dim() - 1)) if stacked else valid
    return torch.where(chosen, x, x0), valid.view(-1)
