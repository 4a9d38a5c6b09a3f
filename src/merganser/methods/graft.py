"""Grafting: take only a masked part of each task vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.errors import Place, RecipeError
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import Tensors, option, tensors_option
from merganser.methods._select import Values, select

__all__ = ["Graft"]


@dataclass(frozen=True)
class Graft(Method, name="graft"):
    """``W = W_0 + scale sum_i w_i g_i t_i`` with a mask g_i in [0, 1] per entry.

    The mask is the option `mask` (`merganser.training.train_graft_mask` trains one): one for all models, or one for
    each; tensors that it lacks stay the base's. Without it the mask of a model is 1 where ``|t_i|`` exceeds the
    smallest of its ``int(density N)`` largest magnitudes, N the entries of all tensors but embeddings and the output
    head, which stay the base's. So one entry fewer is kept than `density` says, as in the released code, and none of
    those that equal the threshold.

    One pass with a mask; radix selection needs two more. O(models x elements).
    """

    mask: Tensors | tuple[Tensors, ...] | None = tensors_option("entries in [0, 1] by tensor name")
    density: float = option(0.01, "without a mask: share of the largest changes that is taken", gt=0.0, le=1.0)

    about = About(
        title="Take only a masked part of each task vector",
        equation="W = W_0 + lambda sum_i g_i t_i",
        source="Panigrahi et al., Task-specific skill localization in fine-tuned models, 2023, arXiv:2302.06600",
        helps="A trained mask of about 0.01 % of the entries recovers most of a task and disturbs the rest little.",
        hurts="No mask was trained: the largest changes alone carry less of the task.",
        work=8,
        passes=3,
    )
    scope = "model"
    needs = frozenset({"base"})

    def passes(self) -> int:
        """Thresholds are needed only without a mask."""
        return 1 if self.mask is not None else 3

    def buffers(self, models: int) -> int:
        """One task vector, a mask, magnitudes, and the sum."""
        return 4

    def prepare(self, context: Context) -> tuple[float, ...]:
        """Without a mask, the magnitude that entries of each model must exceed."""
        if self.mask is not None:
            return ()
        numel = sum(spec.numel for spec in context.specs.values() if _grafted(spec))
        count = int(self.density * numel)
        if not count:
            return (math.inf,) * context.models

        def values(block: Block, models: Sequence[int]) -> Iterator[torch.Tensor]:
            length = None if _grafted(block.spec) else 0
            return (block.delta(index, slot=0)[:length] for index in models)

        found = select(context, [[numel - count]] * context.models, Values(values), numel=numel)
        return tuple(own for (own,) in found)

    def merge(self, block: Block, state: tuple[float, ...]) -> torch.Tensor:
        """The base plus the masked task vectors."""
        total = block.buffer("total").zero_()
        for index, weight in enumerate(block.weights):
            if state:
                if _grafted(block.spec):
                    # hardshrink keeps the magnitudes above its limit
                    delta = block.delta(index, slot=0)
                    total.add_(torch.hardshrink(delta, state[index], out=delta), alpha=weight)
                continue
            mask = block.tensor("mask", index)
            if mask is not None:
                _check_mask(block, mask)
                total.add_(block.delta(index, slot=0).mul_(mask), alpha=weight)
        return total.mul_(self.scale).add_(block.base)


def _grafted(spec: BlockSpec) -> bool:
    return spec.role not in (Role.EMBEDDING, Role.HEAD)


def _check_mask(block: Block, mask: torch.Tensor) -> None:
    """Raises a RecipeError (E0306) for entries outside of [0, 1]."""
    if mask.numel() and not (float(mask.min()) >= 0 and float(mask.max()) <= 1):
        raise RecipeError(
            "E0306",
            f"the mask has entries outside of [0, 1]: {float(mask.min()):g} to {float(mask.max()):g}",
            places=Place(tensor=block.key.name, key="mask"),
        )
