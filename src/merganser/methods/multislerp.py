"""Multi-SLERP: the normalised mean direction of several models, at their mean norm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merganser._torch import torch
from merganser.methods._base import About, Method, check_normalisable
from merganser.methods._block import Block, Context
from merganser.methods._combination import Matrix, combine, inner_products
from merganser.methods._options import option

__all__ = ["MultiSlerp"]


@dataclass(frozen=True)
class MultiSlerp(Method, name="multislerp"):
    """``W = d / |d| sum_i w_i |x_i|`` with ``d = sum_i w_i x_i / |x_i|``, per tensor.

    The x_i are the models, or their task vectors where a base is given, to which the result is then added. Where the
    directions cancel (``|d| <= eps``) it is ``sum_i w_i x_i``. Two passes, O(models^2 x elements).
    """

    normalize_weights: bool = option(True, "divide the weights by their sum")
    eps: float = option(1e-8, "norms up to this count as zero", ge=0.0)

    about = About(
        title="Normalised mean of the directions, times the mean norm, tensor by tensor",
        equation="W = W_0 + d/|d| sum_i w_i |t_i|,  d = sum_i w_i t_i/|t_i|",
        source="mergekit, multislerp, 2025",
        helps="Several task vectors of different lengths whose directions should count equally.",
        hurts="Task vectors that are nearly orthogonal: the mean direction is stretched by sqrt(models).",
        work=10,
        passes=2,
        deviations="With two models it is like slerp, but not slerp. Where directions cancel mergekit returns zeros.",
    )
    takes_base = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The models, and parts of them in float64 during the first pass."""
        return models + 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Weights that are normalised must not sum to zero."""
        super().check(models, weights)
        if self.normalize_weights:
            check_normalisable(self, weights)

    def prepare(self, context: Context) -> dict[str, Matrix]:
        """The inner products of every tensor's vectors."""
        return inner_products(context)

    def merge(self, block: Block, state: Mapping[str, Matrix]) -> torch.Tensor:
        """The combination of one block."""
        factors = self._coefficients(state[block.key.name], block.weights)
        merged = combine(block, factors, deltas=block.based)
        return merged.mul_(self.scale).add_(block.base) if block.based else merged

    def _coefficients(self, products: Matrix, weights: Sequence[float]) -> list[float]:
        shares = np.array(weights) / (math.fsum(weights) if self.normalize_weights else 1.0)
        norms = np.sqrt(np.diag(products))
        units = np.where(norms > self.eps, shares / np.maximum(norms, np.finfo(float).tiny), 0.0)
        length = math.sqrt(max(0.0, float(units @ products @ units)))
        factors = units / length * float(shares @ norms) if length > self.eps else shares
        return [float(factor) for factor in factors]
