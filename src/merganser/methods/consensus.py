"""Consensus merging: keep the weights that several tasks need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block
from merganser.methods._options import option, per_model

__all__ = ["Consensus"]


@dataclass(frozen=True)
class Consensus(Method, name="consensus"):
    """``W = W_0 + scale [sum_i m_i >= k] t`` with ``t = sum_i t_i`` and ``m_i = [|t_i| >= threshold |t - t_i|]``.

    The t_i are the task vectors times their weights.

    The mask m_i (TALL mask) marks the weights that matter to task i. Weights that fewer than `agreement` tasks need are
    left as in the base: those of no task (catastrophic) and of one alone (selfish). One model alone is kept whole.

    Two readings of every task vector in one pass, O(models x elements).
    """

    threshold: float = option(0.4, "lambda of the TALL masks; larger keeps less", ge=0.0, per_model=True)
    agreement: int = option(2, "number of tasks that must need a weight", ge=1)

    about = About(
        title="Sum of task vectors, where several tasks need the weight",
        equation="W = W_0 + lambda [sum_i m_i >= k] sum_i t_i,  m_i = [|t_i| >= a |sum_j t_j - t_i|]",
        source="Wang et al., Localizing task information (TALL masks, Consensus), 2024, arXiv:2405.07813",
        helps="Eight tasks and more: it removes what only one task or none uses; scale as for task arithmetic.",
        hurts="Two tasks without overlap: hardly a weight is kept.",
        work=12,
        deviations="The released code picks each task's threshold among 0.2 to 0.6 on validation data.",
    )
    needs = frozenset({"base"})

    def check(self, models: int, weights: Sequence[float]) -> None:
        """At most all models can agree."""
        super().check(models, weights)
        if self.agreement > models > 1:
            raise RecipeError(
                "E0306", f"`agreement` is {self.agreement} for {models} models", places=Place(key="agreement")
            )

    def buffers(self, models: int) -> int:
        """The sum, one task vector, its remainder, and the votes."""
        return 4

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The sum, then every model's vote."""
        total = block.buffer("total")
        for index in range(len(block.weights)):
            delta = _weighted(block, index)
            if index:
                total.add_(delta)
            else:
                total.copy_(delta)
        rest = block.buffer("rest")
        votes = block.buffer("votes").zero_()
        for index in range(len(block.weights)):
            delta = _weighted(block, index)
            torch.sub(total, delta, out=rest).abs_().mul_(per_model(self.threshold, index))
            votes.add_(kernels.at_least(delta.abs_(), rest))
        kept = kernels.at_least(votes, min(self.agreement, len(block.weights)))
        return total.mul_(kept).mul_(self.scale).add_(block.base)


def _weighted(block: Block, index: int) -> torch.Tensor:
    delta = block.delta(index, slot=0)
    return delta if block.weights[index] == 1 else delta.mul_(block.weights[index])
