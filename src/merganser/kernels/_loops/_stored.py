"""Loops over weights in bfloat16 (as uint16), as files have them.

A tile of the base and of every model is made float32 in the first-level cache; nothing of that type is in memory.
"""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._convert import narrow_tile, widened
from merganser.kernels._loops._disjoint import combine, mask_tile, variance_tile
from merganser.kernels._loops._jit import TILE, Array, compiled, uint16_pointer, vector_at
from merganser.kernels._loops._random import keep
from merganser.kernels._loops._ranks import rank_row, split_tile

__all__ = ["energies_stored", "merge_ranked", "merge_stored", "split_stored", "split_variances"]

_TINY = float(np.finfo(np.float32).tiny)

_CHUNK = 1 << 14
"""Elements over which energies are summed."""


@compiled
def _deltas(addresses: Array, size: int, first: int, count: int, base: Array, own: Array, vectors: Array) -> None:
    """The task vectors of a tile, float32, in the rows of a matrix, and the base in `own`."""
    minus = base[first : first + count]
    for j in range(count):
        own[j] = widened(minus[j])
    for k in range(addresses.size):
        raw, vector = vector_at(uint16_pointer(addresses[k]), size, np.uint16)[first : first + count], vectors[k]
        for j in range(count):
            vector[j] = widened(raw[j]) - own[j]


@compiled
def _kept(values: Array, count: int, wall: float, ties: int, above: bool, mask: Array) -> int:
    """The magnitudes of a tile that do not lie below a wall, or do not lie `above` it, as masks of bits.

    Of those that equal the wall the first `ties` lie above it, the others below; all lie above it if that is negative.

    Returns:
        How many of those that come next and equal it lie above it.
    """
    one, edge, left = np.uint32(1), np.float32(wall), ties
    if ties > 0:
        equal = np.int32(0)
        for j in range(count):
            equal = np.int32(equal + np.int32(abs(values[j]) == edge))
        if equal > ties:
            for j in range(count):
                upper = abs(values[j]) > edge
                if abs(values[j]) == edge and left > 0:
                    upper, left = True, left - 1
                mask[j] = np.uint32(upper == above) - one
            return 0
        left -= int(equal)
    if above and ties:
        for j in range(count):
            mask[j] = np.uint32(abs(values[j]) >= edge) - one
    elif above:
        for j in range(count):
            mask[j] = np.uint32(abs(values[j]) > edge) - one
    elif ties:
        for j in range(count):
            mask[j] = np.uint32(abs(values[j]) < edge) - one
    else:
        for j in range(count):
            mask[j] = np.uint32(abs(values[j]) <= edge) - one
    return left


@compiled
def _select(vectors: Array, count: int, least: float, ties: int, total: Array, variance: Array, mask: Array) -> int:
    """Set the entries to zero whose variance over the rows lies below `least`, or is zero; what `_kept` returns."""
    variance_tile(vectors, count, total, variance)
    # nothing is above zero but what is not zero
    left = _kept(variance, count, least, ties if least > 0 else 0, False, mask)
    for k in range(len(vectors)):
        mask_tile(vectors[k], mask, count)
    return left if least > 0 else ties


@compiled
def merge_stored(
    addresses: Array,
    walls: Array,
    ties: Array,
    least: float,
    table: Array,
    take: int,
    zero: int,
    counted: bool,
    scale: float,
    base: Array,
    out: Array,
    counts: Array,
) -> tuple[int, bool]:
    """The merge of models less their base, rounded to bfloat16.

    Args:
        addresses: of the models' first elements.
        walls: a row of floors and one of caps: magnitudes below the one, and above the other, count as zero.
        ties: of the magnitudes that equal a floor or a cap the first so many lie above it, all if that is negative; a
            third row begins with that of `least`. Overwritten.
        least: entries whose variance over the models lies below it, or is zero, count as zero; none if it is negative.
        table: as for `combine`, and all that follow.
        take: what is taken.
        zero: the sign elected where the sum is 0.
        counted: whether signs are counted.
        scale: of the merge.
        base: is added at last.
        out: receives the result.
        counts: where it has a row for each model, the magnitudes below its floor, and those that equal it, are added to
            that.

    Returns:
        How many more sums are positive than negative, and whether entries cancel.
    """
    size, balance, doubt = base.size, 0, False
    vectors, room = np.empty((addresses.size, TILE), np.float32), np.empty((4, TILE), np.float32)
    own, result, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float64)
    mask = np.empty(TILE, np.uint32)
    for first in range(0, size, TILE):
        count = min(size - first, TILE)
        _deltas(addresses, size, first, count, base, own, vectors)
        for k in range(len(counts)):
            vector, floor = vectors[k], walls[0, k]
            below, equal = np.int32(0), np.int32(0)
            for j in range(count):
                below = np.int32(below + np.int32(abs(vector[j]) < floor))
                equal = np.int32(equal + np.int32(abs(vector[j]) == floor))
            counts[k, 0] += below
            counts[k, 1] += equal
        if least >= 0:
            ties[2, 0] = _select(vectors, count, least, ties[2, 0], total, result, mask)
        for k in range(addresses.size):
            for side in range(2):
                if walls[0, k] > 0 if side == 0 else walls[1, k] < np.inf:
                    ties[side, k] = _kept(vectors[k], count, walls[side, k], ties[side, k], side == 1, mask)
                    mask_tile(vectors[k], mask, count)
        found = combine(vectors, count, table, take, zero, counted, scale, own, result, room)
        balance, doubt = balance + found[0], doubt | found[1]
        narrow_tile(result.view(np.uint32)[:count], out[first : first + count])
    return balance, doubt


@compiled
def merge_ranked(
    addresses: Array,
    steps: Array,
    draws: Array,
    start: int,
    keys: Array,
    rescaled: bool,
    table: Array,
    take: int,
    zero: int,
    counted: bool,
    scale: float,
    base: Array,
    out: Array,
) -> None:
    """The merge of models less their base, of which entries are dropped at random, by ranks in rows.

    Args:
        addresses: of the models' first elements.
        steps: for each model and each rank of a magnitude in its row the probability to be kept (models x row); a model
            whose first is above 1 stays whole.
        draws: bytes, for each model and element.
        start: the position of the first element.
        keys: of further draws, for each model.
        rescaled: whether what is kept is divided by its probability.
        table: as for `combine`, and all that follow.
        take: what is taken.
        zero: the sign elected where the sum is 0.
        counted: whether signs are counted.
        scale: of the merge.
        base: is added at last; whole rows.
        out: receives the result, rounded to bfloat16.
    """
    models, width = steps.shape
    vectors, room = np.empty((models, width), np.float32), np.empty((4, width), np.float32)
    own, result, mask = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.uint8)
    counts, bins = np.empty(2 * width, np.int32), np.empty(width, np.int32)
    items, least = np.empty((2, width), np.uint64), np.float32(_TINY)
    for first in range(0, base.size, width):
        last = first + width
        _deltas(addresses, base.size, first, width, base, own, vectors)
        for k in range(models):
            if steps[k, 0] > 1:
                continue
            vector, kept = vectors[k], room[0]
            for j in range(width):
                result[j] = abs(vector[j])
            rank_row(result, steps[k], kept, counts, bins, items)
            keep(draws[k, first:last], kept, start + first, keys[k], mask)
            for j in range(width):
                vector[j] *= np.float32(mask[j])
            if rescaled:
                # an entry that is never kept is zero already
                for j in range(width):
                    vector[j] /= max(kept[j], least)
        combine(vectors, width, table, take, zero, counted, scale, own, result, room)
        narrow_tile(result.view(np.uint32), out[first:last])


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
        _deltas(addresses, base.size, first, count, base, own, vectors)
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
def energies_stored(addresses: Array, base: Array, least: float, ties: int, sums: Array) -> None:
    """`ordered_squares` of models less their base, without entries whose variance is below `least`, or zero.

    Args:
        addresses: of the models' first elements.
        base: of the base.
        least: a variance; no entry is left out if it is negative.
        ties: of the variances that equal it the first so many are not below it; none is if that is negative.
        sums: for every model one number per chunk (float64).
    """
    vectors, own = np.empty((addresses.size, TILE), np.float32), np.empty(TILE, np.float32)
    total, variance = np.empty(TILE, np.float64), np.empty(TILE, np.float32)
    mask = np.empty(TILE, np.uint32)
    lanes = np.empty((addresses.size, TILE), np.float64)
    for chunk in range(sums.shape[1]):
        lanes[:] = 0.0
        for first in range(chunk * _CHUNK, min(base.size, (chunk + 1) * _CHUNK), TILE):
            count = min(base.size - first, TILE)
            _deltas(addresses, base.size, first, count, base, own, vectors)
            if least >= 0:
                ties = _select(vectors, count, least, ties, total, variance, mask)
            for k in range(addresses.size):
                vector, lane = vectors[k], lanes[k]
                for j in range(count):
                    lane[j] += np.float64(vector[j]) * np.float64(vector[j])
        for k in range(addresses.size):
            lane, half = lanes[k], TILE // 2
            while half:
                for j in range(half):
                    lane[j] += lane[half + j]
                half //= 2
            sums[k, chunk] = lane[0]
