"""K-FAC systems whose exact solution is known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from merganser.operators import Kronecker, System, normal_equations
from merganser.solvers import CG
from tests.oracle.metrics import SHAPE, Case, D, normal, psd


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected entry."""
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-300))


def consistent(case: Case, seed: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A right-hand side in the range, an initialisation, and the solution nearest to it."""
    x0 = normal(seed, *SHAPE)
    b = (case.matrix @ normal(seed + 1, D)).view(SHAPE)
    inverse = torch.linalg.pinv(case.matrix, hermitian=True, rtol=1e-12)
    return b, x0, x0 + (inverse @ (b.view(-1) - case.matrix @ x0.view(-1))).view(SHAPE)


@dataclass(frozen=True)
class Problem:
    """Metrics, models and an initialisation."""

    metrics: list[Kronecker]
    models: list[torch.Tensor]
    x0: torch.Tensor

    @cached_property
    def system(self) -> System:
        return normal_equations(self.metrics, self.models, x0=self.x0)

    @cached_property
    def best(self) -> torch.Tensor:
        """The optimum, from the dense matrix."""
        matrix = sum(torch.kron(m.g, m.a) for m in self.metrics)
        b = sum((m.g @ w @ m.a).view(-1) for m, w in zip(self.metrics, self.models, strict=True))
        assert isinstance(matrix, torch.Tensor)
        assert isinstance(b, torch.Tensor)
        solution: torch.Tensor = torch.linalg.solve(matrix, b)
        return solution.view_as(self.x0)

    def to(self, dtype: torch.dtype) -> Problem:
        metrics = [replace(m, a=m.a.to(dtype), g=m.g.to(dtype)) for m in self.metrics]
        return Problem(metrics, [w.to(dtype) for w in self.models], self.x0.to(dtype))

    def scaled(self, factor: float) -> Problem:
        return replace(self, metrics=[m.scaled(factor) for m in self.metrics])

    def iterations_to(self, level: float, solver: CG) -> int:
        """The number of iterations after which the objective's gap, relative to that of x0, is below a level."""
        system = self.system
        solver = replace(solver, keep=tuple(range(solver.max_iterations + 1)))
        path = solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0).iterates
        return min(step for step, x in path.items() if objective_gap(self, x) <= level)


def objective_gap(problem: Problem, x: torch.Tensor) -> float:
    """``f(x) - f*`` relative to the gap of x0."""
    matvec = problem.system.operator.matvec
    gap, first = (float(((y - problem.best) * matvec(y - problem.best)).sum()) for y in (x, problem.x0))
    return gap / first


def kfac_problem(*, models: int, rows: int, columns: int, damping: float = 0.1, seed: int = 0) -> Problem:
    """Factors with falling spectra in bases that the tasks share in part, damped; models near a common base."""
    base = normal(seed, rows, columns)

    def factor(index: int, size: int) -> torch.Tensor:
        scale = torch.arange(1, size + 1, dtype=torch.float64) ** -1.0
        basis = torch.linalg.qr(normal(seed + size, size, size)).Q
        turned = torch.linalg.qr(basis + 0.2 * normal(seed + 31 * index, size, size)).Q
        matrix: torch.Tensor = turned @ torch.diag(scale**2) @ turned.T + 1e-3 * psd(seed + index, size)
        return (matrix + matrix.T) / 2

    metrics = [
        Kronecker(factor(2 * i, columns), factor(2 * i + 1, rows)).damped(damping) * 10.0 ** (i - models / 2)
        for i in range(models)
    ]
    tuned = [base + 0.1 * normal(seed + 77 + i, rows, columns) for i in range(models)]
    start = base + 0.3 * torch.stack([weight - base for weight in tuned]).sum(0)
    return Problem([m for m in metrics if isinstance(m, Kronecker)], tuned, start)
