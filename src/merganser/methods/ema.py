"""Exponential moving average over saved checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser.methods._base import About
from merganser.methods._combination import Combination
from merganser.methods._options import option

__all__ = ["Ema"]


@dataclass(frozen=True)
class Ema(Combination, name="ema"):
    """``e_1 = W_1``, ``e_i = beta e_(i-1) + (1 - beta) W_i``; the checkpoints are given in order, ``W = e_n``.

    In closed form the shares are ``beta^(n-1), (1-beta) beta^(n-2), ..., (1-beta)``. With `debias` the average starts
    from zero and is divided by ``1 - beta^n``, so that the first checkpoint has no special share. Weights multiply the
    shares, which are then normalised. O(models x elements).
    """

    beta: float = option(0.9, "share of the average that stays at every checkpoint", ge=0.0, lt=1.0)
    debias: bool = option(False, "start from zero and divide by 1 - beta^n")

    about = About(
        title="Exponential moving average over the checkpoints of a training run",
        equation="e_i = beta e_(i-1) + (1 - beta) W_i",
        source="Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992",
        helps="Checkpoints saved during training, where no average was kept: later ones count more.",
        hurts="A beta for training steps (0.999) on a dozen checkpoints: the first would keep nearly all weight.",
        work=3,
    )
    symmetric = False

    def shares(self, models: int) -> Sequence[float]:
        """The closed form."""
        later = [(1 - self.beta) * self.beta ** (models - 1 - index) for index in range(models)]
        return later if self.debias else [self.beta ** (models - 1), *later[1:]]
