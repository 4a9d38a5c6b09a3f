"""Selection by rank, and ranks in rows."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._jit import TILE, Array, compiled

__all__ = ["place_by_rank", "rank_row", "split", "split_tile", "tally"]

_RADIX = 256
"""Values of a digit."""

_POSITION = np.uint64(0xFFFFFFFF)
"""The bits of an item that hold a position."""

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
    below, first, found, mask = 0, 0, 0, np.empty(TILE, np.uint8)
    for start in range(0, keys.size, TILE):
        own = split_tile(keys[start : start + TILE], low, high, mask, inside[found:])
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
def _insert(items: Array, steps: Array, most: int, out: Array) -> bool:
    """Sort integers by insertion, and `out` with them; gives up after so many moves, and says whether it did not.

    Args:
        items: a position in the lower 32 bits.
        steps: one number for each rank.
        most: moves.
        out: at the position of every item the step of its rank.
    """
    moves = 0
    for i in range(1, items.size):
        item, j = items[i], i
        while j > 0 and items[j - 1] > item:
            items[j] = items[j - 1]
            j -= 1
        if j < i:
            items[j] = item
            for rank in range(j, i + 1):
                out[np.uint32(items[rank] & _POSITION)] = steps[rank]
            moves += i - j
            if moves > most:
                return False
    return True


@compiled
def _sort_row(bits: Array, steps: Array, out: Array, items: Array) -> None:
    """`rank_row` by radix alone, of bit patterns."""
    for i in range(bits.size):
        items[0, i] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
    ranked = _radix_sort(items[0], items[1])
    for i in range(bits.size):
        out[np.uint32(ranked[i] & _POSITION)] = steps[i]


@compiled
def rank_row(magnitudes: Array, steps: Array, out: Array, counts: Array, bins: Array, items: Array) -> None:
    """For each of a row of magnitudes the step that belongs to its rank; of equal ones the first has the lower rank.

    The row is distributed over two bins per entry, which divide the range up to its largest magnitude evenly, and then
    sorted by insertion; where this takes many moves, by radix.

    Args:
        magnitudes: n numbers of float32, without sign bits, no NaN.
        steps: n numbers of float32, one for each rank.
        out: n numbers of float32.
        counts: room for 2 n of int32.
        bins: for n of int32.
        items: for 2 rows of n of uint64.
    """
    width, bits, largest = magnitudes.size, magnitudes.view(np.int32), np.float32(0)
    for i in range(width):
        largest = max(largest, magnitudes[i])
    if not largest < np.inf:  # differences of finite weights may be infinite, and have no bin
        _sort_row(bits, steps, out, items)
        return
    factor = np.float64(2 * width - 1) / np.float64(largest) if largest > 0 else 0.0
    for i in range(width):
        bins[i] = np.int32(magnitudes[i] * factor)
    counts[:] = 0
    for i in range(width):
        counts[np.uint32(bins[i])] += np.int32(1)
    place = np.int32(0)
    for value in range(2 * width):
        number = counts[value]
        counts[value] = place
        place = np.int32(place + number)
    ranked = items[0]
    for i in range(width):
        rank = np.uint32(counts[np.uint32(bins[i])])
        counts[np.uint32(bins[i])] += np.int32(1)
        ranked[rank] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
        out[i] = steps[rank]
    if not _insert(ranked, steps, _MOVES * width, out):
        _sort_row(bits, steps, out, items)


@compiled
def place_by_rank(magnitudes: Array, steps: Array, out: Array) -> None:
    """`rank_row` of every row of a matrix."""
    rows, width = magnitudes.shape
    counts, bins = np.empty(2 * width, np.int32), np.empty(width, np.int32)
    items = np.empty((2, width), np.uint64)
    for row in range(rows):
        rank_row(magnitudes[row], steps, out[row], counts, bins, items)
