"""Sums, multiples, damping and conversions of operators beside dense matrices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from merganser.errors import InputError, RecipeError
from merganser.operators import Dense, Diagonal, Gram, Kronecker, Operator, Sum
from tests.oracle.metrics import ALL, IN, OUT, SHAPE, SIMPLE, Case, D, close, normal, psd

Maker = Callable[[int], Case]
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
simple = pytest.mark.parametrize("make", SIMPLE.values(), ids=SIMPLE.keys())


@every
def test_multiples(make: Maker) -> None:
    case = make(6)
    close((2.5 * case.operator).dense(), 2.5 * case.matrix)
    close((case.operator * 0).dense(), 0 * case.matrix)
    assert case.operator * 1 is case.operator


@pytest.mark.parametrize("factor", [-1.0, float("nan"), float("inf")])
def test_multiples_that_are_no_metric(factor: float) -> None:
    with pytest.raises(RecipeError, match="E0306"):
        _ = SIMPLE["gram"](0).operator * factor


@simple
@pytest.mark.parametrize("other", ALL.values(), ids=ALL.keys())
def test_sums(make: Maker, other: Maker) -> None:
    one, two = make(1), other(2)
    x = normal(9, *SHAPE)
    for total in (one.operator + two.operator, two.operator + one.operator):
        close(total.matvec(x).view(-1), (one.matrix + two.matrix) @ x.view(-1))
        close(total.diagonal().reshape(-1), (one.matrix + two.matrix).diagonal())


@simple
def test_sums_of_one_kind_collapse(make: Maker) -> None:
    cases = [make(seed) for seed in range(4)]
    total = sum(case.operator for case in cases)
    assert isinstance(total, Operator)
    assert len(total.terms) == (4 if isinstance(cases[0].operator, Kronecker) else 1)
    close(total.dense(), torch.stack([case.matrix for case in cases]).sum(0))


@pytest.mark.parametrize(
    ("one", "kind"), [("diagonal", Diagonal), ("gram", Gram), ("dense", Dense), ("kronecker", Sum), ("lowrank", Sum)]
)
def test_sums_with_an_identity(one: str, kind: type[Operator]) -> None:
    assert type(SIMPLE[one](0).operator + SIMPLE["identity"](1).operator) is kind
    assert type(SIMPLE["identity"](1).operator + SIMPLE[one](0).operator) is kind


def test_sums_of_different_shapes() -> None:
    with pytest.raises(InputError, match="E0418"):
        _ = Gram(psd(0, 3), 4) + Gram(psd(0, 3), 5)


@every
def test_operators_are_immutable(make: Maker) -> None:
    operator = make(0).operator
    before = operator.dense()
    _ = operator + SIMPLE["dense"](1).operator, operator * 3, operator.damped(0.1), operator.scale_off_diagonal(0.5)
    operator.solve_exact(normal(1, *SHAPE))
    assert torch.equal(operator.dense(), before)
    with pytest.raises(AttributeError):
        operator.stacked = True  # type: ignore[misc]


@pytest.mark.parametrize("name", ["identity", "diagonal", "gram", "dense", "lowrank", "singular_gram"])
@pytest.mark.parametrize("factor", [0.0, 0.7, 1.0])
def test_off_diagonal_scaling(name: str, factor: float) -> None:
    case = ALL[name](3)
    expected = factor * case.matrix + (1 - factor) * torch.diag(case.matrix.diagonal())
    close(case.operator.scale_off_diagonal(factor).dense(), expected)


def test_off_diagonal_scaling_of_both_kronecker_factors() -> None:
    a, g = psd(1, IN), psd(2, OUT)
    s_a, s_g = (0.7 * m + 0.3 * torch.diag(m.diagonal()) for m in (a, g))
    close(Kronecker(a, g).scale_off_diagonal(0.7).dense(), torch.kron(s_g, s_a))
    sum_of_two = Kronecker(a, g) + Kronecker(2 * a, g)
    close(sum_of_two.scale_off_diagonal(0.7).dense(), 3 * torch.kron(s_g, s_a))


@every
def test_normalized_has_mean_eigenvalue_one(make: Maker) -> None:
    case = make(4)
    trace = case.matrix.trace()
    close(case.operator.normalized().dense(), case.matrix * (D / trace if trace > 0 else 1))


@pytest.mark.parametrize("name", ["identity", "diagonal", "gram", "dense", "lowrank", "singular_dense"])
def test_damping_is_relative_to_the_mean_eigenvalue(name: str) -> None:
    case = ALL[name](4)
    expected = case.matrix + 0.3 * case.matrix.trace() / D * torch.eye(D, dtype=torch.float64)
    close(case.operator.damped(0.3).dense(), expected)


@pytest.mark.parametrize("side", ["both", "output"])
def test_damping_of_kronecker_factors(side: str) -> None:
    a, g = psd(1, IN), psd(2, OUT)
    damped_g = g + 0.3 * g.trace() / OUT * torch.eye(OUT, dtype=torch.float64)
    damped_a = a + 0.3 * a.trace() / IN * torch.eye(IN, dtype=torch.float64) if side == "both" else a
    damped = Kronecker(a, g).damped(0.3, side=side)
    close(damped.dense(), torch.kron(damped_g, damped_a))
    assert Kronecker(a, g).undamped
    assert not damped.undamped
    assert (damped + Kronecker(a, g)).undamped
    assert not (damped * 2 + damped.normalized()).undamped
    assert Kronecker(a, g).damped(0.0).undamped


def test_damping_that_is_none() -> None:
    operator = Kronecker(psd(1, IN), psd(2, OUT))
    with pytest.raises(RecipeError, match="E0306"):
        operator.damped(-0.1)
    with pytest.raises(RecipeError, match="output"):
        operator.damped(0.1, side="input")


@every
def test_conversion(make: Maker) -> None:
    case, x = make(5), normal(9, *SHAPE)
    single = case.operator.to(torch.float32)
    assert single.dtype == torch.float32
    assert single.matvec(x.float()).dtype == torch.float32
    close(single.dense(), case.matrix, 1e-6)
    assert case.operator.to(torch.float64, "cpu") is case.operator
