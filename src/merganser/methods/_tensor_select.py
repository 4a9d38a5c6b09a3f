"""Exact thresholds by rank in every tensor of a model, from a sample and one pass over all tensors together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser.methods._block import Block, BlockKey, Context
from merganser.methods._select import Tally, Threshold, Values, exact_thresholds, task_vectors

__all__ = ["Guess", "tensor_guesses", "tensor_thresholds"]

_SHARE = 1 / 16
_SAMPLED_FROM = 1 << 17
_ENOUGH, _SORTED = 1 << 20, 1 << 17
"""Entries of a sample of each model, and of those that are sorted: twice as many or fewer."""

_DEVIATIONS = 6.0
_CLEAR_DEVIATIONS = 1.5
"""Standard deviations of a rank in a sample: for an interval that is to hold a threshold, and for a clear one."""

Array = npt.NDArray[np.floating]
Interval = tuple[float, float]
"""Magnitudes from the first number on and below the second, among which a threshold is sought."""

Kept = Callable[[str, Sequence[int]], "Sequence[Sequence[int]]"]
"""For a tensor and the number of its nonzero entries in each model: how many to keep in each model."""


@dataclass(frozen=True)
class Guess:
    """What a sample says of the thresholds of a tensor.

    Attributes:
        intervals: for each model where each of its thresholds is sought.
        clear: for each model each of its thresholds, where so many magnitudes are equal that ranks on both sides have
            it, too; None elsewhere. A sample errs now and then: be sure before you rely on it.
    """

    intervals: Sequence[Sequence[Interval]]
    clear: Sequence[Sequence[float | None]]


def tensor_thresholds(
    context: Context,
    kept: Kept,
    values: Values = task_vectors,
    models: int | None = None,
    guesses: Mapping[str, Guess] | None = None,
) -> dict[str, list[tuple[Threshold, ...]]]:
    """For every tensor what `exact_thresholds` of that tensor alone returns.

    A sample of every larger tensor gives an interval of magnitudes for each threshold; then one pass counts what lies
    above it and keeps what lies inside, where the threshold is found. A tensor whose interval proves wrong is passed
    over again.

    Args:
        context: the tensors.
        kept: how many entries to keep.
        values: what is ranked by magnitude.
        models: how many task vectors are ranked; all models' if None.
        guesses: of `tensor_guesses`, where it was called before.

    Complexity: one pass, and 1/16 of one for the sample. Memory: the entries inside the intervals of a few tensors.
    """
    count = context.models if models is None else models
    sampled = tensor_guesses(context, kept, values, count) if guesses is None else guesses

    def count_block(block: Block) -> list[_Piece]:
        return list(_pieces(block, sampled[block.key.name].intervals, values))

    found: dict[str, list[tuple[Threshold, ...]]] = {}
    name, seen = "", _Tensor([])
    for key, pieces in context.each(count_block):
        if key.name != name:
            if name:
                found[name] = seen.finish(context, name, kept, values)
            name, seen = key.name, _Tensor([[] for _ in range(count)])
        for own, piece in zip(seen.models, pieces, strict=True):
            own.append((key, piece))
    if name:
        found[name] = seen.finish(context, name, kept, values)
    return found


@dataclass(frozen=True)
class _Inside:
    """The positive magnitudes of a block inside an interval, and how often each was met; once if `counts` is None."""

    values: Array
    counts: npt.NDArray[np.int64] | None

    @classmethod
    def of(cls, found: Array, size: int, first: tuple[float, int] = (0.0, 0)) -> _Inside:
        """Those of a block. Where they are many, as in coarse task vectors, equal ones are kept together.

        Args:
            found: magnitudes.
            size: of the block.
            first: a magnitude below all of these, and how often it was met beside them.
        """
        value, times = first
        if found.size + times <= max(1 << 14, size >> 4):
            return cls(np.append(found, np.full(times, value, found.dtype)), None)
        values, counts = np.unique(found, return_counts=True)
        return (
            cls(np.append(values, found.dtype.type(value)), np.append(counts, times)) if times else cls(values, counts)
        )

    def count(self, mask: npt.NDArray[np.bool_]) -> int:
        """How many of them a mask selects."""
        return int(np.count_nonzero(mask) if self.counts is None else self.counts[mask].sum())


@dataclass(frozen=True)
class _Piece:
    """Of one model's magnitudes in a block: how many are not zero, are above each interval, and those inside."""

    nonzero: int
    above: tuple[int, ...]
    inside: tuple[_Inside, ...]


def _pieces(block: Block, intervals: Sequence[Sequence[Interval]], values: Values) -> Iterator[_Piece]:
    stored = None if values.around is None else block.stored()
    if stored is not None:
        yield from (_stored_piece(stored, index, own, values) for index, own in enumerate(intervals))
        return
    for numbers, own in zip(values(block, range(len(intervals))), intervals, strict=True):
        magnitude = numbers.abs_()
        above, inside = [], []
        for low, high in own:
            upper = 0 if math.isinf(high) else kernels.count_ones(kernels.at_least(magnitude, high))
            above.append(upper)
            inside.append(_Inside.of(kernels.between(magnitude, low, high), magnitude.numel()))
        yield _Piece(kernels.count_ones(kernels.nonzero(magnitude)), tuple(above), tuple(inside))


def _stored_piece(stored: kernels.Stored, model: int, intervals: Sequence[Interval], values: Values) -> _Piece:
    """The same of a block as files have it."""
    assert values.around is not None
    size, above, inside = stored.base.numel(), [], []
    keys = [(kernels.value_key(low), kernels.value_key(high)) for low, high in intervals]
    zeros, found = values.around(stored, model, keys)
    for around, (low, high) in zip(found, intervals, strict=True):
        lower = around.below + around.first + around.inside.size
        above.append(0 if math.isinf(high) else size - lower)
        # zeros are no magnitudes to choose among
        inside.append(_Inside.of(around.inside.view(np.float32), size, (low, around.first if low > 0 else 0)))
    return _Piece(size - zeros, tuple(above), tuple(inside))


@dataclass
class _Tensor:
    """The pieces of one tensor, for each model in the order of the blocks."""

    models: list[list[tuple[BlockKey, _Piece]]] = field(default_factory=list)

    def finish(self, context: Context, name: str, kept: Kept, values: Values) -> list[tuple[Threshold, ...]]:
        """The thresholds of the tensor."""
        wanted = kept(name, [sum(piece.nonzero for _, piece in own) for own in self.models])
        result: list[tuple[Threshold, ...]] = []
        for own, numbers in zip(self.models, wanted, strict=True):
            thresholds = [_threshold(own, index, count) for index, count in enumerate(numbers)]
            if None in thresholds:
                return exact_thresholds(context.only(name), wanted, values)
            result.append(tuple(found for found in thresholds if found is not None))
        return result


def _threshold(pieces: Sequence[tuple[BlockKey, _Piece]], index: int, kept: int) -> Threshold | None:
    """The threshold that keeps so many magnitudes, or None if it does not lie in the interval."""
    if kept <= 0:
        return Threshold(float("inf"))
    if kept >= sum(piece.nonzero for _, piece in pieces):
        return Threshold(0.0)
    above = sum(piece.above[index] for _, piece in pieces)
    value = _ranked_from_above([piece.inside[index] for _, piece in pieces], kept - above)
    if value is None:
        return None
    tally = Tally()
    for key, piece in pieces:
        inside = piece.inside[index]
        larger, equal = inside.count(inside.values > value), inside.count(inside.values == value)
        tally.add(key, piece.above[index] + larger, equal)
    return tally.threshold(value, kept)


def _ranked_from_above(parts: Sequence[_Inside], rank: int) -> float | None:
    """The value of 1-based rank from above among all parts; None if there is no such rank."""
    values = np.concatenate([part.values for part in parts])
    if all(part.counts is None for part in parts):
        place = values.size - rank
        return float(np.partition(values, place)[place]) if 0 <= place < values.size else None
    counts = np.concatenate([np.ones(p.values.size, np.int64) if p.counts is None else p.counts for p in parts])
    order = np.argsort(-values, kind="stable")
    place = int(np.searchsorted(np.cumsum(counts[order]), rank))
    return float(values[order[place]]) if rank >= 1 and place < order.size else None


def tensor_guesses(
    context: Context,
    kept: Kept,
    values: Values = task_vectors,
    models: int | None = None,
    *,
    presume: bool = False,
) -> dict[str, Guess]:
    """What a sample says of the thresholds of every tensor; nothing of small ones, whose intervals hold everything.

    Args:
        context: the tensors.
        kept: how many entries to keep.
        values: what is ranked by magnitude.
        models: how many task vectors are ranked; all models' if None.
        presume: whether clear thresholds are sought, in a sample eight times as large.

    Complexity: 1/16 of a pass; none without large tensors. Memory: 2 MB per model, or 16 MB with `presume`.
    """
    count = context.models if models is None else models
    large = {name: spec for name, spec in context.specs.items() if spec.numel >= _SAMPLED_FROM}
    result = {
        name: Guess(
            [[(0.0, math.inf)] * len(numbers) for numbers in wanted], [[None] * len(numbers) for numbers in wanted]
        )
        for name, spec in context.specs.items()
        if name not in large
        for wanted in [kept(name, [spec.numel] * count)]
    }

    def sample(block: Block) -> list[Array]:
        if block.key.name not in large:
            return []
        enough = _ENOUGH if presume else _SORTED
        step = int(block.spec.numel * _SHARE / enough) | 1  # odd, so that no columns are preferred
        return [np.abs(numbers[::step].cpu().numpy()) for numbers in values(block, range(count))]

    def found(blocks: Iterable[tuple[BlockKey, list[Array]]], name: str) -> Guess:
        samples = [np.concatenate(own) for own in zip(*(magnitudes for _, magnitudes in blocks), strict=True)]
        numel = large[name].numel
        nonzero = [round(np.count_nonzero(own) / own.size * numel) for own in samples]
        shares = [[number / numel for number in numbers] for numbers in kept(name, nonzero)]
        sorted_ = [np.sort(own[:: own.size // _SORTED | 1]) for own in samples]
        return Guess(
            [[_interval(own, share) for share in wanted] for own, wanted in zip(sorted_, shares, strict=True)],
            [
                [_clear(own, in_order, share) if presume else None for share in wanted]
                for own, in_order, wanted in zip(samples, sorted_, shares, strict=True)
            ],
        )

    # the sample of one tensor at a time is held
    passed = context.each(sample, share=_SHARE) if large else iter(())
    for name, blocks in itertools.groupby(passed, key=lambda item: item[0].name):
        if name in large:
            result[name] = found(blocks, name)
    return result


def _clear(sample: Array, in_order: Array, share: float) -> float | None:
    """The magnitude that is the threshold in all likelihood, if there is one."""
    if not 0 < share < 1:
        return None
    found = in_order[min(int((1 - share) * in_order.size), in_order.size - 1)]
    margin = _CLEAR_DEVIATIONS * math.sqrt(share * (1 - share) * sample.size)
    below = np.count_nonzero(sample < found)
    upto = below + np.count_nonzero(sample == found)
    clear = (not found or below + margin < (1 - share) * sample.size) and (1 - share) * sample.size < upto - margin
    return float(found) if clear else None


def _interval(sample: Array, share: float) -> Interval:
    """An interval that holds the threshold which keeps a share, with a margin for the error of the sample."""
    margin = _DEVIATIONS * math.sqrt(max(share * (1 - share), 1 / sample.size) / sample.size)
    low = math.floor((1 - share - margin) * sample.size)
    high = math.ceil((1 - share + margin) * sample.size)
    return (
        float(sample[low]) if low >= 0 else 0.0,
        # the upper one of the sample is inside, too: where many magnitudes are equal it may be the threshold itself
        float(np.nextafter(sample[high], np.inf)) if high < sample.size else math.inf,
    )
