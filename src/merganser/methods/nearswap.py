"""NearSwap: take a model's weights where they are near the base's."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block
from merganser.methods._options import option

__all__ = ["NearSwap"]


@dataclass(frozen=True)
class NearSwap(Method, name="nearswap"):
    """``W = W_0 + min(t / |d|, 1) d`` with ``d = W_1 - W_0``: every entry moves to the model, by at most t.

    That is ``W_0 + clamp(d, -t, t)``. One pass, O(elements).
    """

    t: float = option(0.001, "how far an entry may move", ge=0.0)

    about = About(
        title="Move the base's entries to the model's, by at most t each",
        equation="W = W_0 + clamp(W_1 - W_0, -t, t)",
        source="alchemonaut, QuartetAnemoi-70B-t0.0001, 2024; mergekit",
        helps="Small borrowings from one other model: t of the order of the typical difference.",
        hurts="Differences that matter are large, and are cut off.",
        work=3,
    )
    needs = frozenset({"base"})
    arity = (1, 1)

    def buffers(self, models: int) -> int:
        """The task vector."""
        return 1

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The base plus the clamped task vector, times its weight."""
        moved = block.delta(0, slot=0).clamp_(-self.t, self.t)
        return moved.mul_(self.scale * block.weights[0]).add_(block.base)
