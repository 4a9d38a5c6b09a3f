"""Exact thresholds by rank over whole models or single tensors, streamed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Bracket, RankCounter
from merganser.methods._base import Block, Context

__all__ = ["magnitude_thresholds"]

_SAMPLED_FROM = 1 << 24
_SHARE = 1 / 64
_MARGIN = 0.004


def magnitude_thresholds(context: Context, ranks: Sequence[int]) -> list[float]:
    """For every model the task-vector magnitude of a given rank, over all tensors of `context`.

    Args:
        context: the tensors.
        ranks: for each model the 0-based rank in ascending order of ``|W_i - W_0|``.

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
        counters = _count(context, brackets, share=_SHARE)
        brackets = [_guess(b, c, context.numel, bits) for b, c in zip(brackets, counters, strict=True)]
    while not all(bracket.found for bracket in brackets):
        counters = _count(context, brackets)
        brackets = [b if b.found else b.narrow(c) for b, c in zip(brackets, counters, strict=True)]
    keys = torch.tensor([bracket.low for bracket in brackets], dtype=torch.int64)
    values: list[float] = keys.to(kernels.key_dtype(context.dtype)).view(context.dtype).tolist()
    return values


def _count(context: Context, brackets: Sequence[Bracket], *, share: float = 1.0) -> list[RankCounter]:
    """One pass that counts the magnitudes of every model whose key is not found yet."""
    counters = [RankCounter(bracket) for bracket in brackets]

    def count(block: Block) -> None:
        for index, (bracket, counter) in enumerate(zip(brackets, counters, strict=True)):
            if not bracket.found:
                counter.add(kernels.magnitude_keys(block.delta(index, slot=0)))

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
