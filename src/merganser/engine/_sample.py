"""Which elements a sample of a model reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from merganser.methods import BlockKey

__all__ = ["RUN", "middle", "some"]

RUN = 1 / 16
"""The least share of a block that a sample takes; of a smaller sample some blocks are left out instead."""

_TOGETHER = 8
"""Blocks of a sample that make a task."""


def some(tasks: Iterable[list[BlockKey]], stride: int) -> Iterator[list[BlockKey]]:
    """Every so many-th block, if there are many."""
    blocks = [key for task in tasks for key in task]
    chosen = blocks[:: stride if len(blocks) > 64 * stride else 1]
    return (chosen[first : first + _TOGETHER] for first in range(0, len(chosen), _TOGETHER))


def middle(key: BlockKey, share: float) -> BlockKey:
    """The middle part of a block; it begins at a multiple of 64 elements."""
    length = key.stop - key.start
    if share >= 1 or not length:
        return key
    wanted = max(1, round(length * share))
    start = key.start + (length - wanted) // 2 // 64 * 64
    return BlockKey(key.name, start, start + wanted)
