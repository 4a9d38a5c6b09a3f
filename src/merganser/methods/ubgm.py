"""UBGM: merging by the mismatch of gradients, with diagonal Fishers of the models and of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.methods._matching import check_sign

__all__ = ["UBGM"]


@dataclass(frozen=True)
class UBGM(Method, name="ubgm"):
    """``W = W_0 + scale (F_0 + sum_i w_i F_i)^-1 sum_i w_i (F_0 + F_i) t_i`` per weight.

    ``F_i`` is the diagonal Fisher of model i, ``F_0`` that of the base: its statistics are given before those of the
    models. A large F_0 leads to the sum of the task vectors, F_0 = 0 (no statistics of the base) to Fisher merging.
    Where all are 0, and for tensors without a Fisher, the task vectors are averaged.

    One pass, O(models x elements).
    """

    about = About(
        title="Uncertainty-based gradient matching: Fishers of the models and of the base",
        equation="W = W_0 + (F_0 + sum_i F_i)^-1 sum_i (F_0 + F_i) t_i",
        source="Daheim et al., Model merging by uncertainty-based gradient matching, 2024, arXiv:2310.12808",
        helps="Adding and removing tasks with a Fisher of the base (or its optimizer's second moment) at hand.",
        hurts="Many tasks at once: correlations between weights matter, and RegMean or MaTS see them.",
        work=8,
    )
    needs = frozenset({"base", "fisher"})
    takes_base_statistics = True

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero, because tensors without a Fisher are averaged."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The quotient of one block, and the mean where it is 0 / 0."""
        total, mass, mean = block.buffer("total").zero_(), block.buffer("mass").zero_(), block.buffer("mean").zero_()
        divisor = math.fsum(block.weights)
        has_fisher = block.statistic("fisher", 0) is not None
        prior = block.statistic("fisher", None) if has_fisher else None
        if prior is not None:
            check_sign(block, None, prior)
            mass.add_(prior)
        for index, weight in enumerate(block.weights):
            delta = block.delta(index, slot=0)
            mean.add_(delta, alpha=weight / divisor)
            fisher = block.statistic("fisher", index)
            if fisher is None:
                continue
            check_sign(block, index, fisher)
            mass.add_(fisher, alpha=weight)
            total.addcmul_(fisher if prior is None else fisher + prior, delta, value=weight)
        seen = mass != 0
        merged = torch.where(seen, total.div_(mass.masked_fill_(~seen, 1.0)), mean)
        return merged.mul_(self.scale).add_(block.base)

    def buffers(self, models: int) -> int:
        """The model, its Fisher and the base's, three sums, masks and the quotient."""
        return 9
