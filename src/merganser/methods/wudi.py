"""WUDI: a merged task vector that interferes least with every model's own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._datafree import Regression, regress
from merganser.methods._options import option
from merganser.operators import largest_eigenvalue
from merganser.solvers import Status

__all__ = ["Wudi"]

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


@dataclass(frozen=True)
class Wudi(Regression, name="wudi"):
    """``T = argmin sum_i w_i ||(T - t_i) t_i'||^2 / ||t_i||^2``, started at ``sum_i w_i t_i``; ``W = W_0 + scale T``.

    It is quadratic: the normal equations are ACTMat's with ``C_i = t_i' t_i / ||t_i||^2``. ``solver="closed"`` solves
    them, with `ridge` times the mean eigenvalue added, which pulls to the start; what no task vector spans keeps the
    start. ``solver="gradient"`` follows Adam for `iterations` steps, as the authors do: their step size bounds the way
    to ``iterations x learning_rate`` per entry, so their result is an early stop whose distance from the optimum
    depends on the size of the task vectors. A model whose task vector is zero here has no part in it.

    Matrices only, with embeddings of up to 2^22 entries; all else takes the mean of the task vectors. In
    float64. Closed: O(in^3 + models out in^2) per matrix; gradient: O(models out in^2 + iterations out in^2).
    """

    solver: str = option("closed", "the minimum, or Adam's way towards it", choices=("closed", "gradient"))
    ridge: float = option(1e-8, "for solver=closed: added to the diagonal, relative to its mean", ge=0.0)
    iterations: int = option(300, "for solver=gradient: steps of Adam", ge=0)
    learning_rate: float = option(1e-5, "for solver=gradient: step size of Adam", gt=0.0)

    about = About(
        title="Least interference with every task vector, in closed form or by Adam",
        equation="T = argmin sum_i ||(T - t_i) t_i'||^2 / ||t_i||^2",
        source="WUDI-Merging, 2025, arXiv:2503.08099",
        helps="No data: strong on vision models and encoders.",
        hurts="The closed form and the authors' 300 steps are different merges: tune `scale` for either.",
        work=10,
        deviations="The authors take 300 steps of Adam at 1e-5 (solver=gradient), FusionBench 400; both divide by zero "
        "where a matrix was not changed.",
    )

    def solve(self, block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The minimum, or where Adam stops."""
        start = torch.zeros_like(vectors[0])
        for vector, weight in zip(vectors, block.weights, strict=True):
            start.add_(vector, alpha=weight)
        moved = [(v, w / float(v.square().sum())) for v, w in zip(vectors, block.weights, strict=True) if v.any()]
        if not moved:
            return start
        changed, weights = [vector for vector, _ in moved], [weight for _, weight in moved]
        metrics = [vector.mT @ vector for vector in changed]
        if self.solver == "closed":
            return regress(block, changed, metrics, weights, start=start, ridge=self.ridge)
        began = time.perf_counter()
        system, target = torch.zeros_like(metrics[0]), torch.zeros_like(start)
        for vector, metric, weight in zip(changed, metrics, weights, strict=True):
            system.add_(metric, alpha=weight)
            target.addmm_(vector, metric, alpha=weight)
        mean, square = torch.zeros_like(start), torch.zeros_like(start)
        for step in range(1, self.iterations + 1):
            gradient = (start @ system).sub_(target).mul_(2)
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            bias = (1 - _BETAS[1] ** step) ** 0.5
            change = mean / (square.sqrt() / bias + _EPSILON)
            start.sub_(change, alpha=self.learning_rate / (1 - _BETAS[0] ** step))
        left, unit = float((target - start @ system).norm()), float(target.norm())
        block.report(
            status=Status.MAX_ITERATIONS.value,
            iterations=self.iterations,
            residual=left / unit if unit else 0.0,
            largest=largest_eigenvalue(system),
            seconds=time.perf_counter() - began,
        )
        return start
