"""Inner products of many blocks at once."""

from __future__ import annotations

from merganser._torch import torch
from merganser.solvers._base import scalar_dtype

__all__ = ["Dots"]

_CHUNK = 4096


class Dots:
    """Inner products of the rows of two ``[n, d]`` tensors, without a tensor of that size being allocated.

    Products are summed in the tensors' type over chunks of a fixed size, and the chunks in float64: the result depends
    neither on the number of threads nor on the other blocks, and its error is that of the products' rounding.
    """

    def __init__(self, like: torch.Tensor) -> None:
        count, width = like.shape
        self._chunk = max(1, min(_CHUNK, width))
        chunks = -(-width // self._chunk)
        self._buffer = torch.zeros(count, chunks * self._chunk, dtype=like.dtype, device=like.device)
        self._used = self._buffer[:, :width]
        self._dtype = scalar_dtype(like.device)

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """``[n]`` inner products."""
        torch.mul(a, b, out=self._used)
        parts = self._buffer.view(len(a), -1, self._chunk).sum(-1)
        return parts.sum(-1, dtype=self._dtype)
