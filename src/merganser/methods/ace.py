"""ACE-Merging: regression with the covariances of the task vectors' rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._datafree import Regression, regress
from merganser.methods._options import option

__all__ = ["Ace"]

_TINY = 1e-12


@dataclass(frozen=True)
class Ace(Regression, name="ace"):
    """``T = (sum_i w_i t_i C_i) (sum_i w_i C_i)^+`` with C_i the covariance of the rows of ``t_i``.

    ``C_i = c_i' c_i``, ``c_i = t_i`` minus the mean of its rows. With ``variant="full"``, as the authors' code has it:

    1. If the models are heterogeneous here, ``Var(log ||t_i||^2) / Mean(log ||t_i||^2)^2 > threshold``, each C_i is
       divided by its trace, and so is `ridge`, which is added to its diagonal.
    2. The target is ``c_i``, and the mean row of ``sum_i C_i`` is added to every row of the sum that is inverted (the
       collective prior), divided by the mean of ``||t_i||^2`` in the heterogeneous case.
    3. In the heterogeneous case the `refine` share of the leading singular directions of
       ``T + sum_i t_i (C_i - mean_j (C_j + ridge))`` is added with equal strength, the mean of their singular values.

    Matrices only, with embeddings of up to 2^22 entries; all else takes the mean of the task vectors. In float64,
    O(in^3 + models out in^2) per matrix, and a singular value decomposition for step 3.
    """

    variant: str = option("covariance", "the covariances alone, or all of the method", choices=("covariance", "full"))
    ridge: float = option(1e-2, "for variant=full: added to the diagonal of each covariance", ge=0.0)
    threshold: float = option(0.3, "for variant=full: heterogeneity above which covariances are normalised", ge=0.0)
    refine: float = option(0.3, "for variant=full: share of the singular directions that is refined", ge=0.0, le=1.0)

    about = About(
        title="Data-free regression with the covariance of each task vector's rows",
        equation="T = (sum_i t_i C_i) (sum_i C_i)^+,  C_i = cov(rows of t_i)",
        source="Xu et al., ACE-Merging, 2026, arXiv:2603.02945",
        helps="No data and no tuning; with variant=full, encoders whose task vectors differ much in size.",
        hurts="Inputs of the tasks are at hand: RegMean and MaTS use them.",
        work=10,
        deviations="The ridge of variant=full is 4e-2 for GPT-2, 2e-4 for RoBERTa and 1e-5 elsewhere in the paper, "
        "1e-2 in the code.",
    )

    def solve(self, block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The closed form, and the refinement."""
        centred = [vector - vector.mean(0, keepdim=True) for vector in vectors]
        covariances = [c.mT @ c for c in centred]
        if self.variant == "full":
            return self._full(block, vectors, centred, covariances)
        return regress(block, vectors, covariances, block.weights)

    def _full(
        self,
        block: Block,
        vectors: Sequence[torch.Tensor],
        centred: Sequence[torch.Tensor],
        covariances: list[torch.Tensor],
    ) -> torch.Tensor:
        sizes = [float(vector.square().sum()) for vector in vectors]
        different = _heterogeneity(sizes) > self.threshold
        ridges = [self.ridge] * len(vectors)
        if different:
            traces = [float(c.trace()) + _TINY for c in covariances]
            covariances = [c / trace for c, trace in zip(covariances, traces, strict=True)]
            ridges = [self.ridge / trace for trace in traces]
        summed, target = torch.zeros_like(covariances[0]), torch.zeros_like(vectors[0])
        prior = torch.zeros_like(summed[:1])
        for c, vector, ridge, weight in zip(covariances, centred, ridges, block.weights, strict=True):
            prior.add_(c.mean(0, keepdim=True), alpha=weight)
            damped = c.clone()
            damped.diagonal().add_(ridge)
            summed.add_(damped, alpha=weight)
            target.add_(vector @ damped, alpha=weight)
        scale = statistics.fmean(sizes) + _TINY if different else 1.0
        merged: torch.Tensor = target @ torch.linalg.pinv(summed + prior / scale)
        rank = int(min(merged.shape) * self.refine)
        if not different or not rank:
            return merged
        mean = summed / math.fsum(block.weights)
        fused = merged.clone()
        for c, vector, weight in zip(covariances, vectors, block.weights, strict=True):
            fused.add_(vector @ (c - mean), alpha=weight)
        u, s, vh = torch.linalg.svd(fused, full_matrices=False)
        return merged.add_(u[:, :rank] @ vh[:rank], alpha=float(s[:rank].mean()))


def _heterogeneity(sizes: Sequence[float]) -> float:
    """``Var(log s) / Mean(log s)^2`` of the squared norms, with the unbiased variance; 0 for one model."""
    logs = [math.log(size + _TINY) for size in sizes]
    return statistics.variance(logs) / (statistics.fmean(logs) ** 2 + _TINY) if len(logs) > 1 else 0.0
