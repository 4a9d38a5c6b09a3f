"""Tiles of weights in bfloat16 (as uint16), as files have them: task vectors in float32, and which entries stay.

A tile of the base and of every model is made float32 in the first-level cache; nothing of that type is in memory.
"""

from __future__ import annotations

import numpy as np

from merganser.kernels._loops._convert import widened
from merganser.kernels._loops._disjoint import mask_tile, variance_tile
from merganser.kernels._loops._jit import Array, bits_of, compiled, float32_of, uint16_pointer, vector_at
from merganser.kernels._loops._random import drop

__all__ = ["delta_tile", "deltas", "drop_tile", "select", "trimmed_tile", "which_stay", "widen_tile"]


@compiled
def widen_tile(raw: Array, out: Array) -> None:
    """The base of a tile, float32."""
    for j in range(raw.size):
        out[j] = widened(raw[j])


@compiled
def delta_tile(raw: Array, own: Array, out: Array) -> None:
    """A task vector of a tile, float32."""
    for j in range(raw.size):
        out[j] = widened(raw[j]) - own[j]


@compiled
def trimmed_tile(raw: Array, own: Array, floor: float, out: Array) -> tuple[int, int]:
    """`delta_tile` with zeros for magnitudes below a floor; how many lie below it, and equal it."""
    edge, below, equal = np.float32(floor), np.int32(0), np.int32(0)
    for j in range(raw.size):
        delta = np.float32(widened(raw[j]) - own[j])
        below = np.int32(below + np.int32(abs(delta) < edge))
        equal = np.int32(equal + np.int32(abs(delta) == edge))
        out[j] = float32_of(bits_of(delta) & (np.uint32(abs(delta) < edge) - np.uint32(1)))
    return int(below), int(equal)


@compiled
def deltas(addresses: Array, size: int, first: int, count: int, base: Array, own: Array, vectors: Array) -> None:
    """The task vectors of a tile, float32, in the rows of a matrix, and the base in `own`."""
    widen_tile(base[first : first + count], own)
    for k in range(addresses.size):
        raw = vector_at(uint16_pointer(addresses[k]), size, np.uint16)[first : first + count]
        delta_tile(raw, own, vectors[k])


@compiled
def drop_tile(vector: Array, count: int, draws: Array, chance: Array, start: int, key: int, mask: Array) -> None:
    """Set the entries of a tile to zero that are dropped at random, and multiply the others.

    Args:
        vector: float32, overwritten.
        count: of its entries.
        draws: a byte for each of them.
        chance: the probability to be dropped times 256, its integer part and 2^64 times the rest; a factor.
        start: the position of the first entry.
        key: of further draws.
        mask: room for as many bytes.
    """
    factor = np.float32(chance[2])
    if chance[0] > 255:
        mask[:count] = 0
    else:
        drop(draws, int(chance[0]), chance[1], start, key, mask)
    for j in range(count):
        vector[j] = vector[j] * np.float32(mask[j]) * factor


@compiled
def which_stay(values: Array, count: int, wall: float, ties: int, above: bool, mask: Array) -> int:
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
def select(vectors: Array, count: int, least: float, ties: int, total: Array, variance: Array, mask: Array) -> int:
    """Set the entries to zero whose variance over the rows lies below `least`, or is zero; as `which_stay`."""
    variance_tile(vectors, count, total, variance)
    # nothing is above zero but what is not zero
    left = which_stay(variance, count, least, ties if least > 0 else 0, False, mask)
    for k in range(len(vectors)):
        mask_tile(vectors[k], mask, count)
    return left if least > 0 else ties
