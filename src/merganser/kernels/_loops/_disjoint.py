"""The disjoint merge, sums, and the variance over models."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from merganser.kernels._loops._jit import TILE, Array, compiled, float32_pointer, vector_at

__all__ = ["Rule", "cancelled_tile", "combine", "disjoint", "mask_tile", "variance", "variance_tile"]

Rule: TypeAlias = "tuple[Array, int, int, bool, float]"
"""What becomes of vectors.

- A table: a row of weights, one of factors of what agrees, one of what a vector that agrees adds to the divisor.
- What is taken: 0 for the mean, 1 for the sum, 2 for the largest of what agrees, 3 for the sum of all without weights.
- The sign elected where the sum is 0; 0 for none.
- Whether signs are counted.
- The scale of the merge.
"""

_LARGEST, _ALL = 2, 3
"""Of what is taken: the largest of what agrees; the sum of all entries, without an election."""


@compiled
def combine(vectors: Array, count: int, rule: Rule, base: Array, out: Array, room: Array) -> tuple[int, bool]:
    """The merge of the first `count` entries of trimmed vectors, the rows of a matrix, which is overwritten.

    Args:
        vectors: float32.
        count: of their entries.
        rule: what becomes of them.
        base: is added at last.
        out: receives the result.
        room: four rows.

    Returns:
        How many more sums are positive than negative, and whether entries cancel; zeros if that is not counted, and
        without an election.
    """
    table, take, zero, counted, scale = rule
    if take == _ALL:
        total, scale_ = vectors[0], np.float32(scale)
        for k in range(1, len(vectors)):
            vector = vectors[k]
            for j in range(count):
                total[j] += vector[j]
        for j in range(count):
            out[j] = total[j] * scale_ + base[j]
        return 0, False
    for k in range(len(vectors)):
        vector, weight = vectors[k], table[0, k]
        if weight != np.float32(1):
            for j in range(count):
                vector[j] *= weight
    factors, sizes = table[1], table[2]
    if len(vectors) == 2 and take != _LARGEST:
        one, other = vectors[0], vectors[1]
        found = _elect_of_two(one, other, count, factors, sizes, take, zero, scale, base, out)
    else:
        found = _elect(vectors, count, factors, sizes, take, zero, scale, base, out, room)
    return found if counted else (0, False)


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
    total, mass, merged, divisor = room[0], room[1], room[2], room[3]
    for j in range(count):
        total[j] = mass[j] = merged[j] = divisor[j] = none
    for k in range(len(vectors)):
        vector = vectors[k]
        for j in range(count):
            total[j] += vector[j]
            mass[j] += abs(vector[j])
    balance, doubt = np.int32(0), np.int32(0)
    for j in range(count):
        # the sign that is elected is kept in place of the sum; int32 again, for Numba makes it int64, and half as many
        # would be counted at a time
        sum_, cancels = total[j], np.int32(np.int32(total[j] == none) & np.int32(mass[j] > none))
        balance = np.int32(balance + np.int32(sum_ > none) - np.int32(sum_ < none))
        doubt = np.int32(doubt | cancels)
        undecided = zero_ if cancels else one
        total[j] = -one if sum_ < none else undecided
    for k in range(len(vectors)):
        vector, factor, added = vectors[k], factors[k], sizes[k]
        if take == _LARGEST:
            for j in range(count):
                v = vector[j] * total[j] + none
                merged[j] = merged[j] if v < merged[j] else v
        else:
            for j in range(count):
                v = vector[j] * total[j]
                v = none if v < none else v
                merged[j] += v * factor
                divisor[j] += none if v == none else added
    if take == 0:
        for j in range(count):
            merged[j] /= one if divisor[j] == none else divisor[j]
    for j in range(count):
        out[j] = merged[j] * total[j] * scale_ + base[j]
    return int(balance), bool(doubt)


@compiled
def _elect_of_two(
    first: Array,
    second: Array,
    count: int,
    factors: Array,
    sizes: Array,
    take: int,
    zero: int,
    scale: float,
    base: Array,
    out: Array,
) -> tuple[int, bool]:
    """`_elect` of two vectors, for a mean or a sum, in one loop."""
    none, one, scale_, zero_ = np.float32(0), np.float32(1), np.float32(scale), np.float32(zero)
    balance, doubt, mean = np.int32(0), np.int32(0), take == 0
    factor, factor_, size, size_ = factors[0], factors[1], sizes[0], sizes[1]
    for j in range(count):
        a, b = first[j], second[j]
        sum_ = np.float32(none + a) + b
        cancels = np.int32(np.int32(sum_ == none) & np.int32(abs(a) + abs(b) > none))
        balance = np.int32(balance + np.int32(sum_ > none) - np.int32(sum_ < none))
        doubt = np.int32(doubt | cancels)
        undecided = zero_ if cancels else one
        sign = -one if sum_ < none else undecided
        a, b = a * sign, b * sign
        a, b = none if a < none else a, none if b < none else b
        merged = (none + a * factor) + b * factor_
        if mean:
            divisor = (none + (none if a == none else size)) + (none if b == none else size_)
            merged /= one if divisor == none else divisor
        out[j] = merged * sign * scale_ + base[j]
    return int(balance), bool(doubt)


@compiled
def cancelled_tile(vectors: Array, count: int, start: int, room: Array, mask: Array, places: Array, number: int) -> int:
    """Add the positions to a list where entries are not zero, but add up to zero.

    Args:
        vectors: trimmed and weighted ones, the rows of a matrix.
        count: of their entries.
        start: the position of the first.
        room: two rows.
        mask: bytes, a multiple of 8, as many as entries or more.
        places: the list; what is beyond its end is only counted.
        number: the positions that are in it already.

    Returns:
        The number of positions.
    """
    total, mass = room[0], room[1]
    total[:count] = np.float32(0)
    mass[:count] = np.float32(0)
    for k in range(len(vectors)):
        vector = vectors[k]
        for j in range(count):
            total[j] += vector[j]
            mass[j] += abs(vector[j])
    for j in range(count):
        mask[j] = np.uint8(total[j] == np.float32(0)) & np.uint8(mass[j] > np.float32(0))
    mask[count:] = 0
    words = mask.view(np.uint64)
    for word in range(words.size):
        if words[word]:
            for j in range(8 * word, 8 * word + 8):
                if mask[j]:
                    if number < places.size:
                        places[number] = start + j
                    number += 1
    return number


@compiled
def mask_tile(values: Array, mask: Array, count: int) -> None:
    """Set the numbers (float32) of a tile to zero whose mask (uint32) has no bits.

    Several times as fast on some processors as a choice between a number and zero, which becomes a masked load.
    """
    bits = values.view(np.uint32)
    for j in range(count):
        bits[j] &= mask[j]


@compiled
def disjoint(addresses: Array, floors: Array, rule: Rule, base: Array, out: Array) -> tuple[int, bool]:
    """The disjoint merge of vectors of float32, as `merganser.kernels.disjoint` describes it.

    Args:
        addresses: of the first elements of the vectors.
        floors: smaller magnitudes count as zero, per vector.
        rule: as for `combine`.
        base: is added at last.
        out: receives the result.

    Returns:
        How many more sums are positive than negative, and whether entries cancel.
    """
    size, balance, doubt = base.size, 0, False
    mask = np.empty(TILE, np.uint32)
    vectors, room = np.empty((addresses.size, TILE), np.float32), np.empty((4, TILE), np.float32)
    for first in range(0, size, TILE):
        count = min(size - first, TILE)
        for k in range(addresses.size):
            given = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
            floor, vector = floors[k], vectors[k]
            for j in range(count):
                mask[j] = np.uint32(abs(given[j]) < floor) - np.uint32(1)
            vector[:count] = given
            mask_tile(vector, mask, count)
        own, result = base[first : first + count], out[first : first + count]
        found = combine(vectors, count, rule, own, result, room)
        balance, doubt = balance + found[0], doubt | found[1]
    return balance, doubt


@compiled
def variance_tile(vectors: Array, count: int, total: Array, out: Array) -> None:
    """The variance over the rows of a matrix of float32: ``sum_{i<j} (t_i - t_j)^2 / n^2``, sums in float64.

    Args:
        vectors: the rows.
        count: how many entries of them.
        total: room for as many of float64.
        out: float32.
    """
    models = len(vectors)
    number = np.float64(models * models)
    if models == 4:
        # the same sums in the same order, without a pass through `total` for every pair
        one, two, three, four = vectors[0], vectors[1], vectors[2], vectors[3]
        for j in range(count):
            a, b, c, d = np.float64(one[j]), np.float64(two[j]), np.float64(three[j]), np.float64(four[j])
            squares = (a - b) * (a - b) + (a - c) * (a - c) + (a - d) * (a - d)
            squares = squares + (b - c) * (b - c) + (b - d) * (b - d) + (c - d) * (c - d)
            out[j] = np.float32(squares / 16.0)
        return
    for j in range(count):
        total[j] = 0.0
    for k in range(models):
        one = vectors[k]
        for m in range(k + 1, models, 2):
            two, three = vectors[m], vectors[min(m + 1, models - 1)]
            if m + 1 < models:
                for j in range(count):
                    a, b = np.float64(one[j]) - np.float64(two[j]), np.float64(one[j]) - np.float64(three[j])
                    total[j] = total[j] + a * a + b * b
            else:
                for j in range(count):
                    a = np.float64(one[j]) - np.float64(two[j])
                    total[j] += a * a
    for j in range(count):
        out[j] = np.float32(total[j] / number)


@compiled
def variance(addresses: Array, out: Array) -> None:
    """The variance over vectors of float32, entry by entry."""
    size = out.size
    vectors, total = np.empty((addresses.size, TILE), np.float32), np.empty(TILE, np.float64)
    for first in range(0, size, TILE):
        count = min(size - first, TILE)
        for k in range(addresses.size):
            vectors[k, :count] = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
        variance_tile(vectors, count, total, out[first : first + count])
