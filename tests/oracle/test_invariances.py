"""What must not change the result of conjugate gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.operators import Diagonal, Operator, normal_equations
from merganser.solvers import CG, EKron, Preconditioner, Status
from tests.oracle.metrics import ALL, SHAPE, normal
from tests.oracle.systems import kfac_problem, relative

seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", [None, EKron()])
@pytest.mark.parametrize("exponent", [-90, -40, 30])
def test_scale_of_the_metrics_changes_nothing(
    dtype: torch.dtype, preconditioner: Preconditioner | None, exponent: int
) -> None:
    problem = kfac_problem(models=3, rows=6, columns=8).to(dtype)
    solver = CG(30, keep=(3,), preconditioner=preconditioner)
    one, other = (
        solver.solve(s.operator, s.b, x0=s.x0, r0=s.r0) for s in (problem.system, problem.scaled(2.0**exponent).system)
    )
    assert one.iterations == other.iterations
    assert one.status is other.status is Status.CONVERGED
    assert torch.equal(one.iterates[3], other.iterates[3])
    assert torch.equal(one.x, other.x)


@given(seed=seeds, factor=st.floats(1e-12, 1e12))
def test_any_scale(seed: int, factor: float) -> None:
    problem = kfac_problem(models=3, rows=5, columns=4, seed=seed)
    one, other = (
        CG(5, tolerance=0.0).solve(s.operator, s.b, x0=s.x0) for s in (problem.system, problem.scaled(factor).system)
    )
    assert relative(other.x, one.x) < 1e-9


@given(seed=seeds)
@pytest.mark.parametrize("name", sorted(ALL))
def test_identical_models_return_themselves(name: str, seed: int) -> None:
    metrics: list[Operator] = [ALL[name](seed + index).operator for index in range(3)]
    model = normal(seed, *SHAPE)
    system = normal_equations(metrics, [model] * 3, [0.2, 3.0, 1.0], x0=model)
    solution = CG().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert torch.equal(solution.x, model)
    assert solution.status is Status.CONVERGED
    assert solution.iterations == 0


def test_identical_models_are_found_from_elsewhere() -> None:
    problem = kfac_problem(models=3, rows=6, columns=8)
    problem = dataclasses.replace(problem, models=[problem.models[0]] * 3)
    system = problem.system
    solution = CG(200, tolerance=1e-12).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert relative(solution.x, problem.models[0]) < 1e-9


@given(seed=seeds)
def test_order_of_models_is_irrelevant(seed: int) -> None:
    problem = kfac_problem(models=4, rows=5, columns=6, seed=seed)
    turned = dataclasses.replace(problem, metrics=problem.metrics[::-1], models=problem.models[::-1])
    for preconditioner in (None, EKron()):
        solver = CG(8, tolerance=0.0, preconditioner=preconditioner)
        one, other = (solver.solve(s.operator, s.b, x0=s.x0, r0=s.r0) for s in (problem.system, turned.system))
        assert relative(other.x, one.x) < 1e-9


def test_the_identity_metric_gives_the_mean() -> None:
    models = [normal(seed, 5) for seed in range(3)]
    system = normal_equations([Diagonal(torch.ones(5, dtype=torch.float64))] * 3, models, x0=models[0])
    solution = CG().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert solution.iterations == 1
    assert relative(solution.x, torch.stack(models).mean(0)) < 1e-14
