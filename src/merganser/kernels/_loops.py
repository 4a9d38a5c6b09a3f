"""Loops that Numba compiles. They give the bits of the functions in torch and numpy that call them, in fewer passes.

Compiled code is kept beside this file, or in the user's cache where that cannot be written. Nothing is reordered and
no multiplication is contracted with an addition, so a loop rounds as its description says. The interpreter lock is
released.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending
import numpy as np

__all__ = ["disjoint", "drop", "keep", "narrow", "place_by_rank", "split", "tally", "variance", "widen", "widen_less"]

F = TypeVar("F", bound=Callable[..., Any])
Array = Any

_TILE = 1024
"""Elements whose intermediate results stay in the first-level cache."""

_RUN = 32
"""Bytes that are looked at together."""

_RADIX = 256
"""Values of a digit."""

_MOVES = 64
"""Moves per entry after which an insertion sort gives up."""

_OVERFLOW = 0x7F7F8000
"""The bits of the smallest float32 that bfloat16 rounds to infinity."""


_numba: Any = numba
_carray = _numba.carray


def _compiled(function: F) -> F:
    return cast(F, _numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def _intrinsic(function: Callable[..., Any]) -> Callable[[int], Any]:
    return cast("Callable[[int], Any]", _numba.extending.intrinsic(function))


@_intrinsic
def _pointer(context: Any, address: Any) -> Any:
    """The address of float32 elements as a pointer."""
    pointer = _numba.types.CPointer(_numba.types.float32)

    def generate(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ctx.get_value_type(signature.return_type))

    return pointer(address), generate


@_compiled
def widen(raw: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32; whether all elements are finite."""
    bits, largest = out.view(np.uint32), np.uint16(0)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
        largest = max(largest, raw[i] & np.uint16(0x7F80))
    return largest < 0x7F80


@_compiled
def widen_less(raw: Array, minus: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32, less other numbers; whether all elements were finite."""
    bits, largest = out.view(np.uint32), np.uint16(0)
    for first in range(0, raw.size, _TILE):
        own, wide, less = raw[first : first + _TILE], bits[first : first + _TILE], minus[first : first + _TILE]
        for i in range(own.size):
            wide[i] = np.uint32(own[i]) << np.uint32(16)
            largest = max(largest, own[i] & np.uint16(0x7F80))
        result = out[first : first + _TILE]
        for i in range(own.size):
            result[i] -= less[i]
    return largest < 0x7F80


@_compiled
def narrow(values: Array, out: Array) -> Any:
    """float32 to bfloat16 (as uint16), to the nearest, ties to even; whether all results are finite.

    NaN may become infinite: where the answer is no, the results are to be made another way.
    """
    bits, largest = values.view(np.uint32), np.uint32(0)
    for i in range(values.size):
        rounded = bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(rounded >> np.uint32(16))
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return largest < np.uint32(_OVERFLOW)


@_compiled
def split(keys: Array, low: int, high: int, inside: Array) -> tuple[int, int, int]:
    """How many keys (int32) are below `low`, equal to it, and in ``(low, high)``; the last ones go to `inside`."""
    below, first, found = 0, 0, 0
    lowest, width = np.int32(low), np.uint64(high - low - 1)
    for i in range(keys.size):
        below += keys[i] < lowest
        first += keys[i] == lowest
    for i in range(keys.size):
        inside[np.uint64(found)] = keys[i]
        found += int(np.uint64(np.int64(keys[i]) - low - 1) < width)
    return below, first, found


@_compiled
def tally(keys: Array, shift: int, lowest: int, bins: Array) -> None:
    """Count keys (int32) in bins of ``2^shift`` of them; the first bin has the number `lowest`."""
    for i in range(keys.size):
        bins[(keys[i] >> shift) - lowest] += 1


@_compiled
def disjoint(
    addresses: Array,
    floors: Array,
    weights: Array,
    factors: Array,
    sizes: Array,
    take: int,
    zero: int,
    scale: float,
    base: Array,
    out: Array,
) -> tuple[int, bool]:
    """The disjoint merge of vectors of float32, as `merganser.kernels.disjoint` describes it.

    Args:
        addresses: of the first elements of the vectors.
        floors: smaller magnitudes count as zero, per vector.
        weights: per vector.
        factors: of what agrees, per vector.
        sizes: what a vector that agrees adds to the divisor.
        take: 0 for the mean, 1 for the sum, 2 for the largest.
        zero: the sign elected where the sum is 0; 0 for none.
        scale: of the merge.
        base: is added at last.
        out: receives the result.

    Returns:
        How many more sums are positive than negative, and whether entries cancel.
    """
    size, balance, doubt = base.size, 0, np.int32(0)
    none, one, scale_ = np.float32(0), np.float32(1), np.float32(scale)
    # the sign that is elected is kept in place of the sum
    total, mass = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    merged, counted = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for first in range(0, size, _TILE):
        count = min(size - first, _TILE)
        for j in range(count):
            total[j] = mass[j] = merged[j] = counted[j] = none
        for k in range(addresses.size):
            vector = _carray(_pointer(addresses[k]), size, np.float32)[first : first + count]
            floor, weight = floors[k], weights[k]
            for j in range(count):
                v = (none if abs(vector[j]) < floor else vector[j]) * weight
                total[j] += v
                mass[j] += abs(v)
        positive, zeros = np.int32(0), np.int32(0)
        for j in range(count):
            positive += np.int32(total[j] > none)
            zeros += np.int32(total[j] == none)
            doubt |= np.int32((total[j] == none) & (mass[j] > none))
        balance += 2 * positive - (count - zeros)
        for j in range(count):
            undecided = np.float32(zero) if mass[j] > none else one
            undecided = undecided if total[j] == none else one
            total[j] = -one if total[j] < none else undecided
        for k in range(addresses.size):
            vector = _carray(_pointer(addresses[k]), size, np.float32)[first : first + count]
            floor, weight, factor, added = floors[k], weights[k], factors[k], sizes[k]
            if take == 2:
                for j in range(count):
                    v = (none if abs(vector[j]) < floor else vector[j]) * weight * total[j] + none
                    merged[j] = merged[j] if v < merged[j] else v
            else:
                for j in range(count):
                    v = (none if abs(vector[j]) < floor else vector[j]) * weight * total[j]
                    v = none if v < none else v
                    merged[j] += v * factor
                    counted[j] += none if v == none else added
        if take == 0:
            for j in range(count):
                merged[j] /= one if counted[j] == none else counted[j]
        result, own = out[first : first + count], base[first : first + count]
        for j in range(count):
            result[j] = merged[j] * total[j] * scale_ + own[j]
    return balance, doubt != 0


@_compiled
def variance(addresses: Array, out: Array) -> None:
    """The variance over vectors of float32, entry by entry: ``mean((t_i - mean(t))^2)``, sums in their order."""
    size, none, number = out.size, np.float32(0), np.float32(addresses.size)
    mean = np.empty(_TILE, np.float32)
    for first in range(0, size, _TILE):
        count = min(size - first, _TILE)
        result = out[first : first + count]
        for j in range(count):
            mean[j] = result[j] = none
        for k in range(addresses.size):
            vector = _carray(_pointer(addresses[k]), size, np.float32)[first : first + count]
            for j in range(count):
                mean[j] += vector[j]
        for j in range(count):
            mean[j] /= number
        for k in range(addresses.size):
            vector = _carray(_pointer(addresses[k]), size, np.float32)[first : first + count]
            for j in range(count):
                result[j] += (vector[j] - mean[j]) * (vector[j] - mean[j])
        for j in range(count):
            result[j] /= number


@_compiled
def _radix_sort(items: Array, other: Array) -> Array:
    """Sort integers of 64 bits by their upper 32, stably, the last digit first. Both arrays are overwritten."""
    counts = np.empty(_RADIX, np.int64)
    for digit in range(4):
        shift = np.uint64(32 + 8 * digit)
        counts[:] = 0
        for i in range(items.size):
            counts[(items[i] >> shift) & np.uint64(_RADIX - 1)] += 1
        place = 0
        for value in range(_RADIX):
            number = counts[value]
            counts[value] = place
            place += number
        for i in range(items.size):
            value = (items[i] >> shift) & np.uint64(_RADIX - 1)
            other[np.uint64(counts[value])] = items[i]
            counts[value] += 1
        items, other = other, items
    return items


@_compiled
def _insertion_sort(items: Array, most: int) -> bool:
    """Sort integers in place; gives up after so many moves, and says whether it did not."""
    moves = 0
    for i in range(1, items.size):
        item, j = items[i], i
        while j > 0 and items[j - 1] > item:
            items[j] = items[j - 1]
            j -= 1
        items[j] = item
        moves += i - j
        if moves > most:
            return False
    return True


@_compiled
def _numbered(bits: Array, items: Array) -> Array:
    """Bit patterns with their positions in the lower 32 bits, in `items`."""
    for i in range(bits.size):
        items[i] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
    return items


@_compiled
def place_by_rank(magnitudes: Array, steps: Array, out: Array) -> None:
    """For each entry of a matrix of magnitudes the step that belongs to its rank in its row.

    Of equal magnitudes the first has the lower rank. Each row is distributed over two bins per entry, which divide the
    range up to its largest magnitude evenly, and then sorted by insertion; where this takes many moves, by radix.

    Args:
        magnitudes: float32, finite, rows x n, without sign bits.
        steps: n numbers of float32, one for each rank.
        out: float32, rows x n.
    """
    rows, width = magnitudes.shape
    counts, bins = np.empty(2 * width, np.int64), np.empty(width, np.uint32)
    items, other = np.empty(width, np.uint64), np.empty(width, np.uint64)
    for row in range(rows):
        own, largest = magnitudes[row], np.float32(0)
        for i in range(width):
            largest = own[i] if own[i] > largest else largest
        factor = np.float64(2 * width - 1) / np.float64(largest) if largest > 0 else 0.0
        counts[:] = 0
        for i in range(width):
            bins[i] = np.uint32(own[i] * factor)
            counts[bins[i]] += 1
        place = 0
        for value in range(2 * width):
            number = counts[value]
            counts[value] = place
            place += number
        bits = own.view(np.uint32)
        for i in range(width):
            items[np.uint64(counts[bins[i]])] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
            counts[bins[i]] += 1
        ranked = items if _insertion_sort(items, _MOVES * width) else _radix_sort(_numbered(bits, items), other)
        result = out[row]
        for i in range(width):
            result[ranked[i] & np.uint64(0xFFFFFFFF)] = steps[i]


@_compiled
def _draw(counter: int, key: int) -> Any:
    z = (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@_compiled
def drop(draws: Array, coarse: int, limit: float, start: int, key: int, out: Array) -> None:
    """Whether each byte is above `coarse`; of those equal to it, whether the draw of their position reaches `limit`."""
    equal = np.uint8(coarse)
    for i in range(draws.size):
        out[i] = draws[i] > equal
    for first in range(0, draws.size, _RUN):
        own, any_ = draws[first : first + _RUN], np.uint8(0)
        for j in range(own.size):
            any_ |= np.uint8(own[j] == equal)
        if any_:
            for j in range(own.size):
                if own[j] == equal:
                    out[first + j] = np.float64(_draw(start + first + j, key)) >= limit


@_compiled
def keep(draws: Array, probabilities: Array, start: int, key: int, out: Array) -> None:
    """Whether each byte is below its probability times 256; a draw of the position decides where 8 bits do not."""
    for first in range(0, draws.size, _RUN):
        own, wanted = draws[first : first + _RUN], probabilities[first : first + _RUN]
        result, any_ = out[first : first + _RUN], np.uint8(0)
        for j in range(own.size):
            scaled = wanted[j] * np.float32(256)
            coarse = np.uint8(np.int32(np.float32(255) if scaled > np.float32(255) else scaled))
            equal = np.uint8(own[j] == coarse)
            result[j] = np.uint8(own[j] < coarse) | (equal << np.uint8(1))
            any_ |= equal
        if any_:
            for j in range(own.size):
                if result[j] > 1:
                    limit = (np.float64(wanted[j]) * 256 - own[j]) * 2.0**64
                    result[j] = np.float64(_draw(start + first + j, key)) < limit
