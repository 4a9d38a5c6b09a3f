"""Rows of tensors that are read in blocks: where they begin inside a chunk, and one value per row over its elements."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.methods._block import Block

__all__ = ["chunks", "row_cuts", "spread"]


def chunks(block: Block) -> Iterator[tuple[int, int, int]]:
    """The chunks of a block: position in the tensor, first and last element in the block.

    Sums over chunks, added in the order of the chunks, do not depend on how the tensor is divided into blocks.
    """
    size = block.key.stop - block.key.start
    for first in range(0, size, kernels.CHUNK):
        yield block.key.start + first, first, min(size, first + kernels.CHUNK)


def row_cuts(start: int, stop: int, length: int) -> tuple[int, npt.NDArray[np.intp]]:
    """The rows of `length` elements that touch the elements ``[start, stop)``.

    Returns:
        The first row, and where each row begins, relative to `start` (0 for one that began earlier).
    """
    row = start // length
    cuts = np.arange(row * length, stop, length, dtype=np.intp) - start
    cuts[0] = 0
    return row, cuts


def spread(
    values: npt.NDArray[np.float64], block: Block, length: int, like: torch.Tensor, *, inner: bool = False
) -> torch.Tensor:
    """The value of every element's row, for the elements of a block.

    Args:
        values: one per row.
        block: the block.
        length: elements per row.
        like: a tensor of the type and device of the result.
        inner: rows run along the first dimension instead: element p belongs to row ``p mod length``.
    """
    start, stop = block.key.start, block.key.stop
    narrow = values.astype(np.float64 if like.dtype == torch.float64 else np.float32)
    if inner:
        offset = start % length
        whole = np.tile(narrow, -(-(offset + stop - start) // length))[offset : offset + stop - start]
    else:
        row, cuts = row_cuts(start, stop, length)
        whole = np.repeat(narrow[row : row + len(cuts)], np.diff(cuts, append=stop - start))
    return torch.from_numpy(whole).to(like.device)
