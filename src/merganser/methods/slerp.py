"""Spherical linear interpolation between two models."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Partials
from merganser.methods._base import About, Method, check_equal
from merganser.methods._block import Block, Context
from merganser.methods._options import option

__all__ = ["Slerp"]

_PARALLEL = 0.9995


@dataclass(frozen=True)
class Slerp(Method, name="slerp"):
    """``W = sin((1-t) theta)/sin(theta) W_a + sin(t theta)/sin(theta) W_b``, per tensor, theta the angle between them.

    Tensors whose cosine exceeds 0.9995 are interpolated linearly, as is usual. The poles are two models, or the base
    and one model. Two passes: one for the inner products of every tensor (float64, exact sums), one to merge.
    """

    t: float = option(0.5, "0 gives the first model (the base), 1 the second", ge=0.0, le=1.0)

    about = About(
        title="Interpolation of two models along the sphere, tensor by tensor",
        equation="W = [sin((1-t) theta) W_a + sin(t theta) W_b] / sin(theta)",
        source="Shoemake, Animating rotation with quaternion curves, 1985; popular through mergekit",
        helps="Two fine-tunes that should be blended with a knob.",
        hurts="More than two models; fine-tunes of one base are so parallel that it equals linear interpolation.",
        work=8,
        passes=2,
    )
    symmetric = False
    arity = (1, 2)

    def requires(self, models: int) -> frozenset[str]:
        """The base, where it is a pole or the scale is not 1."""
        return frozenset({"base"}) if models == 1 or self.scale != 1 else frozenset()

    def check(self, models: int, weights: Sequence[float]) -> None:
        """`t` says how much of each model is taken: there are no weights."""
        super().check(models, weights)
        check_equal(self, weights)

    def buffers(self, models: int) -> int:
        """The two poles, and the float64 copies of them during the first pass."""
        return 6

    def prepare(self, context: Context) -> dict[str, float]:
        """The cosine of every tensor's two poles."""
        cosines: dict[str, float] = {}
        parts: dict[str, list[list[Partials]]] = defaultdict(list)
        for key, dots in context.each(_inner_products):
            parts[key.name].append(dots)
        for name, pieces in parts.items():
            dot, first, second = (kernels.exact_sum(column) for column in zip(*pieces, strict=True))
            norm = math.sqrt(first) * math.sqrt(second)
            cosines[name] = dot / norm if norm > 0 else 1.0
        return cosines

    def merge(self, block: Block, state: Mapping[str, float]) -> torch.Tensor:
        """The combination of the two poles."""
        first, second = _poles(block)
        first_share, second_share = _shares(state[block.key.name], self.t)
        merged = second.mul_(second_share).add_(first, alpha=first_share)
        if self.scale == 1:
            return merged
        return merged.sub_(block.base).mul_(self.scale).add_(block.base)


def _poles(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    if len(block.weights) == 1:
        return block.base, block.model(0, slot=0)
    return block.model(0, slot=0), block.model(1, slot=1)


def _inner_products(block: Block) -> list[Partials]:
    return kernels.chunk_products(_poles(block), ((0, 1), (0, 0), (1, 1)))


def _shares(cosine: float, t: float) -> tuple[float, float]:
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    theta = math.acos(cosine)
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
