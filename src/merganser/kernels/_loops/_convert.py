"""Between bfloat16 and float32.

Sums and unions are made integers of the accumulator's type again: Numba widens them, and half as many would go through
the processor at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from merganser.kernels._loops._jit import Array, compiled, float32_of

__all__ = ["finite", "narrow", "narrow_tile", "widen", "widen_less", "widened"]

_TOP = 1 << 31
_TO_OVERFLOW = _TOP - 0x7F7F8000
"""Added to the bits of a magnitude it sets the top one where bfloat16 rounds that to infinity."""


@compiled
def widened(raw: int) -> Any:
    """bfloat16 (as uint16) to float32."""
    return float32_of(np.uint32(raw) << np.uint32(16))


@compiled
def narrow_tile(bits: Array, out: Array) -> None:
    """float32 (as uint32) to bfloat16 (as uint16), to the nearest, ties to even; NaN may become infinite."""
    for i in range(bits.size):
        rounded = np.uint32(bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1)))
        out[i] = np.uint16(rounded >> np.uint32(16))


@compiled
def finite(raw: Array) -> Any:
    """Whether all elements of bfloat16 (as uint16) are finite."""
    seen = np.uint16(0)
    for i in range(raw.size):
        seen = np.uint16(seen | np.uint16((raw[i] & np.uint16(0x7F80)) + np.uint16(0x80)))
    return seen < 0x8000


@compiled
def widen(raw: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32; whether all elements are finite."""
    for i in range(raw.size):
        out[i] = widened(raw[i])
    return finite(raw)


@compiled
def widen_less(raw: Array, minus: Array, out: Array) -> Any:
    """bfloat16 (as uint16) to float32, less other numbers; whether all elements were finite."""
    for i in range(raw.size):
        out[i] = widened(raw[i]) - minus[i]
    return finite(raw)


@compiled
def narrow(values: Array, out: Array) -> Any:
    """float32 to bfloat16 (as uint16), to the nearest, ties to even; whether all results are finite.

    NaN may become infinite: where the answer is no, the results are to be made another way.
    """
    bits, seen = values.view(np.uint32), np.uint32(0)
    narrow_tile(bits, out)
    for i in range(bits.size):
        seen = np.uint32(seen | np.uint32((bits[i] & np.uint32(0x7FFFFFFF)) + np.uint32(_TO_OVERFLOW)))
    return seen < _TOP
