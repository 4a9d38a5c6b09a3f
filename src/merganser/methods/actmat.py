"""ACTMat: RegMean without data, with the task vector in the place of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._datafree import MatrixMethod
from merganser.methods._matching import report
from merganser.operators import Gram, normal_equations
from merganser.solvers import Direct

__all__ = ["ActMat"]


@dataclass(frozen=True)
class ActMat(MatrixMethod, name="actmat"):
    """``T = (sum_i w_i t_i C_i) (sum_i w_i C_i)^+`` with ``C_i = t_i' t_i``, ``W = W_0 + scale T``.

    Updates by gradients lie in the span of the inputs, so the Gram matrix of the task vector (in x in) stands for that
    of the inputs. Matrices only; embeddings, norms, biases and convolutions take the mean of the task vectors.

    The system is solved in float64 by Cholesky, or in its range. O(in^3 + models out in^2) per matrix.
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
        system = normal_equations([self._metric(vector) for vector in vectors], vectors, block.weights)
        solution = Direct().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
        report(block, solution)
        return solution.x

    def _metric(self, vector: torch.Tensor) -> Gram:
        """``t' t``."""
        return Gram(vector.mT @ vector, len(vector))
