"""Conjugate gradients beside dense float64 solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import strategies as st

from merganser.errors import InputError, RecipeError
from merganser.operators import Dense, Diagonal, Gram, Kronecker, Operator, stack
from merganser.solvers import CG, EKron, Jacobi, Preconditioner, Solution, Status
from tests.oracle.metrics import ALL, OUT, Case, D, normal, psd
from tests.oracle.systems import consistent, kfac_problem, relative

every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
seeds = st.integers(0, 2**16)


@every
def test_solves_every_metric_and_keeps_its_null_space(make: Callable[[int], Case]) -> None:
    case = make(3)
    b, x0, exact = consistent(case)
    solution = CG(200, tolerance=1e-12).solve(case.operator, b, x0=x0)
    assert solution.status is Status.CONVERGED
    assert relative(solution.x, exact) < 1e-8
    assert solution.residual < 1e-11
    assert len(solution.history) == solution.iterations + 1
    null = torch.eye(D, dtype=torch.float64) - torch.linalg.pinv(case.matrix, hermitian=True, rtol=1e-12) @ case.matrix
    assert (null @ (solution.x - x0).view(-1)).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["gram", "three_kronecker", "dense"])
def test_estimates_of_eigenvalues(name: str) -> None:
    case = ALL[name](3)
    b, x0, _ = consistent(case)
    solution = CG(200, tolerance=1e-13).solve(case.operator, b, x0=x0)
    values = torch.linalg.eigvalsh(case.matrix)
    assert solution.smallest == pytest.approx(float(values[0]), rel=1e-3)
    assert solution.largest == pytest.approx(float(values[-1]), rel=1e-6)
    assert solution.condition == pytest.approx(float(values[-1] / values[0]), rel=1e-3)
    early = CG(2, tolerance=0.0).solve(case.operator, b, x0=x0)
    assert early.smallest is not None
    assert early.largest is not None
    assert values[0] <= early.smallest <= early.largest <= values[-1] * (1 + 1e-12)


# --- the path ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, EKron()])
def test_one_solve_gives_the_whole_path(preconditioner: Preconditioner | None) -> None:
    system = kfac_problem(models=4, rows=10, columns=12).system
    steps = (0, 1, 2, 5, 10, 20)
    solver = CG(20, tolerance=0.0, keep=steps, preconditioner=preconditioner)
    path = solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert tuple(path.iterates) == steps
    assert torch.equal(path.iterates[0], system.x0)
    assert torch.equal(path.iterates[20], path.x)
    for step in steps:
        alone = CG(step, tolerance=0.0, preconditioner=preconditioner).solve(
            system.operator, system.b, x0=system.x0, r0=system.r0
        )
        assert torch.equal(alone.x, path.iterates[step])
        assert alone.iterations == step
        assert alone.status is Status.MAX_ITERATIONS
        assert alone.history == path.history[: step + 1]


def test_iterates_after_the_end_are_the_solution() -> None:
    case = ALL["gram"](0)
    b, x0, _ = consistent(case)
    solution = CG(100, keep=(1, 99)).solve(case.operator, b, x0=x0)
    assert solution.iterations < 10
    assert torch.equal(solution.iterates[99], solution.x)
    assert not torch.equal(solution.iterates[1], solution.x)


def test_residual_is_the_true_one() -> None:
    problem = kfac_problem(models=4, rows=10, columns=12)
    system = problem.system
    solution = CG(7, tolerance=0.0).solve(system.operator, system.b, x0=system.x0)
    true = (system.b - system.operator.matvec(solution.x)).norm() / system.b.norm()
    assert solution.residual == pytest.approx(float(true), rel=1e-9)
    assert solution.history[-1] == pytest.approx(float(true), rel=1e-6)


def test_residual_does_not_follow_the_recurrence_below_rounding() -> None:
    system = kfac_problem(models=4, rows=10, columns=12).to(torch.float32).system
    solution = CG(200, tolerance=0.0, preconditioner=EKron()).solve(system.operator, system.b, x0=system.x0)
    assert solution.history[-1] < 1e-12
    assert 1e-10 < solution.residual < 1e-6


# --- stacks, ends and breakdowns --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, EKron(), Jacobi()])
def test_stacks_are_solved_block_by_block(preconditioner: Preconditioner | None) -> None:
    problems = [kfac_problem(models=3, rows=6, columns=8, damping=0.5 * (1 + seed), seed=seed) for seed in range(4)]
    problems[2] = dataclasses.replace(problems[2], models=[problems[2].x0] * 3)
    systems = [problem.system for problem in problems]
    solver = CG(40, tolerance=1e-3, keep=(2, 9), preconditioner=preconditioner)
    many = solver.solve_stack(
        stack([system.operator for system in systems]),
        torch.stack([system.b for system in systems]),
        x0=torch.stack([system.x0 for system in systems]),
        r0=torch.stack([system.r0 for system in systems]),
    )
    assert many[2].iterations == 0
    assert len({solution.iterations for solution in many}) > 1
    for system, together in zip(systems, many, strict=True):
        alone = solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0)
        assert (alone.status, alone.iterations) == (together.status, together.iterations)
        # rounding grows along the path of conjugate gradients
        assert relative(together.x, alone.x) < 1e-6
        assert relative(together.iterates[2], alone.iterates[2]) < 1e-13
        assert together.history == pytest.approx(alone.history, rel=1e-6)


def broken_stack() -> tuple[Operator, torch.Tensor, torch.Tensor]:
    """A sound block, an indefinite one, one with NaN in its metric, one that overflows, one with NaN in b, zeros."""
    matrices = torch.stack([psd(1, 6) + torch.eye(6) for _ in range(6)]).float()
    matrices[1] = torch.diag(torch.tensor([1.0, -2.0, 1.0, 1.0, 1.0, -1.0]))
    matrices[2, 0, 0] = float("nan")
    matrices[3] *= 3e38
    matrices[5] = 0
    b, x0 = normal(2, 6, 6).float(), normal(3, 6, 6).float()
    b[4, 1] = float("inf")
    b[5] = 0
    return Dense(matrices, stacked=True), b, x0


def test_broken_blocks_do_not_disturb_others() -> None:
    operator, b, x0 = broken_stack()
    solutions = CG(30, keep=(4,)).solve_stack(operator, b, x0=x0)
    statuses = [solution.status for solution in solutions]
    assert statuses == [Status.CONVERGED, *[Status.BREAKDOWN] * 4, Status.CONVERGED]
    alone = CG(30).solve(operator[0], b[0], x0=x0[0])
    assert relative(solutions[0].x, alone.x) < 1e-5  # float32: products of a stack and of one block may round apart
    assert all(bool(solution.x.isfinite().all()) for solution in solutions)
    for index in (2, 3, 4, 5):
        assert torch.equal(solutions[index].x, x0[index])
    assert "semi-definite" in solutions[1].advice


@dataclass(frozen=True, eq=False)
class Failing(Dense):
    """A matrix whose products with the first block of a stack are NaN from the third on."""

    calls: list[int] = field(default_factory=list)

    def apply(self, x: torch.Tensor, out: torch.Tensor, work: torch.Tensor, *, add: bool) -> None:
        super().apply(x, out, work, add=add)
        self.calls.append(1)
        if len(self.calls) >= 3:
            out[0] = float("nan")


def test_breakdowns_keep_what_was_reached() -> None:
    matrices = torch.stack([psd(seed, 6) for seed in (1, 2)])
    b = normal(3, 2, 6)
    sound, failing = (
        CG(6, tolerance=0.0, keep=(2,)).solve_stack(operator, b)
        for operator in (Dense(matrices, stacked=True), Failing(matrices, stacked=True))
    )
    assert failing[0].status is Status.BREAKDOWN
    assert failing[0].iterations == 2
    assert torch.equal(failing[0].x, sound[0].iterates[2])
    assert failing[0].history == sound[0].history[:3]
    assert torch.equal(failing[1].x, sound[1].x)


def test_indefinite_metrics_are_noticed() -> None:
    operator = Diagonal(torch.tensor([1.0, -1.0], dtype=torch.float64))
    solution = CG().solve(operator, torch.ones(2, dtype=torch.float64))
    assert solution.status is Status.BREAKDOWN
    assert solution.iterations == 0


def test_tolerance_is_relative_to_b() -> None:
    case = ALL["gram"](1)
    b, x0, _ = consistent(case)
    for scale in (1e-30, 1.0, 1e30):
        solution = CG(50, tolerance=1e-6).solve(case.operator, b * scale, x0=x0 * scale)
        assert solution.status is Status.CONVERGED
        assert solution.iterations > 0
        assert solution.residual < 1e-6 <= solution.history[-2]


def test_nothing_to_do() -> None:
    operator = Gram(torch.zeros(3, 3), OUT)
    x0 = normal(1, OUT, 3).float()
    solution = CG().solve(operator, torch.zeros(OUT, 3), x0=x0)
    assert torch.equal(solution.x, x0)
    assert (solution.status, solution.iterations, solution.residual) == (Status.CONVERGED, 0, 0.0)
    assert solution.smallest is solution.largest is solution.condition is None
    b = torch.ones(OUT, 3)
    none = CG(0).solve(Gram(torch.eye(3), OUT), b)
    assert (none.status, none.residual) == (Status.MAX_ITERATIONS, 1.0)
    assert not none.x.any()


def test_types() -> None:
    problem = kfac_problem(models=2, rows=4, columns=3)
    system = problem.to(torch.float32).system
    solution = CG(10).solve(system.operator, system.b, x0=system.x0)
    assert solution.x.dtype == torch.float32
    wide = CG(10, dtype=torch.float64).solve(system.operator, system.b, x0=system.x0)
    assert wide.x.dtype == torch.float64


def test_inputs_are_not_modified() -> None:
    system = kfac_problem(models=2, rows=4, columns=3).system
    before = [tensor.clone() for tensor in (system.b, system.x0, system.r0)]
    matrix = system.operator.dense()
    solution: Solution = CG(10, preconditioner=EKron()).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    CG(10).solve(system.operator, system.b)
    assert solution.iterations > 0
    assert all(torch.equal(one, other) for one, other in zip(before, (system.b, system.x0, system.r0), strict=True))
    assert torch.equal(matrix, system.operator.dense())


@pytest.mark.parametrize(
    "options", [{"max_iterations": -1}, {"tolerance": -1e-3}, {"tolerance": float("nan")}, {"keep": (5, 101)}]
)
def test_options(options: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="E0306"):
        CG(**options)  # type: ignore[arg-type]


def test_unfit_arguments() -> None:
    operator = Kronecker(psd(0, 3), psd(1, 4), damping=0.1)
    with pytest.raises(InputError, match="E0418"):
        CG().solve(operator, normal(0, 3, 4))
    with pytest.raises(InputError, match="E0418"):
        CG().solve(operator, normal(0, 4, 3), x0=normal(0, 4))
    with pytest.raises(InputError, match="stacked"):
        CG().solve(stack([operator]), normal(0, 1, 4, 3))
    with pytest.raises(InputError, match="not stacked"):
        CG().solve_stack(operator, normal(0, 4, 3))


@pytest.mark.parametrize("preconditioner", [None, Jacobi(), EKron()])
def test_the_objective_of_every_iterate(preconditioner: Preconditioner | None) -> None:
    system = kfac_problem(models=2, rows=4, columns=3).system
    operator, b, x0 = system.operator.damped(0.1), 1e3 * system.b, system.x0
    solver = CG(4, tolerance=0, keep=(0, 1, 2, 3, 4), preconditioner=preconditioner)
    solution = solver.solve(operator, b, x0=x0)
    assert len(solution.objective) == len(solution.history) == 5
    for step, x in solution.iterates.items():
        d = x - x0
        wanted = float((d * operator.matvec(d)).sum() / 2 - (d * (b - operator.matvec(x0))).sum())
        assert solution.objective[step] == pytest.approx(wanted, rel=1e-9, abs=1e-9)
