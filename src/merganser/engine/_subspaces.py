"""Leading singular directions of task vectors, by a randomised method whose memory is that of a few columns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merganser._torch import torch
from merganser.engine._executor import Executor
from merganser.engine._tensor import Input, TensorPlan
from merganser.kernels import uniforms
from merganser.methods._combination import Matrix

__all__ = ["Subspaces", "sample_matrices", "subspaces"]

_BLOCK = 1 << 20
_OVERSAMPLING = 8
_SEED = 0


@dataclass(frozen=True)
class Subspaces:
    """The leading singular directions of the task vectors of one matrix ``[m, n]``, in n_models models.

    Attributes:
        shape: of the matrix.
        rank: the number k of directions; at most a quarter of the smaller side.
        values: the k largest singular values of every task vector, descending, models x k.
        energy: the share of ``||t_i||^2`` that they hold, models; NaN where the task vector is zero.
        overlap: ``(||U_i' U_j||^2 + ||V_i' V_j||^2) / 2k``, models x models: 1 for the same subspaces; NaN where one is
            zero.
        chance: what this is for directions at random, ``(k/m + k/n) / 2``.
    """

    shape: tuple[int, int]
    rank: int
    values: Matrix
    energy: Matrix
    overlap: Matrix
    chance: float


def sample_matrices(tensors: Mapping[str, TensorPlan], count: int, smallest: int = 2) -> list[str]:
    """Names of `count` matrices, evenly spaced in the order of the tensors.

    Matrices with a side below `smallest` are left out, and embeddings and heads where there are other matrices.
    """
    matrices = [n for n, t in tensors.items() if len(t.spec.shape) == 2 and min(t.spec.shape) >= smallest]
    inner = [name for name in matrices if tensors[name].spec.role.value not in ("embedding", "head")]
    names = inner or matrices
    if len(names) <= count:
        return names
    return [names[round(index * (len(names) - 1) / (count - 1))] for index in range(count)]


def subspaces(
    tensors: Mapping[str, TensorPlan], names: Sequence[str], executor: Executor, *, rank: int = 16
) -> dict[str, Subspaces]:
    """The leading subspaces of some matrices, with a fixed seed: the same models give the same figures.

    Randomised subspace iteration (Halko, Martinsson, Tropp, 2011, algorithm 4.4 with one iteration) over blocks of
    rows: ``Y = T W``, ``Z = T' orth(Y)``, ``Y = T orth(Z)``, ``B = orth(Y)' T``.

    Complexity: per matrix and model four passes and O(m n k) operations; memory O((m + n) k) and a block of rows.
    """
    return dict(zip(names, executor.map(lambda name: _of_matrix(tensors[name], rank), names), strict=True))


def _of_matrix(tensor: TensorPlan, rank: int) -> Subspaces:
    rows, columns = tensor.spec.shape
    rank = max(1, min(rank, rows // 4, columns // 4))
    found = [_leading(tensor, index, rank) for index in range(len(tensor.inputs))]
    models = len(found)
    overlap: Matrix = np.full((models, models), np.nan)
    for i, j in itertools.product(range(models), repeat=2):
        a, b = found[i], found[j]
        if a.size and b.size:
            inner = [(x.mT @ y).square().sum() for x, y in ((a.left, b.left), (a.right, b.right))]
            overlap[i, j] = min(1.0, float(sum(inner)) / (2 * min(a.size, b.size)))
    values = np.zeros((models, rank))
    for index, item in enumerate(found):
        values[index, : item.size] = item.values.numpy()
    energy = np.array(
        [float(item.values.square().sum()) / item.square if item.square > 0 else math.nan for item in found]
    )
    return Subspaces((rows, columns), rank, values, energy, overlap, (rank / rows + rank / columns) / 2)


@dataclass(frozen=True)
class _Leading:
    """Leading triples ``[m, k], [k], [n, k]`` of one task vector, and ``||t||^2``."""

    left: torch.Tensor
    values: torch.Tensor
    right: torch.Tensor
    square: float

    @property
    def size(self) -> int:
        return self.values.numel()


def _leading(tensor: TensorPlan, index: int, rank: int) -> _Leading:
    rows, columns = tensor.spec.shape
    width = min(rank + _OVERSAMPLING, rows, columns)
    start = uniforms(_SEED, 0, tensor.spec.name, 0, columns * width).view(columns, width).sub_(0.5)
    left, square = _times(tensor, index, start)
    right = _transposed_times(tensor, index, torch.linalg.qr(left).Q)
    left, _ = _times(tensor, index, torch.linalg.qr(right).Q)
    basis = torch.linalg.qr(left).Q
    inner, values, outer = torch.linalg.svd(_transposed_times(tensor, index, basis).mT, full_matrices=False)
    kept = min(rank, int((values > 1e-6 * values[0]).sum())) if float(values[0]) > 0 else 0
    return _Leading((basis @ inner)[:, :kept], values[:kept], outer.mT[:, :kept], square)


def _times(tensor: TensorPlan, index: int, matrix: torch.Tensor) -> tuple[torch.Tensor, float]:
    """``T X``, and ``||T||^2``."""
    parts, square = [], 0.0
    for _, block in _row_blocks(tensor, index):
        parts.append(block @ matrix)
        square += float(block.square().sum())
    return torch.cat(parts), square


def _transposed_times(tensor: TensorPlan, index: int, matrix: torch.Tensor) -> torch.Tensor:
    """``T' X``."""
    total = matrix.new_zeros(tensor.spec.shape[1], matrix.shape[1])
    for rows, block in _row_blocks(tensor, index):
        total.addmm_(block.mT, matrix[rows])
    return total


def _row_blocks(tensor: TensorPlan, index: int) -> Iterator[tuple[slice, torch.Tensor]]:
    """The task vector of a model, a block of rows at a time, in float64."""
    assert tensor.base is not None
    rows, columns = tensor.spec.shape
    step = max(1, _BLOCK // columns)
    for first in range(0, rows, step):
        part = slice(first, min(rows, first + step))
        yield part, _rows(tensor.inputs[index], part).sub_(_rows(tensor.base, part))


def _rows(source: Input, part: slice) -> torch.Tensor:
    return source.checkpoint.read(source.name, part).double()
