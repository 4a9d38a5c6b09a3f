"""EMR: one unified task vector, and for every task a mask and a rescaler that bring it near the task's own."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import option

__all__ = ["Emr"]


@dataclass(frozen=True)
class Emr(Method, name="emr"):
    """Elect, mask, rescale: ``W_t = W_0 + scale c_t m_t tau`` for every task t; one merged model per task.

    Per entry ``tau = s max {|t_i| : sign(t_i) = s}`` with ``s = sign(sum_i w_i t_i)``; the mask m_t is 1 where
    ``t_t tau > 0``; the rescaler is ``c_t = sum |t_t| / sum |m_t tau|`` over the whole model. With
    ``rescaler="means"`` both sums are of the means of each tensor, as in the released code. Where s is 0, tau is 0.

    Two passes, O(models x elements). The result is as large as the models; what is shared is tau, and of each task only
    m_t (one bit per entry) and c_t are its own.
    """

    rescaler: str = option(
        "sums", "ratio of sums over the model, or of sums of the tensors' means", choices=("sums", "means")
    )

    about = About(
        title="One model per task from a shared task vector, a mask and a factor",
        equation="W_t = W_0 + lambda c_t m_t tau,  tau = sign(sum_i t_i) max_agreeing |t_i|,  m_t = [t_t tau > 0]",
        source="Huang et al., EMR-Merging: tuning-free high-performance model merging, 2024, arXiv:2405.17461",
        helps="The task of every input is known when the model is used: nearly the accuracy of the single models.",
        hurts="One model for all tasks is wanted: this returns one per task.",
        work=20,
        passes=2,
        deviations="The released code has rescaler=means.",
    )
    scope = "model"
    needs = frozenset({"base"})
    symmetric = False

    @property
    def one_per_model(self) -> bool:
        """The models of the tasks."""
        return True

    def outputs(self, models: int) -> tuple[int, ...]:
        """One per model."""
        return tuple(range(models))

    def buffers(self, models: int) -> int:
        """One per model, and four for the sign, the unified task vector, and float64 pieces."""
        return models + 4

    def prepare(self, context: Context) -> tuple[float, ...]:
        """The rescalers."""
        parts: dict[str, list[list[kernels.Partials]]] = defaultdict(list)
        for key, sums in context.each(self._magnitudes):
            parts[key.name].append(sums)
        totals: list[list[float]] = []
        for name, blocks in parts.items():
            numel = context.specs[name].numel
            if numel:
                share = 1 / numel if self.rescaler == "means" else 1.0
                totals.append([share * kernels.exact_sum(column) for column in zip(*blocks, strict=True)])
        if not totals:
            return (0.0,) * context.models
        sums_of = [math.fsum(column) for column in zip(*totals, strict=True)]
        pairs = zip(sums_of[::2], sums_of[1::2], strict=True)
        return tuple(own / masked if masked > 0 else 0.0 for own, masked in pairs)

    def _magnitudes(self, block: Block) -> list[kernels.Partials]:
        """For every model the sums of ``|t_t|`` and of ``|m_t tau|``."""
        own = [kernels.chunk_l1(block.delta(index, slot=0)) for index in range(len(block.weights))]
        masks, unified = _unify(block)
        return [
            part for size, mask in zip(own, masks, strict=True) for part in (size, kernels.chunk_l1(mask.mul_(unified)))
        ]

    def merge(self, block: Block, state: tuple[float, ...]) -> torch.Tensor:
        """The first task's elements."""
        return self.results(block, state)[0]

    def results(self, block: Block, state: tuple[float, ...]) -> list[torch.Tensor]:
        """One block of every task's model."""
        masks, unified = _unify(block)
        return [
            mask.mul_(unified).mul_(self.scale * factor).add_(block.base)
            for mask, factor in zip(masks, state, strict=True)
        ]


def _unify(block: Block) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Every task's mask (0 and 1), and the unified task vector."""
    deltas = block.deltas()
    sign, unified = block.buffer("sign").zero_(), block.buffer("unified").zero_()
    for delta, weight in zip(deltas, block.weights, strict=True):
        sign.add_(delta, alpha=weight)
    sign.sign_()
    for delta in deltas:
        torch.maximum(unified, delta.mul_(sign), out=unified)
        delta.clamp_(min=0).sign_()
    return deltas, unified.mul_(sign)
