"""Arithmetic on blocks: comparisons, exact reductions, exact selection by rank, and counter-based random masks.

A block is a flat run of elements of one tensor that begins at a multiple of `CHUNK`, or holds whole rows. Everything
here gives the same bits for any block size and any number of threads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merganser._random import drop_mask, uniforms
from merganser._torch import torch

__all__ = [
    "CHUNK",
    "Bracket",
    "Partials",
    "RankCounter",
    "at_least",
    "balance",
    "between",
    "chunk_dots",
    "chunk_l1",
    "compute_dtype",
    "count_nonfinite",
    "count_ones",
    "drop_mask",
    "equal_to",
    "exact_sum",
    "first_nonfinite",
    "flip_",
    "key_dtype",
    "key_value",
    "magnitude_keys",
    "mask_",
    "nonzero",
    "positions",
    "row_dots",
    "row_l1",
    "row_order",
    "sign_bits_",
    "signed_keys",
    "top_key",
    "trim_below_",
    "uniforms",
]

_EXPONENTS = {"bfloat16": np.int16(0x7F80), "float16": np.int16(0x7C00)}
"""The exponent bits of 16-bit types; all are set in NaN and infinite values."""

_DOT = 1 << 13
"""Elements of an inner product that one thread computes."""

CHUNK = 1 << 14
"""Elements over which floating-point reductions run; blocks begin at multiples of it."""


def compute_dtype(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    """The type for arithmetic on inputs of `dtypes`: float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def at_least(x: torch.Tensor, threshold: float | torch.Tensor) -> torch.Tensor:
    """``x >= threshold`` as a tensor of 0 and 1 (uint8), which multiplies faster than a boolean mask selects.

    On the CPU the comparison runs in numpy, which is ten times faster at it than torch.
    """
    if x.device.type == "cpu":
        wall = threshold.numpy() if isinstance(threshold, torch.Tensor) else threshold
        return torch.from_numpy(np.greater_equal(x.numpy(), wall).view(np.uint8))
    return (x >= threshold).to(torch.uint8)


def trim_below_(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """Set the elements with ``|x| < threshold`` to zero, in place; `threshold` is positive, of the type of `x`."""
    wall = torch.tensor(threshold, dtype=x.dtype)
    below = torch.nextafter(wall, torch.zeros_like(wall)).item()
    return torch.hardshrink(x, below, out=x)


def nonzero(x: torch.Tensor) -> torch.Tensor:
    """``x != 0`` as a tensor of 0 and 1 (uint8)."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.not_equal(x.numpy(), 0).view(np.uint8))
    return (x != 0).to(torch.uint8)


def count_ones(mask: torch.Tensor) -> int:
    """The number of ones of a mask (uint8)."""
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.sum())


def positions(mask: torch.Tensor) -> torch.Tensor:
    """The indices of the ones of a flat mask (uint8)."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask).view(-1)


def balance(x: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many more positive elements than negative ones `x` has, and the mask (uint8) of those that are neither."""
    if x.device.type == "cpu":
        array = x.numpy()
        signed = np.greater(array, 0)
        positive = int(np.count_nonzero(signed))
        zero = np.equal(array, 0)
        return 2 * positive - (array.size - int(np.count_nonzero(zero))), torch.from_numpy(zero.view(np.uint8))
    return int(x.sign().sum()), (x == 0).to(torch.uint8)


def mask_(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Set the elements of `x` to +0 where the mask (uint8) is 0, in place."""
    kept = mask.to(key_dtype(x.dtype)).neg_()
    x.view(kept.dtype).bitwise_and_(kept)
    return x


def sign_bits_(x: torch.Tensor) -> torch.Tensor:
    """The sign bits of `x`, for `flip_`. `x` is overwritten."""
    bits = x.view(key_dtype(x.dtype))
    return bits.bitwise_and_(torch.iinfo(bits.dtype).min)


def flip_(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Negate the elements of `x` whose bit is set in `signs`, in place."""
    x.view(signs.dtype).bitwise_xor_(signs)
    return x


def equal_to(x: torch.Tensor, value: float) -> torch.Tensor:
    """``x == value`` as a tensor of 0 and 1 (uint8)."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.equal(x.numpy(), value).view(np.uint8))
    return (x == value).to(torch.uint8)


Partials: TypeAlias = "npt.NDArray[np.float64]"
"""Sums over consecutive chunks of `CHUNK` elements, in float64."""


def chunk_dots(a: torch.Tensor, b: torch.Tensor) -> Partials:
    """Inner products of two flat blocks over consecutive chunks, accumulated in float64.

    `exact_sum` of those of all blocks is the inner product of the tensors, whatever the blocks were.
    """
    if a.device.type != "cpu":
        return _by_chunk(a, lambda x, first, last: x * b[first:last].view_as(x))
    x, y = a.numpy(), b.numpy()
    buffers = np.empty((2, min(CHUNK, max(1, x.size))))
    parts = np.zeros(-(-x.size // CHUNK))
    for index, first in enumerate(range(0, x.size, CHUNK)):
        last = min(first + CHUNK, x.size)
        left = right = buffers[0, : last - first]
        left[:] = x[first:last]
        if a is not b:
            right = buffers[1, : last - first]
            right[:] = y[first:last]
        # longer products would be divided among threads, and rounded as their number is
        parts[index] = sum(float(np.dot(left[i : i + _DOT], right[i : i + _DOT])) for i in range(0, last - first, _DOT))
    return parts


def chunk_l1(a: torch.Tensor) -> Partials:
    """Sums of magnitudes of a flat block over consecutive chunks, accumulated in float64."""
    return _by_chunk(a, lambda x, first, last: x.abs())


def _by_chunk(a: torch.Tensor, fn: Callable[[torch.Tensor, int, int], torch.Tensor]) -> Partials:
    whole = a.numel() - a.numel() % CHUNK
    parts = []
    for first, last, width in ((0, whole, CHUNK), (whole, a.numel(), a.numel() - whole)):
        if last > first:
            x = a[first:last].view(-1, width).double()
            parts.append(fn(x, first, last).sum(dim=1).cpu().numpy())
    return np.concatenate(parts) if parts else np.zeros(0)


def row_dots(a: torch.Tensor, b: torch.Tensor, row: int) -> torch.Tensor:
    """Inner products of two flat blocks over rows of `row` elements each, in float64.

    The sums of a row do not depend on how many rows a block has: longer ones are added in chunks of `CHUNK`.
    """
    a, b = a.view(-1, row), b.view(-1, row)
    total = a.new_zeros(len(a), dtype=torch.float64)
    for first in range(0, row, CHUNK):
        total += (a[:, first : first + CHUNK].double() * b[:, first : first + CHUNK]).sum(dim=1)
    return total


def row_l1(a: torch.Tensor, row: int) -> Partials:
    """Sums of magnitudes over rows of `row` elements each, in float64."""
    a = a.view(-1, row)
    total = a.new_zeros(len(a), dtype=torch.float64)
    for first in range(0, row, CHUNK):
        total += a[:, first : first + CHUNK].double().abs_().sum(dim=1)
    return total.cpu().numpy()


def exact_sum(parts: Sequence[Partials]) -> float:
    """The correctly rounded sum of all partial sums, whatever their order (Shewchuk 1997, `math.fsum`)."""
    try:
        return math.fsum(value for part in parts for value in part.tolist())
    except (OverflowError, ValueError):  # infinite values of both signs, or a sum beyond float64
        return math.nan


def count_nonfinite(x: torch.Tensor) -> int:
    """The number of NaN and infinite elements.

    The usual case is decided quickly: of 16-bit types by the largest exponent, of others by one sum, which is finite
    only if every element is (the converse fails when it overflows).
    """
    if not x.numel():
        return 0
    exponent = _EXPONENTS.get(str(x.dtype).removeprefix("torch."))
    if exponent is not None and x.device.type == "cpu":
        if int(np.bitwise_and(x.view(torch.int16).numpy(), exponent).max()) < exponent:
            return 0
    elif math.isfinite(float(x.sum())):
        return 0
    return int(x.numel() - torch.isfinite(x).sum())


def first_nonfinite(x: torch.Tensor) -> int:
    """The index of the first NaN or infinite element of a flat tensor that has one."""
    return int(torch.nonzero(~torch.isfinite(x))[0, 0])


# --- selection by rank ------------------------------------------------------------------------------------------


def key_dtype(dtype: torch.dtype) -> torch.dtype:
    """The integer type of the bit patterns of a floating-point type."""
    return torch.int64 if dtype == torch.float64 else torch.int32


def top_key(dtype: torch.dtype) -> int:
    """One more than the key of infinity: the keys of finite magnitudes lie in ``[0, top_key)``."""
    return (0x7FF0000000000000 if dtype == torch.float64 else 0x7F800000) + 1


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


def row_order(magnitudes: torch.Tensor) -> torch.Tensor:
    """The indices that sort each row of a matrix of magnitudes, ascending; of equal ones the first comes first."""
    # numpy sorts magnitudes and positions packed into integers three times faster than torch sorts stably
    if magnitudes.dtype != torch.float32 or magnitudes.device.type != "cpu":
        return magnitudes.argsort(dim=1, stable=True)
    keys = magnitudes.contiguous().view(torch.int32).numpy().astype(np.int64)
    keys <<= 32
    keys |= np.arange(keys.shape[1])
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    return torch.from_numpy(keys)


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
        if low == self._bracket.bottom and high == self._bracket.top:
            index = keys >> shift
            if low < 0:
                index.sub_(low >> shift).clamp_(min=0)  # of NaN
            counts = torch.bincount(index, minlength=self.bins.numel())[: self.bins.numel()].cpu()
            with self._lock:
                self.bins += counts
                self.size += keys.numel()
            return
        below, first, inside = _split(keys, low, high)
        index = (inside >> shift).long().sub_(low >> shift).cpu()
        with self._lock:
            self.below += below
            self.bins[0] += first
            self.bins.index_add_(0, index, torch.ones_like(index))
            self.size += keys.numel()


def _split(keys: torch.Tensor, low: int, high: int) -> tuple[int, int, torch.Tensor]:
    """The numbers of keys below `low` and equal to it, and the keys in ``[low, high)``, or those that are not equal."""
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
