"""Mean of the checkpoints of one training run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, State, check_positive
from merganser.methods._block import Block
from merganser.methods._combination import Combination, combine
from merganser.methods._options import option

__all__ = ["CheckpointAverage"]


@dataclass(frozen=True)
class CheckpointAverage(Combination, name="checkpoint_average"):
    """``W = sum_i w_i W_i / sum_i w_i`` over the checkpoints of a run (or of several runs from one initialisation).

    With ``anchor=a`` the running mean is drawn to the base after every checkpoint but the first, which is the
    initialisation: ``m_1 = W_1``, ``m_i = (1 - a) (m_(i-1) s_(i-1) + w_i W_i) / s_i + a W_0`` with
    ``s_i = w_1 + ... + w_i``. O(models x elements).
    """

    anchor: float = option(0.0, "share of the base mixed into the running mean at every checkpoint", ge=0.0, lt=1.0)

    about = About(
        title="Mean of the checkpoints of a training run",
        equation="W = sum_i w_i W_i / sum_i w_i",
        source="Free Lunch, 2023, arXiv:2305.16834; with an anchor: Zheng et al., ZSCL, 2023, arXiv:2303.06628",
        helps="Checkpoints at the ends of the epochs: more robust to hyperparameters than the last one, at no cost.",
        hurts="Checkpoints from before the run settled; adapters, whose two factors would be averaged separately.",
        work=3,
        deviations="ZSCL's running mean over (initialisation, snapshots) is anchor=0, its we_wise is anchor=0.02 with "
        "the model to stay near as base; its moving_avg changes the live model instead and is not offered.",
    )
    symmetric = False

    def requires(self, models: int) -> frozenset[str]:
        """The base, where it is the anchor or the scale is not 1."""
        return frozenset() if self.scale == 1 and self.anchor == 0 else frozenset({"base"})

    def shares(self, models: int) -> Sequence[float]:
        """Equal ones."""
        return [1.0] * models

    def coefficients(self, weights: Sequence[float]) -> list[float]:
        """Those of the running mean; what they lack to 1 is the base's."""
        if self.anchor == 0:
            return super().coefficients(weights)
        factors, total = [1.0], weights[0]
        for weight in weights[1:]:
            keep = (1 - self.anchor) / (total + weight)
            factors = [factor * total * keep for factor in factors] + [weight * keep]
            total += weight
        return factors

    def check(self, models: int, weights: Sequence[float]) -> None:
        """A running mean needs positive weights."""
        super().check(models, weights)
        if self.anchor > 0:
            check_positive(self, weights)

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The mean of one block, and the anchor's share."""
        if self.anchor == 0:
            return super().merge(block, state)
        factors = self.coefficients(block.weights)
        merged = combine(block, factors).add_(block.base, alpha=1 - math.fsum(factors))
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)
