"""TACT: ACTMat with metrics from the largest entries of the task vectors."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About
from merganser.methods._options import option
from merganser.methods.actmat import ActMat

__all__ = ["Tact"]


@dataclass(frozen=True)
class Tact(ActMat, name="tact"):
    """As `actmat`, with ``C_i = s_i' s_i``, ``s_i`` the task vector without its smallest entries.

    Of n entries the ``n - int(n (1 - keep))`` of largest magnitude count.
    """

    keep: float = option(0.5, "share of each matrix of a task vector that makes the metric", gt=0.0, le=1.0)

    about = About(
        title="ACTMat with trimmed metrics",
        equation="T = (sum_i t_i s_i' s_i) (sum_i s_i' s_i)^+,  s_i = trim(t_i)",
        source="ACTMat / TACT, 2026, arXiv:2604.01329",
        helps="No data and no tuning, vision models: better than ACTMat there.",
        hurts="Inputs of the tasks are at hand: RegMean and MaTS use them.",
        work=10,
    )

    def _metric(self, vector: torch.Tensor) -> torch.Tensor:
        """``s' s``."""
        dropped = int(vector.numel() * (1 - self.keep))
        kept = vector.clone()
        if dropped:
            order = vector.abs().view(-1).argsort(stable=True)
            kept.view(-1)[order[:dropped]] = 0
        return kept.mT @ kept
