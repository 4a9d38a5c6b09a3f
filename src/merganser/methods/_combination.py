"""What methods share whose result is a linear combination of the models, tensor by tensor."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Partials
from merganser.methods._base import Method, State, check_normalisable
from merganser.methods._block import Block, Context

__all__ = [
    "Combination",
    "Matrix",
    "combine",
    "inner_products",
    "matrix_of",
    "partial_products",
    "total_products",
]

Matrix = npt.NDArray[np.float64]


def combine(block: Block, coefficients: Sequence[float], *, deltas: bool = False) -> torch.Tensor:
    """``sum_i c_i W_i`` (or of the task vectors, with `deltas`), from left to right, in two buffers.

    Models with ``c_i = 0`` are not read.
    """
    total: torch.Tensor | None = None
    for index, factor in enumerate(coefficients):
        if factor == 0:
            continue
        slot = 0 if total is None else 1
        values = block.delta(index, slot) if deltas else block.model(index, slot)
        if total is not None:
            total.add_(values, alpha=factor)
        else:
            total = values if factor == 1 else values.mul_(factor)
    return block.buffer("total").zero_() if total is None else total


def inner_products(context: Context, *, deltas: bool | None = None) -> dict[str, Matrix]:
    """For every tensor the inner products of the models: models x models, float64, exact sums.

    Args:
        context: the tensors.
        deltas: of the task vectors; None means where there is a base.

    Complexity: one pass, O(models^2) operations per element; memory of one chunk of every model in float64.
    """
    parts: dict[str, list[Partials]] = defaultdict(list)
    for key, products in context.each(lambda block: _products(block, block.based if deltas is None else deltas)):
        parts[key.name].append(products)
    return {name: matrix_of(context.models, pieces) for name, pieces in parts.items()}


def total_products(context: Context) -> Matrix:
    """The inner products of the task vectors over all tensors together."""
    return matrix_of(context.models, [products for _, products in context.each(lambda block: _products(block, True))])


def _products(block: Block, deltas: bool) -> Partials:
    return partial_products(block.deltas() if deltas else [block.model(index) for index in range(len(block.weights))])


def partial_products(vectors: Sequence[torch.Tensor]) -> Partials:
    """Inner products of the vectors of a block: partial sums over chunks, a row for every pair."""
    pairs = list(itertools.combinations_with_replacement(range(len(vectors)), 2))
    return np.array(kernels.chunk_products(vectors, pairs))


def matrix_of(models: int, pieces: Sequence[Partials]) -> Matrix:
    """The symmetric matrix of inner products, from the partial sums of all blocks."""
    matrix = np.zeros((models, models))
    for row, (i, j) in enumerate(itertools.combinations_with_replacement(range(models), 2)):
        matrix[i, j] = matrix[j, i] = kernels.exact_sum([piece[row] for piece in pieces])
    return matrix


class Combination(Method):
    """A method whose result is ``W = sum_i c_i W_i``, with coefficients that depend on options and weights alone.

    With a scale other than 1, ``W_0 + scale (W - W_0)``. One pass.
    """

    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """One for the sum, one for the model being added."""
        return 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must be such that the coefficients exist."""
        super().check(models, weights)
        check_normalisable(self, [c * w for c, w in zip(self.shares(models), weights, strict=True)])

    @abstractmethod
    def shares(self, models: int) -> Sequence[float]:
        """The coefficients of equally weighted models, up to a common factor."""

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """The shares times the weights, with sum 1."""
        products = [c * w for c, w in zip(self.shares(len(weights)), weights, strict=True)]
        total = math.fsum(products)
        return [product / total for product in products]

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The combination of one block."""
        merged = combine(block, self.coefficients(block.weights))
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)
