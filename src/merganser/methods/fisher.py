"""Fisher merging: every weight is averaged by how much each model's task depends on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Partials
from merganser.methods._base import About, Method, check_normalisable
from merganser.methods._block import Block, Context
from merganser.methods._matching import check_sign
from merganser.methods._options import option

__all__ = ["Fisher"]

_LARGEST_EXPONENT = 64


@dataclass(frozen=True)
class Fisher(Method, name="fisher"):
    """``W = sum_i c_i F_i W_i / sum_i c_i F_i`` per weight: the metric of model i is the diagonal of its Fisher.

    ``F_i`` is the mean over examples of the squared gradient, raised to `floor` where it is smaller (in all models, or
    in the first, the target, or in the others, the donors). ``c_i = w_i``, divided by the Euclidean norm of model i's
    whole Fisher before the floor if `normalize`. Where all ``c_i F_i`` are 0, and for tensors without a Fisher, the
    result is the weighted mean.

    One pass for the norms, one to merge. O(models x elements).
    """

    floor: float = option(1e-6, "least value of a Fisher entry", ge=0.0)
    floor_on: str = option("all", "whose Fisher is floored", choices=("all", "donors", "target"))
    normalize: bool = option(True, "divide each Fisher by its norm over all tensors")

    about = About(
        title="Average weighted per entry by the diagonal Fisher information",
        equation="W = sum_i c_i F_i W_i / sum_i c_i F_i,  c_i = w_i / ||F_i||",
        source="Matena and Raffel, Merging models with Fisher-weighted averaging, 2022, arXiv:2111.09832",
        helps="Few labelled (or unlabelled, with sampled labels) examples per task; cheap at merge time.",
        hurts="Many tasks at once: correlations between weights matter, and RegMean or MaTS see them.",
        work=8,
        passes=2,
        deviations="The authors floor only the target by default (floor_on=target); other codes add a constant "
        "instead, and several square the gradient of a batch, which is not a Fisher.",
    )
    needs = frozenset({"fisher"})
    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base too, where the scale is not 1."""
        return self.needs if self.scale == 1 else self.needs | {"base"}

    def passes(self) -> int:
        """The weights are read once; the first pass reads Fishers alone."""
        return 1

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero, because tensors without a Fisher are averaged."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def prepare(self, context: Context) -> list[float]:
        """The factor ``1 / ||F_i||`` of every model (1 for a Fisher of zeros)."""
        if not self.normalize:
            return [1.0] * context.models
        parts: list[list[Partials]] = [[] for _ in range(context.models)]
        for _, squares in context.each(self._squares):
            for own, part in zip(parts, squares, strict=False):
                own.append(part)
        norms = [math.sqrt(kernels.exact_sum(own)) for own in parts]
        factors = [1 / norm if norm > 0 else 1.0 for norm in norms]
        # only their ratios count; those of denormal Fishers would be infinite in float32
        _, exponent = math.frexp(max(factors, default=1.0))
        return factors if exponent < _LARGEST_EXPONENT else [math.ldexp(factor, -exponent) for factor in factors]

    def merge(self, block: Block, state: list[float]) -> torch.Tensor:
        """The weighted sums of one block, and their quotient."""
        total, mass, mean = block.buffer("total").zero_(), block.buffer("mass").zero_(), block.buffer("mean").zero_()
        divisor = math.fsum(block.weights)
        for index, weight in enumerate(block.weights):
            model = block.model(index, slot=0)
            mean.add_(model, alpha=weight / divisor)
            fisher = self._fisher(block, index)
            if fisher is None:
                continue
            check_sign(block, index, fisher)
            if self.floor_on == "all" or (self.floor_on == "target") == (index == 0):
                fisher = fisher.clamp(min=self.floor)
            fisher = fisher * (weight * state[index])
            mass.add_(fisher)
            total.addcmul_(fisher, model)
        known = mass != 0
        merged = torch.where(known, total.div_(mass.masked_fill_(~known, 1.0)), mean)
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)

    def buffers(self, models: int) -> int:
        """The model, its Fisher, three sums, masks and the quotient."""
        return 8

    def _fisher(self, block: Block, index: int) -> torch.Tensor | None:
        """The Fisher of a model."""
        return block.statistic("fisher", index)

    def _squares(self, block: Block) -> list[Partials]:
        values = [self._fisher(block, index) for index in range(len(block.weights))]
        return [kernels.chunk_squares(value) for value in values if value is not None]
