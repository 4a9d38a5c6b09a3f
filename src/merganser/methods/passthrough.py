"""Pass a model through: for layers that are stacked, and for scaled tensors."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About, Method, State
from merganser.methods._block import Block
from merganser.methods._options import option

__all__ = ["Passthrough"]


@dataclass(frozen=True)
class Passthrough(Method, name="passthrough"):
    """``W = scale W_1``, of exactly one model (one per slice of a recipe).

    Here `scale` multiplies the weights themselves, not a task vector: with a filter, e.g. ``o_proj`` or ``down_proj``
    of a duplicated layer by 0. One pass, O(elements).
    """

    scale: float = option(1.0, "multiplies the weights")

    about = About(
        title="One model's weights as they are, or scaled; slices stack layers of several models",
        equation="W = lambda W_1",
        source="layer stacking, as in SOLAR, Kim et al., 2023, arXiv:2312.15166; mergekit",
        helps="Deeper models from layers of one or more, which are then trained on; removing or damping of blocks.",
        hurts="Used without further training: stacked layers rarely work as they are.",
        work=1,
    )
    arity = (1, 1)
    base_is_model = True

    def buffers(self, models: int) -> int:
        """The model."""
        return 1

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """The model's elements, times scale and weight."""
        factor = self.scale * block.weights[0]
        values = block.model(0, slot=0)
        return values if factor == 1 else values.mul_(factor)
