"""Between bfloat16 and float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from merganser.kernels._loops._jit import Array, compiled

__all__ = ["narrow", "widen", "widen_less"]

_TILE = 1024
"""Elements whose intermediate results stay in the first-level cache."""

_OVERFLOW = 0x7F7F8000
"""The bits of the smallest float32 that bfloat16 rounds to infinity."""


@compiled
def widen(raw: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32; whether all elements are finite."""
    bits, largest = out.view(np.uint32), np.uint16(0)
    for i in range(raw.size):
        bits[i] = np.uint32(raw[i]) << np.uint32(16)
        largest = max(largest, raw[i] & np.uint16(0x7F80))
    return largest < 0x7F80


@compiled
def widen_less(raw: Array, minus: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32, less other numbers; whether all elements were finite."""
    bits, largest = out.view(np.uint32), np.uint16(0)
    for first in range(0, raw.size, _TILE):
        own, wide, less = raw[first : first + _TILE], bits[first : first + _TILE], minus[first : first + _TILE]
        for i in range(own.size):
            wide[i] = np.uint32(own[i]) << np.uint32(16)
            largest = max(largest, own[i] & np.uint16(0x7F80))
        result = out[first : first + _TILE]
        for i in range(own.size):
            result[i] -= less[i]
    return largest < 0x7F80


@compiled
def narrow(values: Array, out: Array) -> Any:
    """float32 to bfloat16 (as uint16), to the nearest, ties to even; whether all results are finite.

    NaN may become infinite: where the answer is no, the results are to be made another way.
    """
    bits, largest = values.view(np.uint32), np.uint32(0)
    for i in range(values.size):
        rounded = bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))
        out[i] = np.uint16(rounded >> np.uint32(16))
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        largest = magnitude if magnitude > largest else largest
    return largest < np.uint32(_OVERFLOW)
