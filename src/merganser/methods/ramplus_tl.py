"""RAM+, tensor-local: what one model alone changed is amplified by how much it shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method, check_positive
from merganser.methods._block import Block, Context
from merganser.methods._options import option
from merganser.methods.ram import changed

__all__ = ["RamPlusTL"]

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RamPlusTL(Method, name="ramplus_tl"):
    """`ram`, but an entry that only model i changed is multiplied by ``1 + r min(rho_i, alpha)``.

    ``rho_i`` is, in the same tensor, the number of entries that model i and others changed over the number that it
    alone changed. Two passes, O(models x elements).
    """

    epsilon: float = option(1e-5, "changes up to this magnitude count as none", ge=0.0)
    r: float = option(0.1, "how strongly unique changes are amplified", ge=0.0)
    alpha: float = option(0.2, "bound on the ratio of shared to unique changes", ge=0.0)

    about = About(
        title="RAM with unique changes amplified by each model's overlap with the others, per tensor",
        equation="W = W_0 + lambda sum_i c_i t_i,  c_i = 1 + r min(rho_i, alpha) where t_i is unique, else 1/count",
        source="Yuan et al., Behavior knowledge merge in reinforced agentic models (RAM), 2026, arXiv:2601.13572",
        helps="As `ram`, where averaging the shared entries weakens a model that shares much.",
        hurts="Dense task vectors: everything is shared.",
        work=14,
        passes=2,
    )
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The changes of every model, the sum, counts, weights and masks."""
        return models + 5

    def check(self, models: int, weights: Sequence[float]) -> None:
        """A mean over any of the models needs positive weights."""
        super().check(models, weights)
        check_positive(self, weights)

    def prepare(self, context: Context) -> dict[str, list[float]]:
        """Per tensor the factor of each model's unique changes."""
        counts: dict[str, Counts] = {name: np.zeros((context.models, 2), dtype=np.int64) for name in context.specs}
        for key, found in context.each(self._count):
            counts[key.name] += found
        return {name: [self._factor(int(u), int(s)) for u, s in table] for name, table in counts.items()}

    def _factor(self, unique: int, shared: int) -> float:
        return 1 + self.r * min(shared / unique, self.alpha) if unique else 1.0

    def _count(self, block: Block) -> Counts:
        """For every model the numbers of entries that it alone changed, and that others changed too."""
        masks = [kernels.nonzero(changed(block, index, self.epsilon)) for index in range(len(block.weights))]
        alone = _alone(masks)
        found = [(int((mask & alone).sum()), int(mask.sum())) for mask in masks]
        return np.array([(unique, total - unique) for unique, total in found], dtype=np.int64)

    def merge(self, block: Block, state: Mapping[str, Sequence[float]]) -> torch.Tensor:
        """The base plus the mean of the changes, the unique ones amplified."""
        total, counted = block.buffer("total").zero_(), block.buffer("counted").zero_()
        unique = block.buffer("unique").zero_()
        masks = []
        for index, (weight, factor) in enumerate(zip(block.weights, state[block.key.name], strict=True)):
            change = changed(block, index, self.epsilon)
            mask = kernels.nonzero(change)
            total.add_(change, alpha=weight)
            counted.add_(mask, alpha=weight)
            unique.add_(change, alpha=factor)
            masks.append(mask)
        total.div_(counted.clamp_(min=min(block.weights)))
        merged = torch.where(_alone(masks).bool(), unique, total)
        return merged.mul_(self.scale).add_(block.base)


def _alone(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Where exactly one mask is 1 (uint8)."""
    any_, several = masks[0].clone(), torch.zeros_like(masks[0])
    for mask in masks[1:]:
        several |= any_ & mask
        any_ |= mask
    return any_ & ~several & 1
