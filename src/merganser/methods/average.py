"""Weighted average of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.methods._options import option

__all__ = ["Average"]


@dataclass(frozen=True)
class Average(Method, name="average", aliases=("linear", "fedavg")):
    """``W = sum_i w_i W_i / sum_i w_i``: the metric of every model is the identity.

    With the models' numbers of training examples as weights it is federated averaging (FedAvg). With a scale other than
    1, ``W_0 + scale (W - W_0)``. Memory: two buffers. One pass, O(models x elements).
    """

    normalize: bool = option(True, "divide by the sum of the weights")

    about = About(
        title="Weighted average of the weights (model soup, FedAvg)",
        equation="W = sum_i w_i W_i / sum_i w_i",
        source="Wortsman et al., Model soups, 2022, arXiv:2203.05482",
        helps="Models fine-tuned on the same task from one base; a baseline for everything else. FedAvg (McMahan et "
        "al., 2017, arXiv:1602.05629): the clients' numbers of examples as weights.",
        hurts="Many tasks that differ: every task vector is shrunk by the number of models.",
        work=3,
    )

    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """One for the sum, one for the model being added."""
        return 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Weights that are normalised must not sum to zero."""
        super().check(models, weights)
        if self.normalize:
            check_normalisable(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The weighted sum, one model after the other."""
        divisor = math.fsum(block.weights) if self.normalize else 1.0
        total = block.model(0, slot=0)
        total.mul_(block.weights[0])
        for index, weight in enumerate(block.weights[1:], 1):
            total.add_(block.model(index, slot=1), alpha=weight)
        total.div_(divisor)
        return total if self.scale == 1 else total.sub_(block.base).mul_(self.scale).add_(block.base)
