"""Latest weight averaging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser.methods._base import About
from merganser.methods._combination import Combination
from merganser.methods._options import option

__all__ = ["Lawa"]


@dataclass(frozen=True)
class Lawa(Combination, name="lawa"):
    """``W = (1/k) sum`` of the last k checkpoints, which are given in order; of all where there are fewer than k.

    With a `stride` s only every s-th is taken, counted backwards from the last. Only those are read. O(k x elements).
    """

    k: int = option(5, "how many checkpoints are averaged", ge=1)
    stride: int = option(1, "take every how many-th, backwards from the last", ge=1)

    about = About(
        title="Mean of the last k checkpoints of a training run",
        equation="W = (1/k) sum_{j<k} W_(n - j s)",
        source="Kaddour, Latest weight averaging, 2022, arXiv:2209.14981",
        helps="Runs with a high learning rate, before it is decayed: widely spaced checkpoints of the last part.",
        hurts="Checkpoints that still improve fast: the older ones hold the mean back.",
        work=3,
    )
    symmetric = False

    def shares(self, models: int) -> Sequence[float]:
        """One for the last k at that stride, zero for the others."""
        chosen = range(models - 1, -1, -self.stride)[: self.k]
        return [float(index in chosen) for index in range(models)]
