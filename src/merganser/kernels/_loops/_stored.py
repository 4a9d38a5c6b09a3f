"""Merges of weights in bfloat16 (as uint16), as files have them, in one pass."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from merganser.kernels._loops._convert import narrow_tile
from merganser.kernels._loops._disjoint import Rule, cancelled_tile, combine, mask_tile
from merganser.kernels._loops._jit import TILE, Array, compiled, uint16_pointer, vector_at
from merganser.kernels._loops._random import keep
from merganser.kernels._loops._ranks import rank_row
from merganser.kernels._loops._tiles import (
    delta_tile,
    deltas,
    drop_tile,
    select,
    trimmed_tile,
    which_stay,
    widen_tile,
)

__all__ = ["merge_ranked", "merge_stored"]

Drops: TypeAlias = "tuple[Array, Array, Array, int]"
"""Of every model a row of bytes, one for each element (no rows: nothing is dropped), a row for `drop_tile`, and a key
of further draws; the position of the first element.
"""

_TINY = float(np.finfo(np.float32).tiny)


@compiled
def merge_stored(
    addresses: Array,
    walls: Array,
    ties: Array,
    least: float,
    drops: Drops,
    rule: Rule,
    base: Array,
    out: Array,
    counts: Array,
    places: Array,
) -> tuple[int, bool, int]:
    """The merge of models less their base, rounded to bfloat16.

    Args:
        addresses: of the models' first elements.
        walls: a row of floors and one of caps: magnitudes below the one, and above the other, count as zero.
        ties: of the magnitudes that equal a floor or a cap the first so many lie above it, all if that is negative; a
            third row begins with that of `least`. Overwritten.
        least: entries whose variance over the models lies below it, or is zero, count as zero; none if it is negative.
        drops: what is dropped at random; what is left is compared with walls, and merged.
        rule: as for `combine`.
        base: is added at last.
        out: receives the result.
        counts: where it has a row for each model, the magnitudes below its floor, and those that equal it, are added to
            that; not beside `least`, `drops` and floors that some magnitudes which equal them lie below.
        places: receives the positions where entries cancel, as many as it has room for.

    Returns:
        How many more sums are positive than negative, whether entries cancel, and in how many positions; of these only
        some are counted that `places` has no room for.
    """
    size, balance, doubt, cancelled = base.size, 0, False, 0
    draws, chances, keys, start = drops
    vectors, room = np.empty((addresses.size, TILE), np.float32), np.empty((4, TILE), np.float32)
    own, result, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float64)
    mask, chosen = np.empty(TILE, np.uint32), np.empty(TILE, np.uint8)
    trimmed, direct = np.zeros(addresses.size, np.bool_), len(draws) == 0 and least < 0
    for first in range(0, size, TILE):
        count = min(size - first, TILE)
        widen_tile(base[first : first + count], own)
        for k in range(addresses.size):
            raw = vector_at(uint16_pointer(addresses[k]), size, np.uint16)[first : first + count]
            trimmed[k] = direct and ties[0, k] < 0 and (walls[0, k] > 0 or len(counts) > 0)
            if trimmed[k]:
                below, equal = trimmed_tile(raw, own, walls[0, k], vectors[k])
                if len(counts):
                    counts[k, 0] += below
                    counts[k, 1] += equal
            else:
                delta_tile(raw, own, vectors[k])
        for k in range(len(draws)):
            own_draws = draws[k, first : first + count]
            drop_tile(vectors[k], count, own_draws, chances[k], start + first, keys[k], chosen)
        if least >= 0:
            ties[2, 0] = select(vectors, count, least, ties[2, 0], total, result, mask)
        for k in range(addresses.size):
            for side in range(1 if trimmed[k] else 0, 2):
                if walls[0, k] > 0 if side == 0 else walls[1, k] < np.inf:
                    ties[side, k] = which_stay(vectors[k], count, walls[side, k], ties[side, k], side == 1, mask)
                    mask_tile(vectors[k], mask, count)
        found = combine(vectors, count, rule, own, result, room)
        balance, doubt = balance + found[0], doubt | found[1]
        if found[1] and cancelled <= places.size:
            cancelled = cancelled_tile(vectors, count, first, room, chosen, places, cancelled)
        narrow_tile(result.view(np.uint32)[:count], out[first : first + count])
    return balance, doubt, cancelled


@compiled
def merge_ranked(
    addresses: Array,
    steps: Array,
    draws: Array,
    start: int,
    keys: Array,
    rescaled: bool,
    rule: Rule,
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
        rule: as for `combine`.
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
        deltas(addresses, base.size, first, width, base, own, vectors)
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
        combine(vectors, width, rule, own, result, room)
        narrow_tile(result.view(np.uint32), out[first:last])
