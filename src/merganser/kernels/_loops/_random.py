"""Random draws that depend on their position."""

from __future__ import annotations

from typing import Any

import numpy as np

from merganser.kernels._loops._jit import Array, compiled

__all__ = ["drop", "keep"]

_RUN = 32
"""Bytes that are looked at together."""


@compiled
def _draw(counter: int, key: int) -> Any:
    z = (np.uint64(counter) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@compiled
def drop(draws: Array, coarse: int, limit: float, start: int, key: int, out: Array) -> None:
    """Whether each byte is above `coarse`; of those equal to it, whether the draw of their position reaches `limit`."""
    equal = np.uint8(coarse)
    for i in range(draws.size):
        out[i] = draws[i] > equal
    for first in range(0, draws.size, _RUN):
        own, any_ = draws[first : first + _RUN], np.uint8(0)
        for j in range(own.size):
            any_ |= np.uint8(own[j] == equal)
        if any_:
            for j in range(own.size):
                if own[j] == equal:
                    out[first + j] = np.float64(_draw(start + first + j, key)) >= limit


@compiled
def keep(draws: Array, probabilities: Array, start: int, key: int, out: Array) -> None:
    """Whether each byte is below its probability times 256; a draw of the position decides where 8 bits do not."""
    for first in range(0, draws.size, _RUN):
        own, wanted = draws[first : first + _RUN], probabilities[first : first + _RUN]
        result, any_ = out[first : first + _RUN], np.uint8(0)
        for j in range(own.size):
            scaled = wanted[j] * np.float32(256)
            coarse = np.uint8(np.int32(np.float32(255) if scaled > np.float32(255) else scaled))
            equal = np.uint8(own[j] == coarse)
            result[j] = np.uint8(own[j] < coarse) | (equal << np.uint8(1))
            any_ |= equal
        if any_:
            for j in range(own.size):
                if result[j] > 1:
                    limit = (np.float64(wanted[j]) * 256 - own[j]) * 2.0**64
                    result[j] = np.float64(_draw(start + first + j, key)) < limit
