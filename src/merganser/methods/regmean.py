"""RegMean: match the outputs of every linear layer on each task's inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.methods._base import About, Method, State, check_normalisable
from merganser.methods._block import Block
from merganser.methods._matching import (
    as_matrix,
    from_matrix,
    matrix_elements,
    mean_model,
    metrics,
    report,
    rescaled,
)
from merganser.methods._options import option
from merganser.operators import normal_equations
from merganser.solvers import Direct

__all__ = ["RegMean"]


@dataclass(frozen=True)
class RegMean(Method, name="regmean"):
    """``(sum_i w_i A_i) W' = sum_i w_i A_i W_i'`` with ``A_i`` the Gram matrix of the layer's inputs in model i.

    It minimises ``sum_i w_i E ||W x - W_i x||^2`` over each task's inputs x. The off-diagonal entries of every ``A_i``
    are multiplied by `off_diagonal`. Tensors without a Gram matrix take the weighted mean.

    It is solved by Cholesky in float64; where it is singular, the weighted mean stays. O(in^3 + models out in^2)
    per layer; memory of one layer's tensors and Gram matrices.
    """

    off_diagonal: float = option(0.9, "factor of the off-diagonal entries of the Gram matrices", ge=0.0, le=1.0)
    ridge: float = option(0.0, "added to the diagonal, relative to the mean eigenvalue; pulls to the mean", ge=0.0)

    about = About(
        title="Regression onto every model's layer outputs (closed form)",
        equation="W = (sum_i w_i W_i A_i) (sum_i w_i A_i)^-1,  A_i = E[x x'] of the layer's inputs",
        source="Jin et al., Dataless knowledge fusion by merging weights (RegMean), 2023, arXiv:2212.09849",
        helps="A few hundred unlabelled inputs per task are at hand: the best of the cheap methods.",
        hurts="Inputs unlike those of the task; with labels, or labels sampled from the models, MaTS is better.",
        work=4,
        deviations="Other codes include padding tokens, and use off-diagonal factors from 0.1 (T5) to 0.95 (CLIP).",
    )
    scope = "block"
    needs = frozenset({"gram"})
    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base too, where the scale is not 1."""
        return self.needs if self.scale == 1 else self.needs | {"base"}

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero, because tensors without a Gram matrix are averaged."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Where there is a Gram matrix."""
        return "gram" in statistics and spec.role is not Role.EMBEDDING

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Scaled Gram matrices, their float64 sum and factor, and the right-hand sides."""
        return 2 * matrix_elements(spec, models, outputs=False) + 12 * spec.numel

    def merge(self, block: Block, state: State) -> torch.Tensor:
        """One layer's solution, or one block of the mean."""
        start = mean_model(block)
        known = [m.scale_off_diagonal(self.off_diagonal).to(torch.float64) for m in metrics(block, "gram")]
        if not known:
            return rescaled(block, start, self.scale)
        models = [as_matrix(block, block.model(index)).double() for index in range(len(block.weights))]
        system = normal_equations(known, models, block.weights, x0=as_matrix(block, start))
        solution = Direct(ridge=self.ridge).solve(system.operator, system.b, x0=system.x0, r0=system.r0)
        report(block, solution)
        return rescaled(block, from_matrix(block, solution.x).to(start.dtype), self.scale)
