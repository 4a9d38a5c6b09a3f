"""Exact thresholds by rank over whole models or single tensors, streamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Bracket, RankCounter
from merganser.methods._base import Block, BlockKey, Context

__all__ = ["Threshold", "exact_thresholds", "magnitude_thresholds"]

Values = Callable[[Block, int], "torch.Tensor"]
"""What is ranked by magnitude: of a block and a model, in a buffer that may be overwritten."""

_SAMPLED_FROM = 1 << 24
_SHARE = 1 / 64
_MARGIN = 0.004


@dataclass(frozen=True)
class Threshold:
    """What is kept of one model's task vector: the magnitudes from `value` on.

    With a `quota`, only that many of the entries that equal `value` are kept, those of lowest position; `before`
    counts the equal ones in earlier blocks.
    """

    value: float
    quota: int | None = None
    before: Mapping[BlockKey, int] = field(default_factory=dict)

    def trim(self, delta: torch.Tensor, key: BlockKey) -> torch.Tensor:
        """Set the entries that are not kept to zero, in place.

        Returns:
            The mask of what is kept (uint8), without entries that were zero anyway.
        """
        if self.value > 0:
            tied = None
            if self.quota is not None:
                tied = torch.nonzero(kernels.equal_to(delta.abs(), self.value)).view(-1)
            kernels.trim_below_(delta, self.value)
            if tied is not None:
                delta[tied[max(0, (self.quota or 0) - self.before[key]) :]] = 0
        return kernels.nonzero(delta)


def _task_vector(block: Block, index: int) -> torch.Tensor:
    return block.delta(index, slot=0)


def exact_thresholds(
    context: Context, kept: Sequence[int], values: Values = _task_vector, *, per: int = 1
) -> tuple[Threshold, ...]:
    """Thresholds that keep so many entries of each model's task vector over all tensors of `context`.

    Of equal magnitudes those are kept that come first in the order of the blocks: of names, then of positions.

    Args:
        context: the tensors.
        kept: for each model the number of entries, or `per` of them.
        values: what is ranked instead of the task vectors.
        per: thresholds per model, one after the other.

    Complexity: that of `magnitude_thresholds`, and one pass more, which counts the equal magnitudes.
    """
    numel = context.numel
    found = [0.0] * len(kept)
    if numel:
        found = magnitude_thresholds(context, [min(numel - 1, max(0, numel - n)) for n in kept], values, per=per)
    found = [0.0 if n >= numel else value for n, value in zip(kept, found, strict=True)]
    larger, equal = [0] * len(kept), [0] * len(kept)
    before: list[dict[BlockKey, int]] = [{} for _ in kept]
    for key, counts in context.each(lambda block: _count_around(block, found, values, per)):
        for index, (above, tied) in enumerate(counts):
            before[index][key] = equal[index]
            larger[index] += above
            equal[index] += tied
    return tuple(
        Threshold(value, quota=n - above, before=seen) if n else Threshold(float("inf"))
        for value, n, above, seen in zip(found, kept, larger, before, strict=True)
    )


def _count_around(block: Block, thresholds: Sequence[float], values: Values, per: int) -> list[tuple[int, int]]:
    """For each model the numbers of magnitudes above its thresholds, and equal to them."""
    counts = []
    for index, threshold in enumerate(thresholds):
        if index % per == 0:
            magnitude = values(block, index // per).abs_()
        tied = int(kernels.equal_to(magnitude, threshold).sum())
        counts.append((int(kernels.at_least(magnitude, threshold).sum()) - tied, tied))
    return counts


def magnitude_thresholds(
    context: Context, ranks: Sequence[int], values: Values = _task_vector, *, per: int = 1
) -> list[float]:
    """For every model the task-vector magnitude of a given rank, over all tensors of `context`.

    Args:
        context: the tensors.
        ranks: for each model the 0-based rank in ascending order of ``|W_i - W_0|``, or `per` of them.
        values: what is ranked instead of the task vectors.
        per: ranks per model, one after the other.

    Returns:
        The magnitudes, exact: the same values as sorting all magnitudes would give.

    Complexity: two passes over the models for float32 (radix selection, 16 + 15 bits), one for more than 2^24
    elements (a sample of 1/64 gives the interval, the pass verifies it), four for float64; memory O(2^20) counters
    per model and thread.
    """
    top = kernels.top_key(context.dtype)
    bits = max(8, min(20, (context.counters // max(1, len(ranks))).bit_length() - 1))
    brackets = [Bracket(rank, 0, top, top, min(16, bits)) for rank in ranks]
    if context.numel >= _SAMPLED_FROM:
        counters = _count(context, brackets, values, per, share=_SHARE)
        brackets = [_guess(b, c, context.numel, bits) for b, c in zip(brackets, counters, strict=True)]
    while not all(bracket.found for bracket in brackets):
        counters = _count(context, brackets, values, per)
        brackets = [b if b.found else b.narrow(c) for b, c in zip(brackets, counters, strict=True)]
    keys = torch.tensor([bracket.low for bracket in brackets], dtype=torch.int64)
    found: list[float] = keys.to(kernels.key_dtype(context.dtype)).view(context.dtype).tolist()
    return found


def _count(
    context: Context, brackets: Sequence[Bracket], values: Values, per: int, *, share: float = 1.0
) -> list[RankCounter]:
    """One pass that counts the magnitudes of every model whose key is not found yet."""
    counters = [RankCounter(bracket) for bracket in brackets]

    def count(block: Block) -> None:
        for model in range(len(brackets) // per):
            mine = [i for i in range(model * per, model * per + per) if not brackets[i].found]
            if mine:
                keys = kernels.magnitude_keys(values(block, model))
                for index in mine:
                    counters[index].add(keys)

    for _ in context.each(count, share=share):
        pass
    return counters


def _guess(bracket: Bracket, counter: RankCounter, numel: int, bits: int) -> Bracket:
    """The interval that holds the rank in a sample, with a margin on both sides."""
    expected = (bracket.rank + 0.5) / numel * counter.size
    margin = _MARGIN * counter.size
    low = bracket.narrow(counter, max(0, int(expected - margin))).low
    high = bracket.narrow(counter, min(counter.size - 1, int(expected + margin))).high
    # at least two keys wide, so that a full pass verifies it
    return replace(bracket, low=low, high=max(high, low + 2), bits=bits)
