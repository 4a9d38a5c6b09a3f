"""Exact selection by rank: magnitudes as integer keys, the order of rows, and counts of keys in an interval."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._compiled import loops

__all__ = [
    "Bracket",
    "RankCounter",
    "between",
    "key_dtype",
    "key_value",
    "magnitude_keys",
    "place_by_rank",
    "room",
    "row_order",
    "signed_keys",
    "top_key",
    "value_key",
]

_INFINITY = 0x7F800000
"""The bit pattern of infinity in float32."""

_MOST_LAST_BITS = (1 << 18) - 1
"""So many bits of a float32 at most give way to its position in a row: 5 of the mantissa stay."""


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type of the bit patterns of a floating-point type."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def top_key(dtype: torch.dtype) -> int:
    """One more than the key of infinity: the keys of finite magnitudes lie in ``[0, top_key)``."""
    return (0x7FF0000000000000 if dtype == torch.float64 else _INFINITY) + 1


def magnitude_keys(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of ``|x|``: integers in the order of the magnitudes. `x` is overwritten by ``|x|``."""
    return x.abs_().view(key_dtype(x.dtype))


def signed_keys(x: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the elements of `x`, whatever their signs; 0 for zeros of both signs.

    The key of a negative element is that of its magnitude, negated. `x` is overwritten.
    """
    keys = x.view(key_dtype(x.dtype))
    negative = keys >> (8 * keys.element_size() - 1)  # -1 or 0
    return keys.bitwise_and_(torch.iinfo(keys.dtype).max).bitwise_xor_(negative).sub_(negative)


def between(x: torch.Tensor, low: float, high: float) -> npt.NDArray[np.floating]:
    """The positive elements of a flat tensor from `low` on and below `high`, in their order."""
    array = x.cpu().numpy()
    inside = array >= low if low > 0 else array > 0
    if not math.isinf(high):
        inside &= array < high
    found: npt.NDArray[np.floating] = array[np.flatnonzero(inside)]
    return found


def key_value(key: int, dtype: torch.dtype) -> float:
    """The number of type `dtype` whose key this is; the inverse of `magnitude_keys` and of `signed_keys`."""
    magnitude = float(torch.tensor([abs(key)], dtype=key_dtype(dtype)).view(dtype))
    return -magnitude if key < 0 else magnitude


def value_key(value: float) -> int:
    """The key of a magnitude in float32; one more than that of infinity for infinity, above all others."""
    return top_key(torch.float32) if math.isinf(value) else int(np.float32(value).view(np.int32))


def place_by_rank(magnitudes: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """For each entry of a matrix of magnitudes the step that belongs to its rank in its row.

    Of equal magnitudes the first has the lower rank.

    Args:
        magnitudes: rows x n; may be overwritten.
        steps: n numbers of the same type.

    Complexity: O(rows n log n).
    """
    if (fast := loops(magnitudes, steps)) is not None and math.isfinite(float(magnitudes.max())):
        found = torch.empty_like(magnitudes)
        fast.place_by_rank(magnitudes.numpy(), steps.numpy(), found.numpy())
        return found
    order = row_order(magnitudes)
    return magnitudes.scatter_(1, order, steps.expand_as(order))


def row_order(magnitudes: torch.Tensor) -> torch.Tensor:
    """The indices that sort each row of a matrix of magnitudes, ascending; of equal ones the first comes first.

    numpy sorts floats, and integers of 64 bits, several times faster than torch sorts stably. So the position is
    packed into the last bits of a float32 where those of nearly all magnitudes are zero, as in the differences of
    16-bit weights, and beside the magnitude in an integer elsewhere.
    """
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=1, stable=True)
    keys = magnitudes.contiguous().view(torch.int32).numpy()
    found = _coarse_row_order(keys)
    if found is None:
        found = keys.astype(np.int64)
        found <<= 32
        found |= np.arange(keys.shape[1])
        found.sort(axis=1)
        found &= 0xFFFFFFFF
    return torch.from_numpy(found)


def _coarse_row_order(keys: npt.NDArray[np.int32]) -> npt.NDArray[np.int64] | None:
    """The stable order of rows of bit patterns whose last bits are nearly all zero, else None.

    The last bits of each pattern hold its position, and above it one bit that says whether any were lost. Sorting
    then orders all patterns but those that lost bits and agree in what is left: they stand together, and are sorted
    once more.
    """
    width = keys.shape[1]
    position = (1 << max(1, (width - 1).bit_length())) - 1
    lost = position + 1
    last = position | lost
    if last > _MOST_LAST_BITS or not keys.size:
        return None
    fine = (keys & last) != 0
    if int(np.count_nonzero(fine)) > keys.size >> 5 or int(keys.max()) >= _INFINITY:
        return None
    packed = keys & ~last
    packed |= np.arange(width, dtype=np.int32)
    packed |= fine.view(np.uint8) * np.int32(lost)
    packed.view(np.float32).sort(axis=1)
    again = np.flatnonzero((packed & lost) != 0)
    order: npt.NDArray[np.int64] = (packed & position).astype(np.int64)
    if again.size:
        row = again // width
        chosen = order.reshape(-1)[again]
        order.reshape(-1)[again] = chosen[np.lexsort((keys[row, chosen], row))]
    return order


@dataclass(frozen=True, slots=True)
class Bracket:
    """An interval of keys in which the key of a given rank is sought.

    A pass over the data counts, in a `RankCounter`, the keys below the interval and those in each of its bins;
    `narrow` then gives the bin that holds the rank. From the full interval this is radix selection with digits of
    `bits` bits: two passes for float32. From an interval guessed on a sample one pass suffices; a wrong guess is
    noticed by the counts, and costs a pass, never the result.

    Attributes:
        rank: 0-based rank of the key that is sought, in ascending order.
        low: first key of the interval.
        high: one past its last key.
        top: one past the largest possible key.
        bits: log2 of the number of bins.
        bottom: the smallest possible key.
    """

    rank: int
    low: int
    high: int
    top: int
    bits: int = 16
    bottom: int = 0

    @property
    def found(self) -> bool:
        """Whether only one key is left."""
        return self.high - self.low == 1

    @property
    def shift(self) -> int:
        """log2 of the number of keys per bin. Bins begin at multiples of their width: no difference can overflow."""
        return max(0, (self.high - self.low - 1).bit_length() - self.bits)

    def narrow(self, counter: RankCounter, rank: int | None = None) -> Bracket:
        """The interval that holds the rank (or another one), given the counts of all blocks."""
        rank = self.rank if rank is None else rank
        inside = int(counter.bins.sum())
        if rank < counter.below:
            return replace(self, low=self.bottom, high=self.low)
        if rank >= counter.below + inside:
            return replace(self, low=self.high, high=self.top)
        cumulative = counter.bins.cumsum(0)
        chosen = int(torch.searchsorted(cumulative, rank - counter.below, right=True))
        low = ((self.low >> self.shift) + chosen) << self.shift
        return replace(self, low=max(self.low, low), high=min(self.high, low + (1 << self.shift)))


class RankCounter:
    """Counts keys relative to a bracket. Blocks may be added from several threads.

    Attributes:
        size: the number of keys.
        below: those below the interval.
        bins: those in each bin (int64).
    """

    def __init__(self, bracket: Bracket) -> None:
        self.size = 0
        self.below = 0
        bins = ((bracket.high - 1) >> bracket.shift) - (bracket.low >> bracket.shift) + 1
        self.bins = torch.zeros(bins, dtype=torch.int64)
        self._bracket = bracket
        self._lock = threading.Lock()

    def add(self, keys: torch.Tensor) -> None:
        """Count the keys of a block."""
        low, high, shift = self._bracket.low, self._bracket.high, self._bracket.shift
        if self.full:
            index = keys >> shift
            if low < 0:
                index.sub_(low >> shift).clamp_(min=0)  # of NaN
            counts = torch.bincount(index, minlength=self.bins.numel())[: self.bins.numel()].cpu()
            with self._lock:
                self.bins += counts
                self.size += keys.numel()
            return
        self.take(*_split(keys, low, high), keys.numel())

    @property
    def full(self) -> bool:
        """Whether every key is in the interval."""
        return self._bracket.low == self._bracket.bottom and self._bracket.high == self._bracket.top

    def take(self, below: int, first: int, inside: torch.Tensor, size: int) -> None:
        """Count a block of so many keys, of which so many are below the interval, equal its first, and lie inside."""
        shift = self._bracket.shift
        with self._lock:
            self.below += below
            self.bins[0] += first
            _tally(inside, shift, self._bracket.low >> shift, self.bins)
            self.size += size


def _tally(keys: torch.Tensor, shift: int, lowest: int, bins: torch.Tensor) -> None:
    """Count keys in bins of ``2^shift`` of them; the first bin has the number `lowest`."""
    if (fast := loops(keys, dtype=torch.int32)) is not None:
        fast.tally(keys.numpy(), shift, lowest, bins.numpy())
        return
    index = (keys >> shift).long().sub_(lowest).cpu()
    bins.index_add_(0, index, torch.ones_like(index))


class Room(threading.local):
    """Room for what is found in a block, made once per thread."""

    def __init__(self) -> None:
        self._room = np.empty(0, dtype=np.int32)

    def of(self, count: int) -> npt.NDArray[np.int32]:
        """An array of at least so many integers, uninitialised."""
        if self._room.size < count:
            self._room = np.empty(count, dtype=np.int32)
        return self._room


room = Room()


def _split(keys: torch.Tensor, low: int, high: int) -> tuple[int, int, torch.Tensor]:
    """The numbers of keys below `low` and equal to it, and the keys in ``[low, high)``, or those that are not equal."""
    if (fast := loops(keys, dtype=torch.int32)) is not None:
        kept = room.of(keys.numel())
        below, first, count = fast.split(keys.numpy(), low, high, kept)
        return below, first, torch.from_numpy(kept[:count])
    if keys.device.type == "cpu":
        array = keys.numpy()
        upper = array >= low
        below = array.size - int(np.count_nonzero(upper))
        inside = np.less(array, high, out=np.empty_like(upper))
        inside &= upper
        first = 0
        if int(np.count_nonzero(inside)) > array.size >> 4:
            # where task vectors are sparse or coarse nearly all entries inside may be equal: counting is faster
            upper = array == low
            first = int(np.count_nonzero(upper))
            inside &= np.logical_not(upper, out=upper)
        return below, first, torch.from_numpy(array[np.flatnonzero(inside)])
    first = int((keys == low).sum())
    return int((keys < low).sum()), first, keys[(keys > low) & (keys < high)]
