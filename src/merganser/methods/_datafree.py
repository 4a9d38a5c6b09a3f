"""What the methods share that make metrics from the task vectors of a matrix."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.methods._block import Block
from merganser.methods._matrices import MatrixMethod, is_matrix
from merganser.operators import solve_psd
from merganser.solvers import Status

__all__ = ["Regression", "regress"]

LARGEST_EMBEDDING = 1 << 22
"""Entries of an embedding up to which it is a matrix like others."""


def regress(
    block: Block,
    vectors: Sequence[torch.Tensor],
    metrics: Sequence[torch.Tensor],
    weights: Sequence[float],
    *,
    start: torch.Tensor | None = None,
    ridge: float = 0.0,
) -> torch.Tensor:
    """``T = S + (sum_i w_i (t_i - S) C_i) (sum_i w_i C_i + r I)^+`` with ``C_i`` ``[in, in]`` and S zeros by default.

    Directions count as unseen, and keep S, where the eigenvalue of the sum is less than in times the precision of the
    compute type of the largest. That is the pseudo-inverse in that type: where the task vectors together have just
    enough rows to determine T (key and value projections with few heads), exact solutions are made of noise alone.

    Args:
        block: the matrix's block, for the compute type and the report.
        vectors: the task vectors, in float64.
        metrics: the C_i, in float64.
        weights: the w_i.
        start: S.
        ridge: r, relative to the mean eigenvalue.
    """
    began = time.perf_counter()
    system, target = torch.zeros_like(metrics[0]), torch.zeros_like(vectors[0])
    for vector, metric, weight in zip(vectors, metrics, weights, strict=True):
        system.add_(metric, alpha=weight)
        target.addmm_(vector if start is None else vector - start, metric, alpha=weight)
    shifted = system.clone()
    shifted.diagonal().add_(ridge * system.diagonal().mean())
    size = len(system)
    found = solve_psd(shifted, target.mT, cutoff=size * torch.finfo(block.base.dtype).eps)
    x = found.x.mT.contiguous()
    left, unit = float((target - x @ shifted).norm()), float(target.norm())
    status = Status.EXACT if found.rank == size else Status.SINGULAR
    block.report(
        status=status.value,
        iterations=1,
        rank=found.rank,
        ridge=ridge,
        residual=left / unit if unit else 0.0,
        smallest=found.smallest,
        largest=found.largest,
        seconds=time.perf_counter() - began,
    )
    return x if start is None else x.add_(start)


@dataclass(frozen=True)
class Regression(MatrixMethod):
    """A method that solves a linear system for the merged task vector of each matrix.

    Embeddings of more than `LARGEST_EMBEDDING` entries are left out: the solve needs every model's whole matrix, and on
    eight text tasks it made no difference.
    """

    def buffers(self, models: int) -> int:
        """The task vectors of all models, and a sum."""
        return models + 2

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices, but for large embeddings."""
        return is_matrix(spec) and (spec.role is not Role.EMBEDDING or spec.numel <= LARGEST_EMBEDDING)

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Gram matrices of the task vectors and their sum, in float64, and task vectors in float64."""
        return 2 * (models + 3) * spec.shape[1] ** 2 + 2 * (models + 6) * spec.numel

    def merge_matrix(self, block: Block) -> torch.Tensor:
        """One matrix's solution."""
        return self.solve(block, [delta.view(block.spec.shape).double() for delta in block.deltas()])

    @abstractmethod
    def solve(self, block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The merged task vector ``[out, in]`` from those of the models; yours to overwrite."""
