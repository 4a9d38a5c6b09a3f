"""Operators of every kind beside their matrices, written out in float64 by other means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from merganser.operators import Dense, Diagonal, Gram, Identity, Kronecker, LowRank, Operator

OUT, IN = 4, 3
SHAPE = (OUT, IN)
D = OUT * IN


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def psd(seed: int, size: int, rank: int | None = None) -> torch.Tensor:
    """A random positive semi-definite matrix of that rank."""
    x = normal(seed, size, rank or size + 2)
    return x @ x.T / size


def fixed(x: torch.Tensor) -> torch.Tensor:
    """Entries of a vector as the diagonal of a matrix."""
    return torch.diag(x.reshape(-1))


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    gap = (actual.double() - expected).abs().max().item()
    assert gap <= tolerance * max(1.0, expected.abs().max().item()), gap


@dataclass(frozen=True)
class Case:
    """An operator on ``[OUT, IN]`` (or on vectors of D), and its matrix on row-major flattened tensors."""

    operator: Operator
    matrix: torch.Tensor


def identity(seed: int) -> Case:
    scale = normal(seed, 1)[0].abs()
    return Case(Identity(scale, SHAPE), scale * torch.eye(D, dtype=torch.float64))


def diagonal(seed: int) -> Case:
    entries = normal(seed, *SHAPE).abs()
    return Case(Diagonal(entries), fixed(entries))


def gram(seed: int) -> Case:
    a = psd(seed, IN)
    return Case(Gram(a, OUT), torch.kron(torch.eye(OUT, dtype=torch.float64), a))


def kronecker(seed: int) -> Case:
    a, g = psd(seed, IN), psd(seed + 100, OUT)
    return Case(Kronecker(a, g), torch.einsum("ij,kl->ikjl", g, a).reshape(D, D))


def dense(seed: int) -> Case:
    matrix = psd(seed, D)
    return Case(Dense(matrix, SHAPE), matrix)


def lowrank(seed: int) -> Case:
    rows = normal(seed, 5, D)
    return Case(LowRank(rows, SHAPE), sum((torch.outer(row, row) for row in rows), torch.zeros(D, D)))


def singular_diagonal(seed: int) -> Case:
    entries = normal(seed, *SHAPE).clamp(min=0)
    return Case(Diagonal(entries), fixed(entries))


def singular_gram(seed: int) -> Case:
    a = psd(seed, IN, rank=2)
    return Case(Gram(a, OUT), torch.kron(torch.eye(OUT, dtype=torch.float64), a))


def singular_kronecker(seed: int) -> Case:
    a, g = psd(seed, IN, rank=2), psd(seed + 100, OUT, rank=2)
    return Case(Kronecker(a, g), torch.kron(g, a))


def singular_dense(seed: int) -> Case:
    matrix = psd(seed, D, rank=7)
    return Case(Dense(matrix, SHAPE), matrix)


def tall_lowrank(seed: int) -> Case:
    rows = normal(seed, D + 3, D)
    return Case(LowRank(rows, SHAPE), rows.T @ rows)


def zero_kronecker(seed: int) -> Case:
    zero = torch.zeros(D, D, dtype=torch.float64)
    return Case(Kronecker(zero[:IN, :IN], psd(seed, OUT)), zero)


def added(*makers: Callable[[int], Case]) -> Callable[[int], Case]:
    """The maker of a sum."""

    def make(seed: int) -> Case:
        cases = [maker(seed + index) for index, maker in enumerate(makers)]
        first, *rest = cases
        operator, matrix = first.operator, first.matrix
        for case in rest:
            operator, matrix = operator + case.operator, matrix + case.matrix
        return Case(operator, matrix)

    return make


SIMPLE: dict[str, Callable[[int], Case]] = {
    "identity": identity,
    "diagonal": diagonal,
    "gram": gram,
    "kronecker": kronecker,
    "dense": dense,
    "lowrank": lowrank,
}
SINGULAR: dict[str, Callable[[int], Case]] = {
    "singular_diagonal": singular_diagonal,
    "singular_gram": singular_gram,
    "singular_kronecker": singular_kronecker,
    "singular_dense": singular_dense,
    "zero_kronecker": zero_kronecker,
}
SUMS: dict[str, Callable[[int], Case]] = {
    "two_kronecker": added(kronecker, kronecker),
    "three_kronecker": added(kronecker, kronecker, kronecker),
    "kronecker_gram": added(kronecker, gram),
    "kronecker_identity": added(kronecker, identity),
    "gram_diagonal": added(gram, diagonal),
    "lowrank_identity": added(lowrank, identity),
    "lowrank_diagonal": added(diagonal, lowrank),
    "everything": added(kronecker, lowrank, diagonal, gram, dense, identity),
}
ALL = SIMPLE | SINGULAR | SUMS | {"tall_lowrank": tall_lowrank}
