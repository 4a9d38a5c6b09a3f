"""ACTMat: RegMean without data, with the task vector in the place of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._datafree import Regression, regress

__all__ = ["ActMat"]


@dataclass(frozen=True)
class ActMat(Regression, name="actmat"):
    """``T = (sum_i w_i t_i C_i) (sum_i w_i C_i)^+`` with ``C_i = t_i' t_i``, ``W = W_0 + scale T``.

    Updates by gradients lie in the span of the inputs, so the Gram matrix of the task vector (in x in) stands for that
    of the inputs. Matrices only, with embeddings of up to 2^22 entries; all else takes the mean of the task vectors.

    The pseudo-inverse leaves out what is rounding error in the compute type, as the authors' in float32 does (see
    `regress`). In float64 by Cholesky, or eigenvectors. O(in^3 + models out in^2) per matrix.
    """

    about = About(
        title="Data-free regression: the Gram matrix of each task vector stands for that of the inputs",
        equation="T = (sum_i t_i t_i' t_i) (sum_i t_i' t_i)^+",
        source="ACTMat / TACT, 2026, arXiv:2604.01329",
        helps="No data and no tuning: among the best data-free merges of language models.",
        hurts="Inputs of the tasks are at hand: RegMean and MaTS use them.",
        work=8,
    )

    def solve(self, block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The solution in the range of the metrics."""
        return regress(block, vectors, [self._metric(vector) for vector in vectors], block.weights)

    def _metric(self, vector: torch.Tensor) -> torch.Tensor:
        """``t' t``."""
        return vector.mT @ vector
