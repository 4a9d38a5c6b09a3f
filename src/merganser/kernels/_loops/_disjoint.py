"""The disjoint merge, and the variance over models."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._jit import Array, compiled, float32_pointer, vector_at

__all__ = ["disjoint", "variance"]

_TILE = 1024
"""Elements whose intermediate results stay in the first-level cache."""


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
            vector = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
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
            vector = vector_at(float32_pointer(addresses[k]), size, np.float32)[first : first + count]
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
