"""Preconditioned conjugate gradients: the same solutions in fewer iterations, and only with damping."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from merganser.errors import RecipeError
from merganser.operators import normal_equations
from merganser.solvers import CG, EKron, Jacobi, Preconditioner, Status
from tests.oracle.metrics import ALL, SHAPE, normal
from tests.oracle.systems import consistent, kfac_problem, objective_gap, relative


@pytest.mark.parametrize("preconditioner", [Jacobi(), EKron()])
def test_preconditioned(preconditioner: Preconditioner) -> None:
    for name in ("gram", "kronecker", "two_kronecker", "three_kronecker", "kronecker_gram", "kronecker_identity"):
        case = ALL[name](3)
        b, x0, exact = consistent(case)
        solver = CG(200, tolerance=1e-13, preconditioner=preconditioner, undamped=True)
        solution = solver.solve(case.operator, b, x0=x0)
        assert solution.status is Status.CONVERGED
        assert relative(solution.x, exact) < 1e-9, name
        if isinstance(preconditioner, EKron) and len(case.operator.terms) == 1:
            assert solution.iterations <= 2


def test_jacobi_suits_any_metric() -> None:
    case = ALL["everything"](3)
    b, x0, exact = consistent(case)
    solution = CG(200, tolerance=1e-13, preconditioner=Jacobi(), undamped=True).solve(case.operator, b, x0=x0)
    assert relative(solution.x, exact) < 1e-9


def test_ekron_refuses_other_metrics() -> None:
    with pytest.raises(RecipeError, match="E0312"):
        CG(preconditioner=EKron()).solve(ALL["lowrank"](0).operator, normal(1, *SHAPE))


def test_preconditioners_refuse_undamped_kronecker_metrics() -> None:
    case = ALL["two_kronecker"](0)
    for preconditioner in (EKron(), Jacobi()):
        with pytest.raises(RecipeError, match=r"E0312.*needs damping"):
            CG(preconditioner=preconditioner).solve(case.operator, normal(1, *SHAPE))
    assert CG().solve(case.operator, normal(1, *SHAPE)).iterations > 0
    CG(preconditioner=EKron()).solve(case.operator.damped(0.1), normal(1, *SHAPE))


def test_ekron_needs_a_third_of_the_iterations() -> None:
    problem = kfac_problem(models=5, rows=24, columns=32)
    for level in (1e-2, 1e-3):
        plain, preconditioned = (
            problem.iterations_to(level, CG(300, tolerance=0.0, preconditioner=choice)) for choice in (None, EKron())
        )
        assert 3 * preconditioned <= plain


def test_ekron_in_single_precision_reaches_the_optimum() -> None:
    problem = kfac_problem(models=5, rows=24, columns=32)
    system = problem.system
    solution = CG(60, tolerance=0.0, preconditioner=EKron(), dtype=torch.float32).solve(
        system.operator, system.b, x0=system.x0, r0=system.r0
    )
    assert solution.x.dtype == torch.float32
    assert objective_gap(problem, solution.x.double()) < 1e-8


def test_dead_inputs_keep_the_initialisation_under_ekron() -> None:
    problem = kfac_problem(models=3, rows=6, columns=8, damping=0.0)
    alive = torch.ones(8, dtype=torch.float64)
    alive[[2, 5]] = 0
    metrics = [
        dataclasses.replace(metric, a=metric.a * alive * alive[:, None]).damped(0.1, side="output")
        for metric in problem.metrics
    ]
    system = normal_equations(metrics, problem.models, x0=problem.x0)
    solution = CG(100, preconditioner=EKron()).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert solution.status is Status.CONVERGED
    assert relative(solution.x[:, [2, 5]], problem.x0[:, [2, 5]]) < 1e-13
