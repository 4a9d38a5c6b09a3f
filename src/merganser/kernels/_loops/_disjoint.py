"""The disjoint merge, and the variance over models."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._convert import narrow_tile, widen_tile
from merganser.kernels._loops._jit import Array, compiled, float32_pointer, uint16_pointer, vector_at

__all__ = ["disjoint", "disjoint_stored", "variance"]

_TILE = 1024
"""Elements whose intermediate results stay in the first-level cache."""


@compiled
def _elect(
    vectors: Array,
    count: int,
    factors: Array,
    sizes: Array,
    take: int,
    zero: int,
    scale: float,
    base: Array,
    out: Array,
    room: Array,
) -> tuple[int, bool]:
    """The disjoint merge of the first `count` entries of trimmed and weighted vectors, the rows of a matrix."""
    none, one, scale_, zero_ = np.float32(0), np.float32(1), np.float32(scale), np.float32(zero)
    total, mass, merged, counted = room[0], room[1], room[2], room[3]
    for j in range(count):
        total[j] = mass[j] = merged[j] = counted[j] = none
    for k in range(len(vectors)):
        vector = vectors[k]
        for j in range(count):
            total[j] += vector[j]
            mass[j] += abs(vector[j])
    balance, doubt = np.int32(0), np.int32(0)
    for j in range(count):
        # int32 again, for Numba makes it int64, and half as many would be counted at a time
        balance = np.int32(balance + np.int32(total[j] > none) - np.int32(total[j] < none))
    for j in range(count):
        doubt = np.int32(doubt | np.int32(np.int32(total[j] == none) & np.int32(mass[j] > none)))
    # the sign that is elected is kept in place of the sum
    for j in range(count):
        undecided = zero_ if mass[j] > none else one
        undecided = undecided if total[j] == none else one
        total[j] = -one if total[j] < none else undecided
    for k in range(len(vectors)):
        vector, factor, added = vectors[k], factors[k], sizes[k]
        if take == 2:
            for j in range(count):
                v = vector[j] * total[j] + none
                merged[j] = merged[j] if v < merged[j] else v
        else:
            for j in range(count):
                v = vector[j] * total[j]
                v = none if v < none else v
                merged[j] += v * factor
                counted[j] += none if v == none else added
    if take == 0:
        for j in range(count):
            merged[j] /= one if counted[j] == none else counted[j]
    for j in range(count):
        out[j] = merged[j] * total[j] * scale_ + base[j]
    return int(balance), bool(doubt)


@compiled
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
    size, balance, doubt, none = base.size, 0, False, np.float32(0)
    vectors, room = np.empty((addresses.size, _TILE), np.float32), np.empty((4, _TILE), np.float32)
    for first in range(0, size, _TILE):
        count = min(size - first, _TILE)
        for k in range(addresses.size):
            given = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
            floor, weight, vector = floors[k], weights[k], vectors[k]
            for j in range(count):
                vector[j] = (none if abs(given[j]) < floor else given[j]) * weight
        own, result = base[first : first + count], out[first : first + count]
        found = _elect(vectors, count, factors, sizes, take, zero, scale, own, result, room)
        balance, doubt = balance + found[0], doubt | found[1]
    return balance, doubt


@compiled
def disjoint_stored(
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
    counts: Array,
) -> tuple[int, bool]:
    """`disjoint` of models less their base, all of bfloat16 (as uint16) like the result.

    Each tile is made float32 and the result bfloat16 again while they are in the first-level cache. Where `counts` has
    a row for each model, the magnitudes below its floor, and those that equal it, are added to that.
    """
    size, balance, doubt, none = base.size, 0, False, np.float32(0)
    vectors, room = np.empty((addresses.size, _TILE), np.float32), np.empty((4, _TILE), np.float32)
    own, result = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for first in range(0, size, _TILE):
        count = min(size - first, _TILE)
        widen_tile(base[first : first + count], own.view(np.uint32))
        for k in range(addresses.size):
            vector, floor, weight = vectors[k], floors[k], weights[k]
            raw = vector_at(uint16_pointer(addresses[k]), size, np.uint16)[first : first + count]
            widen_tile(raw, vector.view(np.uint32))
            for j in range(count):
                vector[j] -= own[j]
            if len(counts):
                below, equal = np.int32(0), np.int32(0)
                for j in range(count):
                    below = np.int32(below + np.int32(abs(vector[j]) < floor))
                    equal = np.int32(equal + np.int32(abs(vector[j]) == floor))
                counts[k, 0] += below
                counts[k, 1] += equal
            for j in range(count):
                vector[j] = (none if abs(vector[j]) < floor else vector[j]) * weight
        found = _elect(vectors, count, factors, sizes, take, zero, scale, own, result, room)
        balance, doubt = balance + found[0], doubt | found[1]
        narrow_tile(result.view(np.uint32)[:count], out[first : first + count])
    return balance, doubt


@compiled
def variance(addresses: Array, out: Array) -> None:
    """The variance over n vectors of float32, entry by entry: ``sum_{i<j} (t_i - t_j)^2 / n^2``, sums in float64."""
    size, number = out.size, np.float64(addresses.size * addresses.size)
    total = np.empty(_TILE, np.float64)
    for first in range(0, size, _TILE):
        count = min(size - first, _TILE)
        result = out[first : first + count]
        for j in range(count):
            total[j] = 0.0
        for k in range(addresses.size):
            one = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
            for m in range(k + 1, addresses.size):
                other = vector_at(float32_pointer(addresses[m]), size, np.float32)[first : first + count]
                for j in range(count):
                    gap = np.float64(one[j]) - np.float64(other[j])
                    total[j] += gap * gap
        for j in range(count):
            result[j] = np.float32(total[j] / number)
