"""Selection by rank, and ranks in rows."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._jit import Array, compiled

__all__ = ["place_by_rank", "split", "tally"]

_RADIX = 256
"""Values of a digit."""

_MOVES = 64
"""Moves per entry after which an insertion sort gives up."""


@compiled
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


@compiled
def tally(keys: Array, shift: int, lowest: int, bins: Array) -> None:
    """Count keys (int32) in bins of ``2^shift`` of them; the first bin has the number `lowest`."""
    for i in range(keys.size):
        bins[(keys[i] >> shift) - lowest] += 1


@compiled
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


@compiled
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


@compiled
def _numbered(bits: Array, items: Array) -> Array:
    """Bit patterns with their positions in the lower 32 bits, in `items`."""
    for i in range(bits.size):
        items[i] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
    return items


@compiled
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
