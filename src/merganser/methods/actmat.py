"""ACTMat: RegMean without data, with the task vector in the place of the inputs."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.methods._base import About, Block, Method, State
from merganser.methods._matching import report
from merganser.operators import Gram, normal_equations
from merganser.solvers import Direct

__all__ = ["ActMat"]


@dataclass(frozen=True)
class ActMat(Method, name="actmat"):
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
    scope = "block"
    needs = frozenset({"base"})

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices that are not embeddings."""
        return len(spec.shape) == 2 and spec.role in (Role.LINEAR, Role.HEAD) and spec.numel > 0

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Gram matrices of the task vectors and their sum, in float64, and task vectors in float64."""
        return 2 * (models + 3) * spec.shape[1] ** 2 + 2 * (models + 6) * spec.numel

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """One matrix's solution, or one block of the mean of the task vectors."""
        deltas = block.deltas()
        if not self.whole(block.spec, frozenset()):
            total = deltas[0].mul_(block.weights[0])
            for delta, weight in zip(deltas[1:], block.weights[1:], strict=True):
                total.add_(delta, alpha=weight)
            return total.mul_(self.scale / sum(block.weights)).add_(block.base)
        vectors = [delta.view(block.spec.shape).double() for delta in deltas]
        metrics = [self._metric(vector) for vector in vectors]
        system = normal_equations(metrics, vectors, block.weights)
        solution = Direct().solve(system.operator, system.b, x0=system.x0, r0=system.r0)
        report(block, solution)
        merged = solution.x.reshape(-1).mul_(self.scale).to(block.base.dtype)
        return merged.add_(block.base)

    def _metric(self, vector: torch.Tensor) -> Gram:
        """``t' t``."""
        return Gram(vector.mT @ vector, len(vector))
