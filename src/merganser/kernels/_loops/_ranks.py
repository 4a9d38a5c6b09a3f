"""Selection by rank, and ranks in rows."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._jit import Array, compiled

__all__ = ["place_by_rank", "split", "split_tile", "tally"]

_TILE = 1024
"""Elements whose intermediate results stay in the first-level cache."""

_RADIX = 256
"""Values of a digit."""

_MOVES = 64
"""Moves per entry after which an insertion sort gives up."""


@compiled
def split_tile(keys: Array, low: int, high: int, mask: Array, inside: Array) -> tuple[int, int, int]:
    """`split` of as many keys as `mask` has bytes, a multiple of 8, or fewer."""
    lowest, limit, count = np.int32(low), np.int32(high), keys.size
    below, first, lower = np.int32(0), np.int32(0), np.int32(0)
    for i in range(count):
        # int32 again, for Numba makes it int64, and half as many would be counted at a time
        below = np.int32(below + np.int32(keys[i] < lowest))
        first = np.int32(first + np.int32(keys[i] == lowest))
        lower = np.int32(lower + np.int32(keys[i] < limit))
    found = 0
    if lower - below - first:
        for i in range(count):
            mask[i] = np.uint8(keys[i] > lowest) & np.uint8(keys[i] < limit)
        mask[count:] = 0
        words = mask.view(np.uint64)
        for word in range(words.size):
            if words[word]:
                for i in range(8 * word, 8 * word + 8):
                    if mask[i]:
                        inside[np.uint64(found)] = keys[i]
                        found += 1
    return int(below), int(first), found


@compiled
def split(keys: Array, low: int, high: int, inside: Array) -> tuple[int, int, int]:
    """How many keys (int32) are below `low`, equal to it, and in ``(low, high)``; the last ones go to `inside`."""
    below, first, found, mask = 0, 0, 0, np.empty(_TILE, np.uint8)
    for start in range(0, keys.size, _TILE):
        own = split_tile(keys[start : start + _TILE], low, high, mask, inside[found:])
        below, first, found = below + own[0], first + own[1], found + own[2]
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
