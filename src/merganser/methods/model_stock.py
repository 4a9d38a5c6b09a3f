"""Model Stock: the point between the base and the average that the angles of the models suggest."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.kernels import Partials
from merganser.methods._base import About, Method, check_normalisable
from merganser.methods._block import Block, Context
from merganser.methods._options import option

__all__ = ["ModelStock"]

_SINGULAR = 1e-12


@dataclass(frozen=True)
class ModelStock(Method, name="model_stock"):
    """``W = W_0 + scale r t`` with t the mean task vector and ``r = n c / (1 + (n - 1) c)``, tensor by tensor.

    c is the mean over all pairs of models of the cosine between their task vectors (with ``pairs="angle"`` the cosine
    of the mean angle), over the whole tensor or, with `filter_wise`, for each row (the weights of one output) apart.
    A zero task vector has the cosine 0 with every other. Models that agree (c = 1) give their average, orthogonal
    ones the base. A negative mean cosine extrapolates away from the average; `clip` returns the base there. Where the
    task vectors of unit length cancel (``1 + (n - 1) c = 0``) the base is kept.

    With weights, t is the weighted mean, and the pairs still count alike. One model alone is kept whole.

    Cosines come from exact float64 sums. Two passes, one if `filter_wise`; O(models^2 x elements).
    """

    filter_wise: bool = option(False, "one ratio per row instead of one per tensor")
    pairs: str = option("cosine", "what is averaged over the pairs of models", choices=("cosine", "angle"))
    clip: bool = option(False, "keep the ratio r in [0, 1]")

    about = About(
        title="Between base and average, as near to the average as the models agree",
        equation="W = r mean_i W_i + (1 - r) W_0,  r = n c / (1 + (n - 1) c),  c = mean cosine of two task vectors",
        source="Jang et al., Model Stock, 2024, arXiv:2403.19522",
        helps="Two or three fine-tunes on the same task that differ by seed or schedule; no data, no tuning.",
        hurts="Models of different tasks: their task vectors are nearly orthogonal, so that little is left of them.",
        work=10,
        passes=2,
        deviations="FusionBench averages the angles (pairs=angle).",
    )
    scope = "model"
    needs = frozenset({"base"})

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Weights are normalised, so they must not sum to zero."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def passes(self) -> int:
        """One to measure tensors; rows are measured while merging."""
        return 1 if self.filter_wise else 2

    def buffers(self, models: int) -> int:
        """One per model, the sum, and float64 products of two of them."""
        return models + 7

    def reads_stored(self) -> bool:
        """Where tensors are measured whole."""
        return not self.filter_wise

    def row(self, spec: BlockSpec) -> int:
        """The weights of one output."""
        return _row(spec) if self.filter_wise else 1

    def prepare(self, context: Context) -> Mapping[str, float]:
        """The ratio of every tensor."""
        if self.filter_wise:
            return {}
        parts: dict[str, list[list[Partials]]] = defaultdict(list)
        for key, dots in context.each(_inner_products):
            parts[key.name].append(dots)
        ratios = {}
        for name, pieces in parts.items():
            sums = torch.tensor(
                [kernels.exact_sum(column) for column in zip(*pieces, strict=True)], dtype=torch.float64
            )
            ratios[name] = float(self._ratio(list(sums), context.models))
        return ratios

    def merge(self, block: Block, state: Mapping[str, float]) -> torch.Tensor:
        """A step from the base towards the average."""
        divisor = math.fsum(block.weights)
        alike = not self.filter_wise and all(weight == 1 for weight in block.weights)
        if (stored := block.stored() if alike else None) is not None:
            step = kernels.Sum(len(block.weights), self.scale * state[block.key.name] / divisor)
            step.merge_stored(stored, kernels.Limits())
            return stored.out
        total = block.buffer("total").zero_()
        if not self.filter_wise:
            for index, weight in enumerate(block.weights):
                total.add_(block.delta(index, slot=0), alpha=weight)
            return total.mul_(self.scale * state[block.key.name] / divisor).add_(block.base)
        deltas, row = block.deltas(), _row(block.spec)
        for delta, weight in zip(deltas, block.weights, strict=True):
            total.add_(delta, alpha=weight)
        dots = [kernels.row_dots(deltas[i], deltas[j], row) for i, j in _pairs(len(deltas))]
        ratio = self._ratio(dots, len(deltas)).mul_(self.scale / divisor).to(total.dtype)
        total.view(-1, row).mul_(ratio.unsqueeze(1))
        return total.add_(block.base)

    def _ratio(self, dots: Sequence[torch.Tensor], models: int) -> torch.Tensor:
        """The ratio r from the inner products of `_pairs`, each a number or one per row, in float64."""
        if models == 1:
            return torch.ones_like(dots[0])
        table = dict(zip(_pairs(models), dots, strict=True))
        cosine = torch.zeros_like(dots[0])
        for first, second in itertools.combinations(range(models), 2):
            norm = table[first, first].sqrt() * table[second, second].sqrt()
            one = torch.where(norm > 0, table[first, second] / norm, 0.0).clamp(-1, 1)
            cosine += one if self.pairs == "cosine" else torch.arccos(one)
        cosine /= math.comb(models, 2)
        if self.pairs == "angle":
            cosine = torch.cos(cosine)
        divisor = 1 + (models - 1) * cosine
        ratio = torch.where(divisor > _SINGULAR, models * cosine / divisor, 0.0)
        return ratio.clamp(0, 1) if self.clip else ratio


def _row(spec: BlockSpec) -> int:
    """The length of a row; a vector is one row."""
    return max(1, math.prod(spec.shape[1:]) if len(spec.shape) > 1 else spec.numel)


def _pairs(models: int) -> list[tuple[int, int]]:
    """All pairs of models, each with itself included."""
    return list(itertools.combinations_with_replacement(range(models), 2))


def _inner_products(block: Block) -> list[Partials]:
    pairs = _pairs(len(block.weights))
    if (stored := block.stored()) is not None:
        return stored.products(pairs)
    return kernels.ordered_products(block.deltas(), pairs)
