"""Passes over weights in bfloat16 (as uint16), as files have them, that count and add up."""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._convert import widened
from merganser.kernels._loops._disjoint import variance_tile
from merganser.kernels._loops._jit import TILE, Array, compiled
from merganser.kernels._loops._ranks import split_tile
from merganser.kernels._loops._tiles import deltas, select

__all__ = ["products_stored", "split_stored", "split_variances"]

_CHUNK = 1 << 14
"""Elements over which products are summed."""


@compiled
def split_stored(raw: Array, base: Array, intervals: Array, inside: Array, counts: Array) -> int:
    """`split` of the keys of ``|raw - base|``, finite and of one size, by several intervals.

    Args:
        raw: of a model.
        base: of its base.
        intervals: rows of `low` and `high` (int64).
        inside: for each interval what lies in it; as many rows of the size of `raw`.
        counts: for each interval the three numbers, zeros at first.

    Returns:
        How many differences are zero.
    """
    zeros, mask, gap = 0, np.empty(TILE, np.uint8), np.empty(TILE, np.float32)
    for first in range(0, raw.size, TILE):
        count = min(raw.size - first, TILE)
        own, minus = raw[first : first + count], base[first : first + count]
        for j in range(count):
            gap[j] = abs(widened(own[j]) - widened(minus[j]))
        zeros += _split(gap, count, intervals, inside, counts, mask)
    return zeros


@compiled
def split_variances(addresses: Array, base: Array, intervals: Array, inside: Array, counts: Array) -> int:
    """`split_stored` of the variance of models less their base, whose addresses are given."""
    zeros, mask = 0, np.empty(TILE, np.uint8)
    vectors, own = np.empty((addresses.size, TILE), np.float32), np.empty(TILE, np.float32)
    total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    for first in range(0, base.size, TILE):
        count = min(base.size - first, TILE)
        deltas(addresses, base.size, first, count, base, own, vectors)
        variance_tile(vectors, count, total, variance)
        zeros += _split(variance, count, intervals, inside, counts, mask)
    return zeros


@compiled
def _split(values: Array, count: int, intervals: Array, inside: Array, counts: Array, mask: Array) -> int:
    """`split` of the keys of `count` magnitudes by several intervals; how many are zero."""
    keys, none = values.view(np.int32)[:count], np.int32(0)
    for j in range(count):
        none = np.int32(none + np.int32(keys[j] == 0))
    for k in range(len(intervals)):
        own = counts[k]
        found = split_tile(keys, intervals[k, 0], intervals[k, 1], mask, inside[k, own[2] :])
        own[0] += found[0]
        own[1] += found[1]
        own[2] += found[2]
    return int(none)


@compiled
def products_stored(addresses: Array, base: Array, least: float, ties: int, pairs: Array, sums: Array) -> None:
    """`ordered_products` of models less their base, without entries whose variance is below `least`, or zero.

    Args:
        addresses: of the models' first elements.
        base: of the base.
        least: a variance; no entry is left out if it is negative.
        ties: of the variances that equal it the first so many are not below it; none is if that is negative.
        pairs: of models, rows of two (int64).
        sums: for every pair one number per chunk (float64).
    """
    vectors, own = np.empty((addresses.size, TILE), np.float32), np.empty(TILE, np.float32)
    total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    mask = np.empty(TILE, np.uint32)
    lanes = np.empty((len(pairs), TILE), np.float64)
    for chunk in range(sums.shape[1]):
        lanes[:] = 0.0
        for first in range(chunk * _CHUNK, min(base.size, (chunk + 1) * _CHUNK), TILE):
            count = min(base.size - first, TILE)
            deltas(addresses, base.size, first, count, base, own, vectors)
            if least >= 0:
                ties = select(vectors, count, least, ties, total, variance, mask)
            for k in range(len(pairs)):
                one, other, lane = vectors[pairs[k, 0]], vectors[pairs[k, 1]], lanes[k]
                for j in range(count):
                    lane[j] += np.float64(one[j]) * np.float64(other[j])
        for k in range(len(pairs)):
            lane, half = lanes[k], TILE // 2
            while half:
                for j in range(half):
                    lane[j] += lane[half + j]
                half //= 2
            sums[k, chunk] = lane[0]
