"""Variance-corrected averaging: the mean with the models' variance restored."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method, check_positive
from merganser.methods._block import Block, Context
from merganser.methods._combination import combine
from merganser.methods._options import option

__all__ = ["VarianceCorrected"]

Moments = list[list[kernels.Partials]]


@dataclass(frozen=True)
class VarianceCorrected(Method, name="variance_corrected"):
    """``W = c (A - mean A) + mean A`` per tensor: the average A, stretched about its own mean value.

    ``A = sum_i a_i W_i``, ``c = sqrt((s^2 + eps) / (Var A + eps))``, ``s^2 = sum_i v_i Var W_i``, with unbiased
    variances over the tensor's entries and, by ``target``:

    ============ ================================ =================================
    target       a_i                              v_i
    ============ ================================ =================================
    others       weights, normalised              weights, normalised
    self         weights, normalised              the first model alone
    conservative gamma first + (1 - gamma) others gamma first + (1 - gamma) others
    ============ ================================ =================================

    Tensors of fewer than two entries, and (unless `vectors`) of fewer than two dimensions, are averaged. Two passes,
    O(models x elements).
    """

    eps: float = option(1e-12, "added to both variances", ge=0.0)
    target: str = option("others", "whose variance is restored", choices=("others", "self", "conservative"))
    gamma: float = option(0.5, "for target=conservative: the share of the first model", ge=0.0, le=1.0)
    vectors: bool = option(False, "also correct biases and norms")

    about = About(
        title="Average with the variance of the models restored, tensor by tensor",
        equation="W = sqrt((mean Var W_i + eps) / (Var A + eps)) (A - mean A) + mean A,  A = mean W_i",
        source="Tian et al., variance-corrected model averaging, 2024, arXiv:2404.04616",
        helps="Models that were trained apart (decentralised learning): averaging shrinks uncorrelated weights.",
        hurts="Fine-tunes of one base: their average keeps its variance, and this is the average.",
        work=12,
        passes=2,
        deviations="The authors' code has eps=1e-4, which is large beside the variance of language models' weights "
        "(4e-4), and corrects vectors too.",
    )
    symmetric = False
    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The average, a model, and their copies in float64."""
        return 8

    def check(self, models: int, weights: Sequence[float]) -> None:
        """A mean variance needs positive weights."""
        super().check(models, weights)
        check_positive(self, weights)

    def _shares(self, weights: Sequence[float]) -> tuple[list[float], list[float]]:
        """The a_i and the v_i."""
        total = math.fsum(weights)
        equal = [weight / total for weight in weights]
        if self.target == "others":
            return equal, equal
        first = [1.0] + [0.0] * (len(weights) - 1)
        if self.target == "self":
            return equal, first
        mixed = [self.gamma * one + (1 - self.gamma) * share for one, share in zip(first, equal, strict=True)]
        return mixed, mixed

    def prepare(self, context: Context) -> dict[str, tuple[float, float]]:
        """Per tensor the mean value of A and the stretch c, where that is more than what rounding A does."""
        parts: dict[str, list[tuple[Sequence[float], Moments]]] = defaultdict(list)
        for key, found in context.each(self._moments):
            if found is not None:
                parts[key.name].append(found)
        stretches = {name: self._stretch(context.specs[name].numel, pieces) for name, pieces in parts.items()}
        rounding = 4 * torch.finfo(context.dtype).eps
        return {name: pair for name, pair in stretches.items() if abs(pair[1] - 1) > rounding}

    def _moments(self, block: Block) -> tuple[Sequence[float], Moments] | None:
        """The v_i, and sums and sums of squares over chunks: of A, then of every model."""
        if block.spec.numel < 2 or (len(block.spec.shape) < 2 and not self.vectors):
            return None
        average, variance = self._shares(block.weights)
        moments = [_sums(combine(block, average))]
        moments += [_sums(block.model(index, slot=0)) for index in range(len(block.weights))]
        return variance, moments

    def _stretch(self, numel: int, pieces: Sequence[tuple[Sequence[float], Moments]]) -> tuple[float, float]:
        totals = [
            [kernels.exact_sum(column) for column in zip(*rows, strict=True)]
            for rows in zip(*(moments for _, moments in pieces), strict=True)
        ]
        own, *others = (max(0.0, squares - sums * sums / numel) / (numel - 1) for sums, squares in totals)
        target = math.fsum(v * variance for v, variance in zip(pieces[0][0], others, strict=True))
        factor = math.sqrt((target + self.eps) / (own + self.eps)) if own + self.eps > 0 else 1.0
        return totals[0][0] / numel, factor

    def merge(self, block: Block, state: Mapping[str, tuple[float, float]]) -> torch.Tensor:
        """The average of one block, stretched."""
        merged = combine(block, self._shares(block.weights)[0])
        centre, factor = state.get(block.key.name, (0.0, 1.0))
        if factor != 1:
            merged.mul_(factor).add_(centre * (1 - factor))
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)


def _sums(values: torch.Tensor) -> list[kernels.Partials]:
    return kernels.chunk_products((values, torch.ones_like(values)), ((0, 1), (0, 0)))
