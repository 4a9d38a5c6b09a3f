"""Model breadcrumbs: drop the largest and the smallest changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from merganser import kernels
from merganser._torch import torch
from merganser.methods._base import About, Method
from merganser.methods._block import Block, BlockKey, Context, TransformedBlock
from merganser.methods._options import option, per_model
from merganser.methods._select import Threshold
from merganser.methods._stages import combination, l1_factors, second_stage, second_state
from merganser.methods._tensor_select import tensor_thresholds

__all__ = ["Breadcrumbs"]


@dataclass(frozen=True)
class _Bands:
    """What earlier passes found, by tensor: for every model the band of magnitudes that are kept, and a factor.

    Attributes:
        thresholds: of what is kept together with the outliers, and of the outliers.
        factors: that keep the L1 norm; None if it is not kept.
    """

    thresholds: Mapping[str, Sequence[tuple[Threshold, ...]]]
    factors: Mapping[str, list[float]] | None = None

    def cut(self, block: Block, index: int, delta: torch.Tensor) -> torch.Tensor:
        """What is kept of a task vector, in place."""
        outer, top = self.thresholds[block.key.name][index]
        outliers = block.buffer("outliers")
        outer.trim(delta, block.key)
        top.trim(outliers.copy_(delta), block.key)
        delta.sub_(outliers)
        return delta if self.factors is None else delta.mul_(self.factors[block.key.name][index])

    def limits(self, key: BlockKey) -> kernels.Limits:
        """The bands of a block."""
        floors, caps = zip(*((outer.wall(key), top.wall(key)) for outer, top in self.thresholds[key.name]), strict=True)
        return kernels.Limits(floors, caps)


@dataclass(frozen=True)
class Breadcrumbs(Method, name="breadcrumbs"):
    """``t_i' = m_i t_i``, where m_i drops the largest and the smallest magnitudes of each tensor; then a merge.

    Of n entries the ``int(gamma n)`` largest are dropped, and of the others the largest ``int(density n)`` are kept;
    where both do not fit, fewer of the largest are dropped. Of equal magnitudes the entry of the lower position counts
    as the larger one. ``count="mergellm"`` keeps ``int(density n) + 2`` as that code does: from rank ``b = int((1 -
    density - gamma) n)`` to rank ``b + int(density n) + 1``, both included.

    Then the sum of the task vectors, or TIES' election of signs and the mean of what agrees.

    Thresholds are exact: sought in an interval that a sample guesses and a pass verifies. One more pass to merge.
    O(models x elements).
    """

    density: float = option(0.9, "share of each tensor that is kept", ge=0.0, le=1.0, per_model=True)
    gamma: float = option(0.01, "share of largest changes that is dropped", ge=0.0, le=1.0, per_model=True)
    election: str = option("none", "whether a sign is elected per weight", choices=("none", "ties"))
    merge_: str = option("auto", "sum or mean; auto: the mean after an election", choices=("auto", "sum", "mean"))
    rescale: str = option("none", "keep the L1 norm of each tensor, or not", choices=("none", "l1"))
    count: str = option("exact", "how many entries a density keeps", choices=("exact", "mergellm"))

    about = About(
        title="Task vectors without their outliers and their small changes",
        equation="W = W_0 + lambda sum_i m_i t_i,  m_i drops the top gamma and the bottom 1 - density - gamma by |t_i|",
        source="Davari and Belilovsky, Model Breadcrumbs, 2023, arXiv:2312.06795",
        helps="Many tasks, and fine-tunes with a few very large changes.",
        hurts="Task vectors whose largest entries carry the task.",
        work=16,
        passes=2,
        deviations="mergekit empties tensors in which int(gamma n) is 0, and sums after an election (merge=sum) unless "
        "told to normalise; MergeLLM keeps two entries more (count=mergellm).",
    )
    scope = "model"
    needs = frozenset({"base"})

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Also what the merge asks for."""
        super().check(models, weights)
        self._second().check(models, weights)

    def passes(self) -> int:
        """The thresholds, the L1 norms if they are asked for, and the merge."""
        return 2 + (self.rescale == "l1")

    def buffers(self, models: int) -> int:
        """Those of the merge, and the outliers with their mask."""
        return self._second().buffers(models) + 3

    def _second(self) -> Method:
        return second_stage(self.election, self.merge_, self.scale)

    def kept(self, numel: int, model: int) -> tuple[int, int]:
        """How many of a tensor's entries are kept together with the outliers, and how many are outliers."""
        density, gamma = per_model(self.density, model), per_model(self.gamma, model)
        inside = int(density * numel)
        if self.count == "mergellm":
            bottom = int(round(1 - density - gamma, 12) * numel)
            outliers = max(0, numel - bottom - inside - 1)
            return numel - max(0, bottom - 1), outliers
        outliers = min(int(gamma * numel), numel - inside)
        return inside + outliers, outliers

    def reads_stored(self) -> bool:
        """If no norm is kept."""
        return self.rescale == "none"

    def prepare(self, context: Context) -> _Bands:
        """The thresholds of every tensor, and the L1 norms if they are asked for."""
        counts = {
            name: [self.kept(spec.numel, index) for index in range(context.models)]
            for name, spec in context.specs.items()
        }
        bands = _Bands(tensor_thresholds(context, lambda name, nonzero: counts[name]))
        return bands if self.rescale == "none" else replace(bands, factors=l1_factors(context, bands.cut))

    def merge(self, block: Block, state: _Bands) -> torch.Tensor:
        """The second stage on what is kept."""
        second = self._second()
        combined = combination(second, block.weights) if state.factors is None else None
        stored = None if combined is None else block.stored()
        if combined is not None and stored is not None:
            combined.merge_stored(stored, state.limits(block.key))
            return stored.out
        return second.merge(TransformedBlock(block, state.cut), second_state(second, len(block.weights)))

    def review(self, state: _Bands, notes: Mapping[str, int]) -> None:
        """Every block stands: an elected sign of 0 is +."""
