"""RAM: average what several models changed, keep what one alone changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method, State, check_positive
from merganser.methods._block import Block
from merganser.methods._options import option

__all__ = ["Ram"]


@dataclass(frozen=True)
class Ram(Method, name="ram"):
    """``W = W_0 + scale sum_i w_i m_i t_i / sum_i w_i m_i`` per entry, with ``m_i = [|t_i| > epsilon]``.

    Entries that no model changed stay as in the base. One pass, O(models x elements).
    """

    epsilon: float = option(1e-5, "changes up to this magnitude count as none", ge=0.0)

    about = About(
        title="Mean of the task vectors over the models that changed an entry",
        equation="W = W_0 + lambda mean{ t_i : |t_i| > epsilon }",
        source="Yuan et al., Behavior knowledge merge in reinforced agentic models (RAM), 2026, arXiv:2601.13572",
        helps="Models trained by reinforcement learning, whose task vectors are sparse and rarely overlap.",
        hurts="Dense task vectors: it is then their average.",
        work=6,
    )
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """A task vector, the sum, the sum of weights, and a mask."""
        return 4

    def check(self, models: int, weights: Sequence[float]) -> None:
        """A mean over any of the models needs positive weights."""
        super().check(models, weights)
        check_positive(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The base plus the mean of the changes."""
        total, counted = block.buffer("total").zero_(), block.buffer("counted").zero_()
        for index, weight in enumerate(block.weights):
            change = changed(block, index, self.epsilon)
            total.add_(change, alpha=weight)
            counted.add_(kernels.nonzero(change), alpha=weight)
        return total.mul_(self.scale).div_(counted.clamp_(min=min(block.weights))).add_(block.base)


def changed(block: Block, index: int, epsilon: float) -> torch.Tensor:
    """The task vector of a model where its magnitude exceeds `epsilon`, else 0."""
    delta = block.delta(index, slot=0)
    return torch.hardshrink(delta, epsilon, out=delta) if epsilon > 0 else delta
