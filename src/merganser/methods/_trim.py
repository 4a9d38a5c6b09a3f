"""The trim of TIES: thresholds over a whole model or per tensor, and which of them are only presumed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from merganser.methods._block import BlockKey, Context
from merganser.methods._options import per_model
from merganser.methods._select import Threshold, clear_thresholds, exact_thresholds, magnitude_thresholds
from merganser.methods._tensor_select import tensor_guesses, tensor_thresholds

__all__ = ["Ranks", "Region", "Thresholds", "Trim"]

Region: TypeAlias = "str | None"
"""What a threshold and a majority sign belong to: a tensor, or the whole model (None)."""

Thresholds: TypeAlias = "dict[Region, tuple[Threshold, ...]]"
Ranks: TypeAlias = "dict[Region, list[int]]"
"""For each model the 0-based rank of a threshold among all magnitudes of a region, the smallest first."""


@dataclass(frozen=True)
class Trim:
    """Which entries of task vectors are kept: those of largest magnitude.

    Attributes:
        density: the share that is kept, of all models or of each.
        by_tensor: whether that is a share of every tensor, or of the whole model.
        exact: whether just so many are kept, or all from the authors' threshold on.
    """

    density: float | tuple[float, ...]
    by_tensor: bool
    exact: bool

    def region(self, key: BlockKey) -> Region:
        """What a block belongs to."""
        return key.name if self.by_tensor else None

    def _kept(self, numel: int, models: int) -> list[int]:
        """How many entries of each model are kept, without the authors' one more."""
        return [int(numel * per_model(self.density, index)) for index in range(models)]

    def _ranks(self, numel: int, models: int) -> list[int]:
        """Of the thresholds: the authors' k-th smallest (1-based) with k = d - kept has the 0-based rank k - 1."""
        return [min(max(0, numel - n - 1), numel - 1) for n in self._kept(numel, models)]

    def thresholds(self, context: Context, *, presume: bool) -> tuple[Thresholds, Ranks]:
        """Those of all regions, and the ranks of those that are presumed, if they may be."""
        whole: Thresholds = {}
        for region, numel in self._sizes(context).items():
            if all(n >= numel for n in self._kept(numel, context.models)):
                whole[region] = (Threshold(0.0),) * context.models
        if not self.by_tensor:
            return (whole, {}) if whole else self._of_model(context, presume)
        trimmed = [name for name in context.specs if name not in whole]
        thresholds, ranks = self._of_tensors(context.only(*trimmed), presume) if trimmed else ({}, {})
        return whole | thresholds, ranks

    def _sizes(self, context: Context) -> dict[Region, int]:
        if not self.by_tensor:
            return {None: context.numel}
        return {name: spec.numel for name, spec in context.specs.items()}

    def _of_model(self, context: Context, presume: bool) -> tuple[Thresholds, Ranks]:
        numel = context.numel
        kept, ranks = self._kept(numel, context.models), self._ranks(numel, context.models)
        clear = clear_thresholds(context, ranks) if presume and all(n < numel for n in kept) else None
        if clear is not None:
            return {None: tuple(map(Threshold, clear))}, {None: ranks}
        if self.exact:
            return {None: tuple(own for (own,) in exact_thresholds(context, [[n] for n in kept]))}, {}
        values = magnitude_thresholds(context, ranks)
        values = [0.0 if n >= numel else value for n, value in zip(kept, values, strict=True)]
        return {None: tuple(map(Threshold, values))}, {}

    def _of_tensors(self, context: Context, presume: bool) -> tuple[Thresholds, Ranks]:
        more = 0 if self.exact else 1
        counts = {
            name: [[n + more] for n in self._kept(spec.numel, context.models)] for name, spec in context.specs.items()
        }
        thresholds: Thresholds = {}
        ranks: Ranks = {}
        guesses = tensor_guesses(context, lambda name, nonzero: counts[name], presume=presume)
        for name, guess in guesses.items() if presume else ():
            clear = [value for (value,) in guess.clear if value is not None]
            if len(clear) == context.models:
                thresholds[name] = tuple(map(Threshold, clear))
                ranks[name] = self._ranks(context.specs[name].numel, context.models)
        if open_ := [name for name in context.specs if name not in thresholds]:
            found = tensor_thresholds(context.only(*open_), lambda name, nonzero: counts[name], guesses=guesses)
            for name, own in found.items():
                exact = tuple(threshold for (threshold,) in own)
                thresholds[name] = exact if self.exact else tuple(Threshold(t.value) for t in exact)
        return thresholds, ranks
