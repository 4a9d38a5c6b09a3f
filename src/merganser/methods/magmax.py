"""MagMax: per weight, the largest change wins."""

from __future__ import annotations

from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block

__all__ = ["MagMax"]


@dataclass(frozen=True)
class MagMax(Method, name="magmax"):
    """``W = W_0 + scale w_j t_j`` with ``j = argmax_i |w_i t_i|``, entry by entry.

    Of equal magnitudes the later model's is taken. One pass, O(models x elements), four buffers.
    """

    about = About(
        title="Per weight, the task vector of the largest magnitude",
        equation="W = W_0 + lambda t_j,  j = argmax_i |t_i|",
        source="Marczak et al., MagMax, 2024, arXiv:2407.06322",
        helps="Models that were fine-tuned one after the other on a sequence of tasks; scale 0.5 in the paper.",
        hurts="One model with much larger changes than the others: it takes every weight.",
        work=6,
    )
    symmetric = False
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The winner, the next task vector, and the magnitudes of both."""
        return 4

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """One running maximum."""
        winner, largest = _weighted(block, 0), block.buffer("largest")
        torch.abs(winner, out=largest)
        magnitude = block.buffer("magnitude")
        for index in range(1, len(block.weights)):
            delta = _weighted(block, index)
            torch.abs(delta, out=magnitude)
            later = kernels.at_least(magnitude, largest).view(torch.bool)
            torch.where(later, delta, winner, out=winner)
            torch.maximum(magnitude, largest, out=largest)
        return winner.mul_(self.scale).add_(block.base)


def _weighted(block: Block, index: int) -> torch.Tensor:
    delta = block.delta(index, slot=min(index, 1))
    return delta if block.weights[index] == 1 else delta.mul_(block.weights[index])
