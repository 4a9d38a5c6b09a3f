"""Every operator beside its dense matrix in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from merganser.errors import InputError
from merganser.operators import (
    Dense,
    Diagonal,
    Gram,
    Identity,
    Kronecker,
    LowRank,
    normal_equations,
    objective,
    stack,
)
from tests.oracle.metrics import ALL, IN, OUT, SHAPE, SIMPLE, SUMS, Case, D, close, normal, psd

Maker = Callable[[int], Case]
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
simple = pytest.mark.parametrize("make", SIMPLE.values(), ids=SIMPLE.keys())
CLOSED = {name: make for name, make in ALL.items() if name not in ("two_kronecker", "three_kronecker", "everything")}
CLOSED = {name: make for name, make in CLOSED.items() if name not in ("kronecker_gram", "gram_diagonal")}


@every
def test_matvec_is_the_matrix(make: Maker) -> None:
    case, x = make(0), normal(9, *SHAPE)
    close(case.operator.matvec(x).view(-1), case.matrix @ x.view(-1))


@every
def test_matvec_writes_where_it_is_told(make: Maker) -> None:
    case, x = make(1), normal(8, *SHAPE)
    before = x.clone()
    out, work = torch.full_like(x, float("nan")), torch.full_like(x, float("nan"))
    assert case.operator.matvec(x, out=out, work=work) is out
    close(out.view(-1), case.matrix @ x.view(-1))
    assert torch.equal(x, before)


@every
def test_apply_adds(make: Maker) -> None:
    case, x, out = make(1), normal(8, *SHAPE), normal(7, *SHAPE)
    expected = out.view(-1) + case.matrix @ x.view(-1)
    case.operator.apply(x, out, torch.empty_like(x), add=True)
    close(out.view(-1), expected)


@every
def test_matvec_takes_leading_dimensions(make: Maker) -> None:
    case, x = make(2), normal(9, 5, 2, *SHAPE)
    close(case.operator.matvec(x).view(10, D), x.view(10, D) @ case.matrix)


@every
def test_matvec_takes_transposed_tensors(make: Maker) -> None:
    case, x = make(2), normal(9, IN, OUT).T
    close(case.operator.matvec(x).reshape(-1), case.matrix @ x.reshape(-1))


@every
def test_dense_is_symmetric_and_positive(make: Maker) -> None:
    case = make(3)
    matrix = case.operator.dense()
    close(matrix, case.matrix)
    close(matrix, matrix.T)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12 * (1 + matrix.abs().max())


@every
def test_diagonal_and_trace(make: Maker) -> None:
    case = make(4)
    close(case.operator.diagonal().reshape(-1), case.matrix.diagonal())
    close(case.operator.trace(), case.matrix.trace())
    assert case.operator.shape == SHAPE
    assert case.operator.numel == D


@pytest.mark.parametrize("make", CLOSED.values(), ids=CLOSED.keys())
def test_solve_exact_is_the_pseudo_inverse(make: Maker) -> None:
    case, b = make(5), normal(9, *SHAPE)
    found = case.operator.closed_form(b)
    assert found is not None
    close(found.x.view(-1), torch.linalg.pinv(case.matrix, hermitian=True, rtol=1e-12) @ b.view(-1), 1e-8)
    assert found.rank == torch.linalg.matrix_rank(case.matrix, hermitian=True, rtol=1e-12)
    exact = case.operator.solve_exact(b)
    assert exact is not None
    assert torch.equal(exact, found.x)


@pytest.mark.parametrize("name", sorted(ALL.keys() - CLOSED.keys()))
def test_no_closed_form(name: str) -> None:
    assert ALL[name](0).operator.solve_exact(normal(9, *SHAPE)) is None


def test_woodbury_needs_a_positive_diagonal() -> None:
    assert (LowRank(normal(0, 2, D)) + Diagonal(torch.zeros(D).double())).solve_exact(normal(1, D)) is None


# --- stacks -----------------------------------------------------------------------------------------------------------


@every
def test_stacked_operators_act_block_by_block(make: Maker) -> None:
    cases = [make(seed) for seed in (10, 20, 30)]
    many, x = stack([case.operator for case in cases]), normal(9, 3, *SHAPE)
    matrices = torch.stack([case.matrix for case in cases])
    assert many.count == 3
    assert many.shape == SHAPE
    close(many.matvec(x).view(3, D), (matrices @ x.view(3, D, 1)).squeeze(-1))
    close(many.diagonal().reshape(3, D), matrices.diagonal(dim1=-2, dim2=-1))
    close(many.trace(), matrices.diagonal(dim1=-2, dim2=-1).sum(-1))
    close(many.dense(), matrices)
    close(many[1].dense(), matrices[1])
    assert many.solve_exact(x) is None


@every
def test_stacked_operators_are_scaled_block_by_block(make: Maker) -> None:
    cases = [make(seed) for seed in (10, 20)]
    many = stack([case.operator for case in cases])
    factors = torch.tensor([0.5, 3.0], dtype=torch.float64)
    for one, alike in (
        (many * factors, [case.operator * f for case, f in zip(cases, factors.tolist(), strict=True)]),
        (many + many, [case.operator + case.operator for case in cases]),
        (many.normalized(), [case.operator.normalized() for case in cases]),
        (many.damped(0.2), [case.operator.damped(0.2) for case in cases]),
        (many.scale_off_diagonal(0.5), [case.operator.scale_off_diagonal(0.5) for case in cases]),
    ):
        close(one.dense(), torch.stack([operator.dense() for operator in alike]))


def test_stacks_of_different_kinds() -> None:
    with pytest.raises(InputError, match="E0418"):
        stack([Gram(psd(0, 3), 4), Gram(psd(0, 3), 4) + LowRank(normal(0, 2, 12), (4, 3))])


# --- properties -------------------------------------------------------------------------------------------------------

numbers = st.floats(-100, 100)
seeds = st.integers(0, 2**16)


@pytest.mark.parametrize("make", (SIMPLE | SUMS).values(), ids=(SIMPLE | SUMS).keys())
@given(seed=seeds, a=numbers, b=numbers)
def test_linear_symmetric_positive(make: Maker, seed: int, a: float, b: float) -> None:
    operator = make(seed).operator
    x, y = normal(seed + 1, *SHAPE), normal(seed + 2, *SHAPE)
    close(operator.matvec(a * x + b * y), a * operator.matvec(x) + b * operator.matvec(y), 1e-11)
    close((y * operator.matvec(x)).sum(), (x * operator.matvec(y)).sum(), 1e-11)
    assert (x * operator.matvec(x)).sum() >= -1e-10


@given(seed=seeds, factor=st.floats(0, 1))
def test_off_diagonal_scaling_keeps_the_diagonal_and_the_sign(seed: int, factor: float) -> None:
    operator = SIMPLE["kronecker"](seed).operator
    scaled = operator.scale_off_diagonal(factor)
    assert torch.equal(scaled.diagonal(), operator.diagonal())
    assert torch.linalg.eigvalsh(scaled.dense()).min() > -1e-12 * (1 + float(scaled.trace()))


# --- the system -------------------------------------------------------------------------------------------------------


@simple
def test_normal_equations(make: Maker) -> None:
    cases, models, weights = [make(s) for s in range(3)], [normal(s, *SHAPE) for s in (50, 51, 52)], [0.5, 2.0, 0.0]
    x0 = normal(60, *SHAPE)
    system = normal_equations([case.operator for case in cases], models, weights, x0=x0)
    matrix = sum((w * c.matrix for w, c in zip(weights, cases, strict=True)), torch.zeros(D, D))
    b = sum((w * c.matrix @ m.view(-1) for w, c, m in zip(weights, cases, models, strict=True)), torch.zeros(D))
    close(system.operator.dense(), matrix)
    close(system.b.view(-1), b)
    close(system.r0.view(-1), b - matrix @ x0.view(-1))
    x = normal(70, *SHAPE)
    expected = sum(
        w * float((x - m).view(-1) @ c.matrix @ (x - m).view(-1))
        for w, c, m in zip(weights, cases, models, strict=True)
    )
    assert objective([case.operator for case in cases], models, x, weights) == pytest.approx(expected)


def test_normal_equations_start_from_zeros_in_the_metrics_type() -> None:
    metrics = [SIMPLE["gram"](seed).operator for seed in (0, 1)]
    models = [normal(seed, *SHAPE).float() for seed in (2, 3)]
    system = normal_equations(metrics, models)
    assert system.b.dtype == torch.float64
    assert not system.x0.any()
    assert torch.equal(system.b, system.r0)


def test_normal_equations_of_transposed_weights() -> None:
    metrics = [SIMPLE["dense"](seed).operator for seed in (0, 1)]
    models = [normal(seed, IN, OUT).T for seed in (2, 3)]
    for x0 in (None, normal(4, IN, OUT).T):
        turned = normal_equations(metrics, models, x0=x0)
        plain = normal_equations(metrics, [m.contiguous() for m in models], x0=None if x0 is None else x0.contiguous())
        assert torch.equal(turned.r0, plain.r0)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Gram(normal(0, 3, 4), 2),
        lambda: Gram(psd(0, 3).bfloat16(), 2),
        lambda: Kronecker(psd(0, 3), psd(0, 4).half()),
        lambda: Kronecker(normal(0, 3), psd(0, 4)),
        lambda: Dense(psd(0, 4), (2, 3)),
        lambda: LowRank(normal(0, 4)),
        lambda: LowRank(normal(0, 2, 4), (5,)),
        lambda: Diagonal(torch.ones(3, dtype=torch.int64)),
        lambda: Identity(torch.ones((), dtype=torch.bfloat16), (3,)),
        lambda: normal_equations([Gram(psd(0, 3), 2)], [normal(0, 3, 2)]),
        lambda: stack([Gram(psd(0, 3), 2), Gram(psd(0, 4), 2)]),
    ],
)
def test_unfit_tensors(build: Callable[[], object]) -> None:
    with pytest.raises(InputError, match="E0418"):
        build()
