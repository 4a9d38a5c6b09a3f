"""One orthonormal basis for the outputs of several task vectors of a matrix, and task vectors in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from merganser._torch import torch
from merganser.methods._block import Block
from merganser.methods._spectral import range_basis, thin_svd

__all__ = ["Basis", "common_basis", "workspace"]

_NULL = 1e-5
"""Singular values of the joined task vectors up to this are left out, as in the authors' code."""

_ROWS = 4096
"""Rows of the joined task vectors that are in float64 at a time."""


class Basis(Protocol):
    """The left singular vectors ``U [m, k]`` of ``[t_1 | .. | t_n] = U S [V_1' | .. | V_n']``, each ``t_i`` ``[m, c]``.

    Attributes:
        rank: k.
        numel: the elements that keeping it takes.
    """

    @property
    def rank(self) -> int:
        """See the class."""
        ...

    @property
    def numel(self) -> int:
        """See the class."""
        ...

    def rotated(self, index: int, delta: torch.Tensor, rows: slice) -> torch.Tensor:
        """Rows of ``U' t_i = S V_i' [k, c]``, in float64."""
        ...

    def restored(self, block: Block, vector: torch.Tensor) -> torch.Tensor:
        """``U x [m, c]`` of ``x [k, c]``, in float64; the block's buffers of task vectors are used."""
        ...


@dataclass(frozen=True)
class _Left:
    """U itself."""

    vectors: torch.Tensor

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    @property
    def numel(self) -> int:
        return self.vectors.numel()

    def rotated(self, index: int, delta: torch.Tensor, rows: slice) -> torch.Tensor:
        return self.vectors[:, rows].mT @ delta.double()

    def restored(self, block: Block, vector: torch.Tensor) -> torch.Tensor:
        return self.vectors @ vector.double()


@dataclass(frozen=True)
class _Right:
    """S and V, where m is the longer side (an embedding): ``U x = sum_i t_i V_i S^-1 x``."""

    vectors: torch.Tensor
    values: torch.Tensor

    @property
    def rank(self) -> int:
        return self.vectors.shape[1]

    @property
    def numel(self) -> int:
        return self.vectors.numel() + self.values.numel()

    def _of(self, index: int, columns: int) -> torch.Tensor:
        return self.vectors[index * columns : (index + 1) * columns]

    def rotated(self, index: int, delta: torch.Tensor, rows: slice) -> torch.Tensor:
        return (self._of(index, delta.shape[1])[:, rows] * self.values[rows]).mT.contiguous()

    def restored(self, block: Block, vector: torch.Tensor) -> torch.Tensor:
        rows, columns = block.spec.shape
        scaled = vector.double() / self.values[:, None]
        found = torch.zeros(rows, columns, dtype=torch.float64, device=vector.device)
        for index in range(len(block.weights)):
            delta = block.delta(index, slot=0).view(rows, columns)
            found.addmm_(delta.double(), self._of(index, columns) @ scaled)
        return found


def common_basis(block: Block) -> Basis:
    """The basis of a matrix's task vectors, without directions whose singular value is up to 1e-5.

    In float64, from the eigenvectors of the smaller of ``J J'`` and ``J' J`` with ``J = [t_1 | .. | t_n]``; values that
    came from float64 need the decomposition of J itself. O(m n c min(m, n c)).
    """
    dtype, (rows, columns) = block.base.dtype, block.spec.shape
    models, device = len(block.weights), block.base.device
    if dtype == torch.float64:
        deltas = [block.delta(index, slot=index).view(rows, columns) for index in range(models)]
        return _Left(thin_svd(torch.cat(deltas, dim=1), dtype, floor=_NULL)[0].contiguous())
    size = min(rows, models * columns)
    gram = torch.zeros(size, size, dtype=torch.float64, device=device)
    if size == rows:
        for index in range(models):
            delta = block.delta(index, slot=0).view(rows, columns).double()
            gram.addmm_(delta, delta.mT)
    else:
        deltas = [block.delta(index, slot=index).view(rows, columns) for index in range(models)]
        for first in range(0, rows, _ROWS):
            joined = torch.cat([delta[first : first + _ROWS] for delta in deltas], dim=1).double()
            gram.addmm_(joined.mT, joined)
    if not bool(gram.isfinite().all()):  # where the user allows that: nothing is rotated, and what is NaN stays so
        return _Left(torch.eye(rows, dtype=torch.float64, device=device))
    vectors = range_basis(gram, dtype, _NULL).contiguous()
    if size == rows:
        return _Left(vectors)
    return _Right(vectors, torch.linalg.vector_norm(gram @ vectors, dim=0).sqrt())


def workspace(rows: int, columns: int, models: int, dtype: torch.dtype) -> int:
    """Elements of a type that finding and using the basis of a matrix takes, beside a buffer per model."""
    small = min(rows, models * columns)
    joined = rows if dtype == torch.float64 else min(rows, _ROWS)
    return 8 * small * small + 4 * models * joined * columns + 4 * rows * columns
