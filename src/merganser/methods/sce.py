"""SCE: select what varies between the models, weigh the models by its energy, erase minority signs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from merganser import kernels
from merganser._torch import torch
from merganser.errors import Place, RecipeError
from merganser.kernels import Partials
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import option
from merganser.methods._select import Threshold, Values
from merganser.methods._tensor_select import tensor_thresholds

__all__ = ["Sce"]


@dataclass(frozen=True)
class _SceState:
    """What earlier passes found, by tensor: the threshold of the variance, and the share of every model."""

    thresholds: Mapping[str, Threshold]
    shares: Mapping[str, list[float]]


@dataclass(frozen=True)
class Sce(Method, name="sce"):
    """Select, calculate, erase; tensor by tensor.

    1. Select: of the entries whose variance over the models is not zero, the share `select` of largest variance; the
       others are dropped from all task vectors. With ``select=1`` everything stays. Of equal variances those are kept
       that come first.
    2. Calculate: ``c_i = w_i mean(t_i^2)`` over the tensor; ``c_i = w_i`` where the sum of the means is below
       `uniform_below`.
    3. Erase: ``s = sign(sum_i w_i t_i)``, + where that is zero; entries of another sign are dropped.
    4. ``W = W_0 + scale sum_i c_i t_i / sum_i c_i`` over the models whose entry is left.

    Exact: the threshold is found in an interval that a sample guesses and a pass verifies, the energies are float64
    sums. Two passes, three with a selection; O(models x elements).
    """

    select: float = option(1.0, "share of each tensor's varying entries that is kept", ge=0.0, le=1.0)

    uniform_below: float = option(0.0, "sum of the mean t_i^2 of a tensor below which all models weigh alike", ge=0.0)

    about = About(
        title="Select what varies, weigh models by their energy, erase minority signs",
        equation="W = W_0 + lambda sum_i c_i t_i / sum_i c_i over {i: sign t_i = sign sum_j t_j},  c_i = mean t_i^2",
        source="Wan et al., FuseChat, 2024, arXiv:2408.07990",
        helps="Chat models fused into one structure; the model that changed a matrix most decides on it.",
        hurts="One model with far larger task vectors: it silences the others.",
        work=16,
        passes=2,
        deviations="mergekit calls the option select_topk, and weighs models alike where the energies of a tensor add "
        "up to less than 1e-6, as those of many fine-tuned models do (uniform_below=1e-6).",
    )
    scope = "model"
    needs = frozenset({"base"})

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Weights multiply energies, so they cannot be negative."""
        super().check(models, weights)
        if min(weights) < 0 or max(weights) == 0:
            raise RecipeError(
                "E0307", f"the weights of `sce` must be positive, not {list(weights)}", places=Place(key="weight")
            )

    def passes(self) -> int:
        """Energies and merge; a selection ranks the variances before."""
        return 2 if self.select == 1 else 3

    def reads_stored(self) -> bool:
        """Always."""
        return True

    def buffers(self, models: int) -> int:
        """One per model, and five for sums, variances and masks."""
        return models + 5

    def prepare(self, context: Context) -> _SceState:
        """The thresholds of the variance, and the energies of what they leave."""
        thresholds = dict.fromkeys(context.specs, Threshold(0.0))
        if self.select < 1:
            found = tensor_thresholds(context, lambda name, n: [[int(n[0] * self.select)]], _VARIANCES, models=1)
            thresholds |= {name: threshold for name, ((threshold,),) in found.items()}
        shares: dict[str, list[float]] = {}
        state = _SceState(thresholds, shares)
        parts: dict[str, list[list[Partials]]] = defaultdict(list)
        for key, energies in context.each(lambda block: self._energies(block, state)):
            parts[key.name].append(energies)
        for name, pieces in parts.items():
            sums = [kernels.exact_sum(column) for column in zip(*pieces, strict=True)]
            largest = max(sums)
            alike = largest <= 0 or math.fsum(sums) < self.uniform_below * context.specs[name].numel
            shares[name] = [1.0 if alike else value / largest for value in sums]
        return state

    def _selected(self, block: Block, state: _SceState) -> list[torch.Tensor]:
        """The task vectors without what was not selected."""
        deltas = block.deltas()
        if self.select < 1:
            variance = state.thresholds[block.key.name].trim(_variance(block, deltas), block.key)
            kept = kernels.nonzero(variance)
            for delta in deltas:
                kernels.mask_(delta, kept)
        return deltas

    def _least(self, block: Block, state: _SceState) -> kernels.Wall | None:
        """The variance from which on entries are kept; None if all are."""
        return None if self.select == 1 else state.thresholds[block.key.name].wall(block.key)

    def _energies(self, block: Block, state: _SceState) -> list[Partials]:
        squares = [(index, index) for index in range(len(block.weights))]
        if (stored := block.stored()) is not None:
            return stored.products(squares, self._least(block, state))
        return kernels.ordered_products(self._selected(block, state), squares)

    def merge(self, block: Block, state: _SceState) -> torch.Tensor:
        """The weighted mean of what is left."""
        shares = state.shares[block.key.name]
        sizes = [weight * share for weight, share in zip(block.weights, shares, strict=True)]
        election = kernels.Disjoint(block.weights, sizes, factors=shares, scale=self.scale, counted=False)
        if (stored := block.stored()) is not None:
            election.merge_stored(stored, kernels.Limits(least=self._least(block, state)))
            return stored.out
        merged = block.buffer("total")
        election.merge(self._selected(block, state), block.base, merged)
        return merged


def _variance(block: Block, deltas: Sequence[torch.Tensor]) -> torch.Tensor:
    """The variance of the task vectors over the models, entry by entry, in a buffer."""
    return kernels.variance(deltas, block.buffer("variance"))


_VARIANCES = Values(
    lambda block, models: iter((_variance(block, block.deltas()),)),
    lambda stored, model, intervals: stored.variance_around(intervals),
)
