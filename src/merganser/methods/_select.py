"""Exact thresholds by rank over whole models or single tensors, streamed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from merganser import kernels
from merganser._torch import torch
from merganser.kernels import Bracket, RankCounter
from merganser.methods._block import Block, BlockKey, Context

__all__ = ["Threshold", "clear_thresholds", "exact_thresholds", "magnitude_thresholds", "select", "task_vectors"]

_SAMPLED_FROM = 1 << 24
_SHARE = 1 / 64
_MARGIN = 0.004
_CLEAR = 0.001


@dataclass(frozen=True)
class Values:
    """Numbers that belong to the entries of the models.

    Attributes:
        of: for a block and some models, one flat tensor for each of them; it may be overwritten before the next is
            taken.
        around: for a block as files have it, a model and intervals of keys, what `Stored.around` says of the numbers.
    """

    of: Callable[[Block, Sequence[int]], Iterator[torch.Tensor]]
    around: Callable[[kernels.Stored, int, Sequence[tuple[int, int]]], tuple[int, list[kernels.Around]]] | None = None

    def __call__(self, block: Block, models: Sequence[int]) -> Iterator[torch.Tensor]:
        """The numbers."""
        return self.of(block, models)


@dataclass(frozen=True)
class Threshold:
    """What is kept of one model's task vector: the magnitudes from `value` on.

    Where not all entries that equal `value` are kept, `ties` says how many of every block's are: those of lowest
    position.

    Attributes:
        value: the smallest magnitude that is kept.
        ties: for every block how many of its entries that equal `value` are kept, and how many there are; None if all
            are kept.
    """

    value: float
    ties: Mapping[BlockKey, tuple[int, int]] | None = None

    def floor(self, key: BlockKey, dtype: torch.dtype) -> float | None:
        """From which magnitude on the entries of a block are kept; None if only some of those that equal `value` are.

        Args:
            key: the block.
            dtype: of its entries.
        """
        wall = self.wall(key)
        if wall.ties < 0:
            return wall.value
        return None if wall.ties else kernels.next_above(wall.value, dtype)

    def wall(self, key: BlockKey) -> kernels.Wall:
        """What divides the magnitudes of a block: above it are those that are kept."""
        kept, equal = (0, 0) if self.ties is None else self.ties[key]
        return kernels.Wall(self.value, -1 if kept == equal or not self.value else kept)

    def trim(self, delta: torch.Tensor, key: BlockKey) -> torch.Tensor:
        """Set the entries that are not kept to zero, in place."""
        floor = self.floor(key, delta.dtype)
        if floor is None:
            tied = kernels.positions(kernels.equal_to(delta.abs(), self.value))
            delta[tied[self.wall(key).ties :]] = 0
            floor = self.value
        return kernels.trim_below_(delta, floor) if floor else delta


def _deltas(block: Block, models: Sequence[int]) -> Iterator[torch.Tensor]:
    return (block.delta(index, slot=0) for index in models)


task_vectors = Values(_deltas, lambda stored, model, intervals: stored.around(model, intervals))
"""The task vectors, one after the other in the same buffer."""


def exact_thresholds(
    context: Context, kept: Sequence[Sequence[int]], values: Values = task_vectors
) -> list[tuple[Threshold, ...]]:
    """Thresholds that keep so many entries of each model's task vector over all tensors of `context`.

    Of equal magnitudes those are kept that come first in the order of the blocks: of names, then of positions.

    Args:
        context: the tensors.
        kept: for each model one or several numbers of entries.
        values: what is ranked by magnitude.

    Returns:
        For each model one threshold for each of its numbers.

    Complexity: that of `select`, and one pass more, which counts the equal magnitudes.
    """
    numel = context.numel
    found = [[0.0] * len(own) for own in kept]
    if numel:
        found = select(context, [[min(numel - 1, max(0, numel - n)) for n in own] for own in kept], values)
    limits = [[0.0 if n >= numel else v for n, v in zip(*own, strict=True)] for own in zip(kept, found, strict=True)]
    counts = [[Tally() for _ in own] for own in kept]
    for key, pieces in context.each(lambda block: _count_around(block, limits, values)):
        for tallies, own in zip(counts, pieces, strict=True):
            for tally, (above, tied) in zip(tallies, own, strict=True):
                tally.add(key, above, tied)
    return [
        tuple(tally.threshold(value, n) for tally, value, n in zip(*own, strict=True))
        for own in zip(counts, limits, kept, strict=True)
    ]


@dataclass
class Tally:
    """The number of magnitudes above a value, and of those equal to it in every block."""

    above: int = 0
    equal: dict[BlockKey, int] = field(default_factory=dict)

    def add(self, key: BlockKey, above: int, equal: int) -> None:
        """Count the next block."""
        self.above += above
        self.equal[key] = equal

    def threshold(self, value: float, kept: int) -> Threshold:
        """What keeps that many entries."""
        if not kept:
            return Threshold(float("inf"))
        left, ties = kept - self.above, {}
        if left >= sum(self.equal.values()):
            return Threshold(value)
        for key, equal in self.equal.items():
            ties[key] = min(equal, left), equal
            left -= ties[key][0]
        return Threshold(value, ties)


def _count_around(block: Block, limits: Sequence[Sequence[float]], values: Values) -> list[list[tuple[int, int]]]:
    """For each model the numbers of magnitudes above each of its limits, and equal to it."""
    counts = []
    for numbers, own in zip(values(block, range(len(limits))), limits, strict=True):
        magnitude = numbers.abs_()
        tied = [kernels.count_ones(kernels.equal_to(magnitude, limit)) for limit in own]
        above = [kernels.count_ones(kernels.at_least(magnitude, limit)) for limit in own]
        counts.append([(upper - same, same) for upper, same in zip(above, tied, strict=True)])
    return counts


def magnitude_thresholds(context: Context, ranks: Sequence[int]) -> list[float]:
    """For every model the task-vector magnitude of a given rank, over all tensors of `context`.

    Args:
        context: the tensors.
        ranks: for each model the 0-based rank in ascending order of ``|W_i - W_0|``.

    Returns:
        The magnitudes, exact: the same values as sorting all magnitudes would give.

    Complexity: as for `select`.
    """
    return [found for (found,) in select(context, [[rank] for rank in ranks], task_vectors)]


def clear_thresholds(context: Context, ranks: Sequence[int]) -> list[float] | None:
    """What `magnitude_thresholds` returns in all likelihood, from a sample; None where the sample leaves it open.

    A magnitude is clear where so many are equal, as in differences of 16-bit weights, that ranks on both sides have it,
    too. To be sure, count the magnitudes below it and those that equal it: the rank has to lie among the latter.

    Args:
        context: the tensors.
        ranks: for each model the 0-based rank in ascending order.

    Complexity: 1/64 of a pass, twice.
    """
    if context.numel < _SAMPLED_FROM:
        return None
    top = kernels.top_key(context.dtype)

    def narrowed(bracket: Bracket, counter: RankCounter, off: float = 0.0) -> Bracket:
        place = ((bracket.rank + 0.5) / context.numel + off) * counter.size
        return replace(bracket.narrow(counter, min(max(0, int(place)), counter.size - 1)), bits=20)

    brackets = [[Bracket(rank, 0, top, top)] for rank in ranks]
    for _ in range(2):
        counters = _count(context, brackets, task_vectors, kernels.magnitude_keys, share=_SHARE)
        wide, brackets = brackets, _each(narrowed, brackets, counters)
    for (before,), (found,), (counter,) in zip(wide, brackets, counters, strict=True):
        if not found.found or any(narrowed(before, counter, off) != found for off in (-_CLEAR, _CLEAR)):
            return None
    return [kernels.key_value(found.low, context.dtype) for (found,) in brackets]


def select(
    context: Context, ranks: Sequence[Sequence[int]], values: Values, *, signed: bool = False, numel: int | None = None
) -> list[list[float]]:
    """For every model the values of given ranks among some numbers that belong to it, over all tensors of `context`.

    Args:
        context: the tensors.
        ranks: for each model 0-based ranks in ascending order.
        values: gives the numbers, of the compute type; the same bits in every pass, whatever the blocks.
        signed: order by the numbers themselves, not by their magnitudes.
        numel: how many numbers each model has; as many as elements if None.

    Returns:
        For each model its values (or magnitudes), exact: the same as sorting would give.

    Complexity: two passes over the models for float32 (radix selection, 16 + 16 bits), one for more than 2^24
    elements (a sample of 1/64 gives the interval, the pass verifies it), four for float64; memory O(2^20) counters
    per model and thread.
    """
    count = sum(len(own) for own in ranks)
    top = kernels.top_key(context.dtype)
    bits = max(8, min(20, (context.counters // max(1, count)).bit_length() - 1))
    bottom = 1 - top if signed else 0
    brackets = [[Bracket(rank, bottom, top, top, min(16, bits), bottom) for rank in own] for own in ranks]
    keys = kernels.signed_keys if signed else kernels.magnitude_keys
    if context.numel >= _SAMPLED_FROM:
        counters = _count(context, brackets, values, keys, share=_SHARE)
        total = context.numel if numel is None else numel
        brackets = _each(lambda b, c: _guess(b, c, total, bits), brackets, counters)
    while not all(bracket.found for own in brackets for bracket in own):
        counters = _count(context, brackets, values, keys)
        brackets = _each(lambda b, c: b if b.found else b.narrow(c), brackets, counters)
    return [[kernels.key_value(bracket.low, context.dtype) for bracket in own] for own in brackets]


def _each(
    fn: Callable[[Bracket, RankCounter], Bracket],
    brackets: Sequence[Sequence[Bracket]],
    counters: Sequence[Sequence[RankCounter]],
) -> list[list[Bracket]]:
    return [[fn(b, c) for b, c in zip(*own, strict=True)] for own in zip(brackets, counters, strict=True)]


def _count(
    context: Context,
    brackets: Sequence[Sequence[Bracket]],
    values: Values,
    keys: Callable[[torch.Tensor], torch.Tensor],
    *,
    share: float = 1.0,
) -> list[list[RankCounter]]:
    """One pass that counts the keys of every model some of whose keys are not found yet."""
    counters = [[RankCounter(bracket) for bracket in own] for own in brackets]
    wanted = [index for index, own in enumerate(brackets) if not all(bracket.found for bracket in own)]

    def count(block: Block) -> None:
        around = None if any(counter.full for index in wanted for counter in counters[index]) else values.around
        stored = None if around is None else block.stored()
        if stored is not None and around is not None:
            for index in wanted:
                size = stored.base.numel()
                intervals = [(bracket.low, bracket.high) for bracket in brackets[index]]
                for found, counter in zip(around(stored, index, intervals)[1], counters[index], strict=True):
                    counter.take(found.below, found.first, torch.from_numpy(found.inside), size)
            return
        for index, numbers in zip(wanted, values(block, wanted), strict=True):
            own = keys(numbers)
            for bracket, counter in zip(brackets[index], counters[index], strict=True):
                if not bracket.found:
                    counter.add(own)

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
