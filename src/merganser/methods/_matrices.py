"""What the methods share that merge matrices as wholes: which tensors these are, and what the rest takes."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.errors import Place, RecipeError
from merganser.methods._base import Method, State
from merganser.methods._block import Block

__all__ = ["MatrixMethod", "check_mean", "is_matrix", "mean_of_rest"]


def is_matrix(spec: BlockSpec) -> bool:
    """Whether a tensor has a spectrum to merge: two dimensions, whatever its role, and an element."""
    return len(spec.shape) == 2 and spec.numel > 0


def mean_of_rest(block: Block, scale: float) -> torch.Tensor:
    """``W_0 + scale sum_i w_i t_i / sum_i w_i``, for tensors that are no matrices."""
    total = block.delta(0, slot=0).mul_(block.weights[0])
    for index, weight in enumerate(block.weights[1:], 1):
        total.add_(block.delta(index, slot=1), alpha=weight)
    return total.mul_(scale / math.fsum(block.weights)).add_(block.base)


def check_mean(method: Method, weights: Sequence[float]) -> None:
    """Refuse weights that sum to zero, since biases and norms take the weighted mean.

    Raises:
        RecipeError: E0307.
    """
    if abs(math.fsum(weights)) <= 1e-12 * math.fsum(abs(weight) for weight in weights):
        raise RecipeError(
            "E0307",
            f"the weights {list(weights)} sum to zero, so `{method.name}` cannot average biases and norms with them",
            places=Place(key="weight"),
            fix="change the weights",
        )


@dataclass(frozen=True)
class MatrixMethod(Method):
    """A method that merges each matrix as a whole, and takes the weighted mean of all other task vectors.

    Matrices are tensors of two dimensions, whatever their role; a subclass may leave some out (`whole`).
    """

    scope = "block"
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The task vector that is looked at, and a sum."""
        return 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must have a mean."""
        super().check(models, weights)
        check_mean(self, weights)

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices."""
        return is_matrix(spec)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """One matrix, or one block of the mean of the task vectors."""
        if not self.whole(block.spec, frozenset()):
            return mean_of_rest(block, self.scale)
        merged = self.merge_matrix(block).mul_(self.scale)
        return merged.reshape(-1).to(block.base.dtype).add_(block.base)

    @abstractmethod
    def merge_matrix(self, block: Block) -> torch.Tensor:
        """The merged task vector of one matrix before the scale, in float64; it may be overwritten."""
