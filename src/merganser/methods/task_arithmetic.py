"""Task arithmetic: add task vectors to the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.methods._options import option

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True)
class TaskArithmetic(Method, name="task_arithmetic"):
    """``W = W_0 + scale sum_i w_i (W_i - W_0)``; a negative weight forgets a task.

    Task vectors are subtracted and summed in float32 or wider, left to right, and the scale multiplies the sum. One
    pass, O(models x elements).
    """

    normalize: bool = option(False, "divide by the sum of the weights (with equal weights: the average)")

    about = About(
        title="Sum of task vectors, scaled",
        equation="W = W_0 + lambda sum_i w_i (W_i - W_0)",
        source="Ilharco et al., Editing models with task arithmetic, 2023, arXiv:2212.04089",
        helps="A first choice without data: two to eight tasks, scale 0.3 to 0.5; weight -1 removes a behaviour.",
        hurts="Large task vectors or many tasks at scale 1: the sum leaves the region where the models work.",
        work=4,
        deviations="mergekit subtracts in the storage type unless told otherwise, which loses bf16 task vectors; "
        "PEFT's `linear` adds the LoRA factors, not their products.",
    )
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """One for the sum, one for the task vector being added."""
        return 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Weights that are normalised must not sum to zero."""
        super().check(models, weights)
        if self.normalize:
            check_normalisable(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The base plus the scaled sum."""
        total = block.delta(0, slot=0)
        if block.weights[0] != 1:
            total.mul_(block.weights[0])
        for index, weight in enumerate(block.weights[1:], 1):
            total.add_(block.delta(index, slot=1), alpha=weight)
        return total.mul_(self.factor(block.weights)).add_(block.base)

    def factor(self, weights: Sequence[float]) -> float:
        """What multiplies the sum."""
        return self.scale / math.fsum(weights) if self.normalize else self.scale
