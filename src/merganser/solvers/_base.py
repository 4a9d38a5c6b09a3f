"""What a solver returns, and what all of them share."""

from __future__ import annotations

import enum
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from merganser._torch import torch
from merganser.errors import InputError, RecipeError
from merganser.operators import ClosedForm, Operator

__all__ = ["Solution", "Solver", "Status", "finish", "require_damping", "scalar_dtype", "start"]


class Status(str, enum.Enum):
    """How a solve ended."""

    CONVERGED = "converged"
    MAX_ITERATIONS = "max_iterations"
    BREAKDOWN = "breakdown"
    EXACT = "exact"
    SINGULAR = "singular"


_ADVICE = {
    Status.CONVERGED: "the residual is below the tolerance",
    Status.MAX_ITERATIONS: "stopped early, which regularises; more iterations, or a preconditioner with damping, come "
    "closer to the optimum",
    Status.BREAKDOWN: "the metric is not positive semi-definite to working precision, or not finite: check the "
    "statistics, compute in float64, or add damping",
    Status.EXACT: "solved in closed form",
    Status.SINGULAR: "solved in closed form where the metrics see anything; elsewhere the initialisation is kept",
}


@dataclass(frozen=True)
class Solution:
    """The result of a solve for one block, and how it came about.

    Attributes:
        x: the merged tensor.
        status: how the solve ended.
        iterations: the number of iterations that changed x.
        residual: ``||b - A x|| / ||b||``, recomputed from the correction (relative to ``||b - A x0||`` for b = 0).
        history: relative residual norms at 0, 1, ... `iterations`, as the iteration updates them.
        objective: ``<d, A d> / 2 - <d, b - A x0>`` with d = x - x0, at the same iterations; none of a closed form.
        iterates: the tensors after the iterations asked for; after the end they are x.
        smallest: estimate of the smallest eigenvalue that the iteration met (of the preconditioned operator, if it
            was), from the Lanczos matrix of its coefficients, or of a closed form; None if unknown. Never too small.
        largest: the same for the largest; never too large.
        seconds: wall time of the solve; of a stack, divided by its blocks.
        ridge: what was added to the diagonal, relative to the mean eigenvalue.
        rank: the number of directions that a closed form solved for.
    """

    x: torch.Tensor
    status: Status
    iterations: int
    residual: float
    history: tuple[float, ...]
    objective: tuple[float, ...] = ()
    iterates: Mapping[int, torch.Tensor] = field(default_factory=dict)
    smallest: float | None = None
    largest: float | None = None
    seconds: float = 0.0
    ridge: float = 0.0
    rank: int | None = None

    @property
    def advice(self) -> str:
        """What the status means, and what to do about it."""
        return _ADVICE[self.status]

    @property
    def condition(self) -> float | None:
        """A lower bound of the condition number on the directions that the iteration met."""
        if self.smallest is None or self.largest is None or self.smallest <= 0:
            return None
        return self.largest / self.smallest


class Solver(Protocol):
    """Solves ``A x = b`` for one block, or for each block of a stack."""

    def solve(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> Solution:
        """``x = x0 + A^-1 (b - A x0)``, or as near to it as the solver goes.

        Args:
            operator: A, not stacked.
            b: the right-hand side, of the operator's shape.
            x0: the initialisation; by default zeros.
            r0: ``b - A x0``, if it is known more accurately than by computing it (`normal_equations` does).
        """

    def solve_stack(
        self, operator: Operator, b: torch.Tensor, *, x0: torch.Tensor | None = None, r0: torch.Tensor | None = None
    ) -> tuple[Solution, ...]:
        """The same for every block of a stacked operator; tensors are ``[n, *shape]``."""


def scalar_dtype(device: torch.device) -> torch.dtype:
    """The type of sums and coefficients: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def start(
    operator: Operator, b: torch.Tensor, x0: torch.Tensor | None, r0: torch.Tensor | None, *, stacked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``b``, ``x0`` and ``r0`` in the operator's type, the latter two computed where they are not given.

    Raises:
        InputError: E0418, for tensors that the operator does not act on.
    """
    if operator.stacked != stacked:
        raise InputError("E0418", f"the metric is {'not ' if stacked else ''}stacked", fix="use solve or solve_stack")
    wanted = (*((operator.count or 0,) if stacked else ()), *operator.shape)
    for tensor in (b, x0, r0):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise InputError(
                "E0418", f"a metric of tensors of shape {list(wanted)} does not fit one of {list(tensor.shape)}"
            )
    dtype, device = operator.dtype, operator.device
    b = b.to(dtype=dtype, device=device)
    if x0 is None:
        x0 = torch.zeros_like(b)
    else:
        x0 = x0.to(dtype=dtype, device=device)
        r0 = torch.sub(b, operator.matvec(x0)) if r0 is None else r0
    return b, x0, (b if r0 is None else r0.to(dtype=dtype, device=device)).contiguous()


def require_damping(operator: Operator, what: str, *, undamped: bool) -> None:
    """Refuse to come close to the optimum of an undamped Kronecker system, unless that was asked for.

    Raises:
        RecipeError: E0312.
    """
    if operator.undamped and not undamped:
        raise RecipeError(
            "E0312",
            f"{what} needs damping",
            why="the optimum of an undamped K-FAC system can be far worse than the early iterates of plain conjugate "
            "gradients, which are all that regularises it; the nearer the solver comes, the worse the merge",
            fix="damp the metrics (damping=0.1), or set undamped=true to solve the system as it is",
        )


def finish(
    operator: Operator,
    b: torch.Tensor,
    x0: torch.Tensor,
    r0: torch.Tensor,
    found: ClosedForm | None,
    began: float,
    *,
    ridge: float = 0.0,
) -> Solution:
    """The solution with a correction, or x0 and a breakdown where there is none that is finite."""
    before = _norm(r0)
    unit = _norm(b) or before or 1.0
    x = x0 if found is None else x0 + found.x
    if found is None or not bool(x.isfinite().all()):
        return Solution(
            x0, Status.BREAKDOWN, 0, before / unit, (before / unit,), seconds=time.perf_counter() - began, ridge=ridge
        )
    after = _norm(r0 - operator.matvec(found.x)) / unit
    return Solution(
        x,
        Status.EXACT if found.rank == operator.numel else Status.SINGULAR,
        1,
        after,
        (before / unit, after),
        seconds=time.perf_counter() - began,
        smallest=found.smallest,
        largest=found.largest,
        ridge=ridge,
        rank=found.rank,
    )


def _norm(x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=scalar_dtype(x.device)))
