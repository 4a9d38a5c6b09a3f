"""Closed forms beside dense float64 solutions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import InputError, RecipeError
from merganser.operators import (
    Dense,
    Diagonal,
    Gram,
    Identity,
    Kronecker,
    LowRank,
    Operator,
    normal_equations,
    rank_tolerance,
    stack,
)
from merganser.solvers import CG, Direct, EKron, Solver, Status, TwoModel
from tests.oracle.metrics import ALL, OUT, SHAPE, Case, D, normal, psd
from tests.oracle.systems import kfac_problem, relative

every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
seeds = st.integers(0, 2**16)


def nearest(matrix: torch.Tensor, b: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """The solution nearest to x0, in least squares where there is none."""
    inverse: torch.Tensor = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12)
    return x0 + (inverse @ (b.reshape(-1) - matrix @ x0.reshape(-1))).view(x0.shape)


@every
def test_direct_solves_every_metric_and_keeps_its_null_space(make: Callable[[int], Case]) -> None:
    case = make(3)
    x0 = normal(40, *SHAPE)
    b = (case.matrix @ normal(41, D)).view(SHAPE)
    solution = Direct(undamped=True).solve(case.operator, b, x0=x0)
    rank = int(torch.linalg.matrix_rank(case.matrix, hermitian=True, rtol=1e-12))
    assert relative(solution.x, nearest(case.matrix, b, x0)) < 1e-9
    assert solution.rank == rank
    assert solution.status is (Status.EXACT if rank == D else Status.SINGULAR)
    assert solution.residual < 1e-10
    assert len(solution.history) == 2
    null = torch.eye(D, dtype=torch.float64) - torch.linalg.pinv(case.matrix, hermitian=True, rtol=1e-12) @ case.matrix
    assert (null @ (solution.x - x0).view(-1)).abs().max() < 1e-9


@every
def test_ridge_pulls_towards_the_initialisation(make: Callable[[int], Case]) -> None:
    case = make(4)
    x0, b = normal(40, *SHAPE), normal(41, *SHAPE)
    shift = 0.3 * case.matrix.trace() / D * torch.eye(D, dtype=torch.float64)
    gap = torch.linalg.pinv(case.matrix + shift, hermitian=True) @ (b.view(-1) - case.matrix @ x0.view(-1))
    solution = Direct(ridge=0.3).solve(case.operator, b, x0=x0)
    assert relative(solution.x, x0 + gap.view(SHAPE)) < 1e-9
    assert solution.ridge == 0.3


def test_singular_statistics_in_single_precision() -> None:
    """Rounding makes a singular Gram matrix slightly indefinite; its noise must not be inverted."""
    inputs = normal(0, 20, 48).float()
    gram = Gram(inputs.T @ inputs / 20, 8)
    x0, target = normal(1, 8, 48).float(), normal(2, 8, 48).float()
    solution = Direct().solve(gram, gram.matvec(target), x0=x0)
    seen = torch.linalg.pinv(inputs.double()) @ inputs.double()
    expected = x0.double() + (target - x0).double() @ seen
    assert solution.status is Status.SINGULAR
    assert solution.rank == 20 * 8
    assert relative(solution.x, expected) < 1e-4
    assert rank_tolerance(torch.float32, 48) == pytest.approx(4.8e-7, rel=0.01)


def test_direct_refuses_undamped_kronecker_metrics() -> None:
    for name in ("kronecker", "two_kronecker", "three_kronecker"):
        operator = ALL[name](0).operator
        with pytest.raises(RecipeError, match=r"E0312.*needs damping"):
            Direct().solve(operator, normal(1, *SHAPE))
        assert Direct().solve(operator.damped(0.1), normal(1, *SHAPE)).status is Status.EXACT
        assert Direct(ridge=0.1).solve(operator, normal(1, *SHAPE)).status is Status.EXACT
    with pytest.raises(RecipeError, match="E0306"):
        Direct(ridge=-1.0)


def test_large_metrics_without_a_closed_form() -> None:
    operator = ALL["three_kronecker"](0).operator
    solver = Direct(undamped=True, dense_limit=D - 1)
    with pytest.raises(RecipeError, match=r"E0312.*no closed form"):
        solver.solve(operator, normal(1, *SHAPE))


def test_numbers_that_are_not_finite() -> None:
    b, x0 = normal(1, *SHAPE), normal(2, *SHAPE)
    b[0, 0] = float("nan")
    solvers: list[Solver] = [Direct(undamped=True), TwoModel(undamped=True)]
    for solver in solvers:
        solution = solver.solve(ALL["two_kronecker"](0).operator, b, x0=x0)
        assert solution.status is Status.BREAKDOWN
        assert torch.equal(solution.x, x0)


@pytest.mark.parametrize("name", ["gram", "two_kronecker", "singular_dense", "lowrank_diagonal"])
def test_stacks_are_solved_one_after_the_other(name: str) -> None:
    cases = [ALL[name](seed) for seed in (10, 20, 30)]
    b, x0 = normal(0, 3, *SHAPE), normal(1, 3, *SHAPE)
    many = Direct(undamped=True).solve_stack(stack([case.operator for case in cases]), b, x0=x0)
    for index, case in enumerate(cases):
        assert relative(many[index].x, nearest(case.matrix, b[index], x0[index])) < 1e-8
    with pytest.raises(InputError, match="E0418"):
        Direct(undamped=True).solve_stack(cases[0].operator, b[0])


@given(seed=seeds, exponent=st.integers(-30, 30))
@pytest.mark.parametrize(
    "name", ["diagonal", "gram", "kronecker", "two_kronecker", "dense", "lowrank", "singular_gram"]
)
def test_scale_of_the_metrics_changes_nothing(name: str, seed: int, exponent: int) -> None:
    metrics: list[Operator] = [ALL[name](seed).operator, ALL[name](seed + 1).operator]
    models, x0 = [normal(seed + 2, *SHAPE), normal(seed + 3, *SHAPE)], normal(seed + 4, *SHAPE)
    solutions = []
    for factor in (1.0, 10.0**exponent):
        system = normal_equations([metric * factor for metric in metrics], models, x0=x0)
        solver = Direct(undamped=True)
        solutions.append(solver.solve(system.operator, system.b, x0=system.x0, r0=system.r0).x)
    # an ill-conditioned random metric amplifies rounding
    spectrum = torch.linalg.eigvalsh((metrics[0] + metrics[1]).dense())
    spectrum = spectrum[spectrum > 1e-12 * spectrum[-1]]
    assert relative(solutions[1], solutions[0]) < 1e-13 * float(spectrum[-1] / spectrum[0]) + 1e-12


@given(seed=seeds)
@pytest.mark.parametrize("name", sorted(ALL))
def test_identical_models_return_themselves(name: str, seed: int) -> None:
    metrics: list[Operator] = [ALL[name](seed + index).operator for index in range(2)]
    model = normal(seed, *SHAPE)
    system = normal_equations(metrics, [model, model], x0=model)
    solution = Direct(undamped=True).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert torch.equal(solution.x, model)


# --- two models -------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_two_models(seed: int) -> None:
    problem = kfac_problem(models=2, rows=5, columns=7, damping=0.01, seed=seed)
    system = problem.system
    solution = TwoModel().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert relative(solution.x, problem.best) < 1e-9
    assert solution.status is Status.EXACT
    assert solution.residual < 1e-12


def test_two_models_agree_with_preconditioned_conjugate_gradients() -> None:
    system = kfac_problem(models=2, rows=24, columns=32, damping=0.05).system
    exact = TwoModel().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    path = CG(300, tolerance=1e-12, preconditioner=EKron()).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
    assert path.status is Status.CONVERGED
    assert relative(path.x, exact.x) < 1e-9


@pytest.mark.parametrize("exponent", [-12, 0, 12])
def test_two_models_of_very_different_scale(exponent: int) -> None:
    """Only products A (x) G have a scale; how it is shared between the factors does not matter."""
    problem = kfac_problem(models=2, rows=5, columns=7)
    one, two = problem.metrics
    shared = dataclasses.replace(one, a=one.a * 10.0**exponent, g=one.g * 10.0**-exponent)
    system = dataclasses.replace(problem, metrics=[shared, two]).system
    assert relative(TwoModel().solve(system.operator, system.b, x0=system.x0, r0=system.r0).x, problem.best) < 1e-10


@pytest.mark.parametrize("other", ["kronecker", "gram", "identity"])
def test_two_terms_of_other_kinds(other: str) -> None:
    one, two = ALL["kronecker"](1), ALL[other](2)
    b, x0 = normal(3, *SHAPE), normal(4, *SHAPE)
    solution = TwoModel(undamped=True).solve(one.operator + two.operator, b, x0=x0)
    assert relative(solution.x, nearest(one.matrix + two.matrix, b, x0)) < 1e-10


def blocks(*ones: int, seed: int, size: int) -> torch.Tensor:
    """A matrix that sees only those directions of a random, not orthogonal basis."""
    basis = normal(seed, size, size)
    chosen = basis[:, list(ones)]
    return chosen @ chosen.T


@pytest.mark.parametrize(
    ("inner", "outer"),
    [
        (((0, 1), (1, 2)), ((0, 1, 2), (2, 3))),  # directions that one model sees and the other does not, on both sides
        (((0,), (1, 2)), ((0,), (1, 2, 3))),  # nothing in common
        (((0, 1, 2), (0, 1, 2)), ((0, 1), (1,))),
        (((0, 1), (0, 1)), ((0, 3), (0, 3))),
        (((), (0, 1, 2)), ((0, 1), (1, 2, 3))),  # a model without inputs
    ],
)
def test_two_singular_models_keep_the_null_space(
    inner: tuple[tuple[int, ...], ...], outer: tuple[tuple[int, ...], ...]
) -> None:
    metrics = [
        Kronecker(blocks(*a, seed=5, size=3), blocks(*g, seed=6, size=OUT)) for a, g in zip(inner, outer, strict=True)
    ]
    matrix = torch.stack([torch.kron(metric.g, metric.a) for metric in metrics]).sum(0)
    models, x0 = [normal(1, *SHAPE), normal(2, *SHAPE)], normal(3, *SHAPE)
    system = normal_equations(metrics, models, x0=x0)
    rank = int(torch.linalg.matrix_rank(matrix, hermitian=True, rtol=1e-10))
    solution = TwoModel(undamped=True).solve(system.operator, system.b, x0=x0, r0=system.r0)
    assert solution.rank == rank
    assert solution.status is (Status.EXACT if rank == D else Status.SINGULAR)
    assert solution.residual < 1e-10
    assert relative(solution.x, nearest(matrix, system.b, x0)) < 1e-8


def test_two_models_refuse_other_metrics() -> None:
    with pytest.raises(RecipeError, match=r"E0312.*needs damping"):
        TwoModel().solve(ALL["two_kronecker"](0).operator, normal(1, *SHAPE))
    for name in ("three_kronecker", "gram_diagonal", "gram", "dense"):
        with pytest.raises(RecipeError, match=r"E0312.*two models"):
            TwoModel(undamped=True).solve(ALL[name](0).operator, normal(1, *SHAPE))


def test_two_model_stacks() -> None:
    problems = [kfac_problem(models=2, rows=5, columns=7, seed=seed) for seed in (0, 1)]
    operator = stack([problem.system.operator for problem in problems])
    b = torch.stack([problem.system.b for problem in problems])
    for problem, solution in zip(problems, TwoModel().solve_stack(operator, b), strict=True):
        assert relative(solution.x, problem.best) < 1e-9


# --- methods that are closed forms ------------------------------------------------------------------------------------


def test_closed_forms_are_the_methods_of_those_names() -> None:
    models = [normal(seed, *SHAPE) for seed in range(3)]
    stacked = torch.stack(models)
    fishers = torch.stack([normal(seed + 9, *SHAPE).square() for seed in range(3)])
    grams = [psd(seed, 3) for seed in range(3)]

    def merged(metrics: list[Operator]) -> torch.Tensor:
        system = normal_equations(metrics, models, x0=models[0])
        return Direct().solve(system.operator, system.b, x0=system.x0, r0=system.r0).x

    assert relative(merged([Identity.like(models[0])] * 3), stacked.mean(0)) < 1e-13
    assert relative(merged([Diagonal(f) for f in fishers]), (fishers * stacked).sum(0) / fishers.sum(0)) < 1e-13
    regmean = torch.linalg.solve(sum(grams), sum(a @ w.T for a, w in zip(grams, models, strict=True))).T
    assert relative(merged([Gram(a, OUT) for a in grams]), regmean) < 1e-11
    rows = [normal(seed, 2, D) for seed in range(3)]
    low = merged([LowRank(z, SHAPE).damped(0.5) for z in rows])
    assert relative(low, merged([Dense(z.T @ z, SHAPE).damped(0.5) for z in rows])) < 1e-11
