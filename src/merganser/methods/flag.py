"""Flag aggregator: project the task vectors on the subspace that most of them share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merganser._torch import torch
from merganser.methods._base import About, Method, check_positive
from merganser.methods._block import Block, Context
from merganser.methods._combination import Matrix, combine, total_products
from merganser.methods._options import option

__all__ = ["Flag", "flag_projection"]

_CANCELLED = 1e-7
"""A sum of projected unit vectors that is shorter than this, each, is rounding, and has no direction."""


@dataclass(frozen=True)
class Flag(Method, name="flag"):
    """``W = W_0 + scale rho sum_i w_i Y Y' g_i`` with ``g_i = t_i / |t_i|`` over the whole model.

    Y (elements x rank, orthonormal) minimises ``sum_i sqrt(1 - |Y' g_i|^2)`` by iteratively reweighted least squares:
    the leading left singular vectors of ``[r_i w_i g_i]`` with ``r_i = (|1 - |Y' g_i|^2| + 1e-7)^(-1/4)``, from equal
    r_i. With `penalty` l, the differences ``g_i - g_j`` of all ordered pairs, times ``l / (n (n - 1)) r_ij``, are
    columns too. Everything lies in the span of the g_i, so Y is never formed: the iteration runs on the
    inner products of the task vectors.

    Directions have no length, so the result is given one by `rescale`: ``median`` takes the mean over the models times
    the median of ``|t_i|``; ``norm`` gives it that median as its length; ``none`` is ``1/rank`` times the sum, as the
    authors return it. Task vectors of zero are left out. Two passes, O(models^2 x elements).
    """

    rank: int = option(1, "dimensions of the subspace", ge=1)
    iterations: int = option(1, "of reweighting", ge=1)
    penalty: float = option(0.0, "weight of the differences between task vectors", ge=0.0)
    rescale: str = option("median", "the length of the result", choices=("median", "norm", "none"))

    about = About(
        title="Projection of the directions of the task vectors on the subspace that most of them share",
        equation="W = W_0 + lambda rho sum_i Y Y' t_i/|t_i|,  Y = argmin sum_i sqrt(1 - |Y' t_i/|t_i||^2)",
        source="Malik et al., Flag aggregator, 2023, arXiv:2302.05865",
        helps="Many models, some of which may be broken or far too large: lengths do not count, outliers count less.",
        hurts="Tasks that differ: what is not shared is projected away.",
        work=12,
        passes=2,
        deviations="The authors start from a random subspace of seed 1; in many dimensions all directions are equally "
        "far from that, so this starts from equal weights. Their result is rescale=none.",
    )
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The task vectors, and parts of them in float64 during the first pass."""
        return models + 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """Medians and means need positive weights."""
        super().check(models, weights)
        check_positive(self, weights)

    def prepare(self, context: Context) -> Matrix:
        """The inner products of the task vectors over the whole model."""
        return total_products(context)

    def merge(self, block: Block, state: Matrix) -> torch.Tensor:
        """The combination of one block."""
        return combine(block, self._coefficients(state, block.weights), deltas=True).add_(block.base)

    def _coefficients(self, products: Matrix, weights: Sequence[float]) -> list[float]:
        """Those of the task vectors."""
        norms = np.sqrt(np.diag(products))
        known = np.flatnonzero(norms > 0)
        factors = np.zeros(len(weights))
        if len(known):
            cosines = products[np.ix_(known, known)] / np.outer(norms[known], norms[known])
            shares = np.array(weights)[known] / math.fsum(np.array(weights)[known])
            found = flag_projection(cosines, shares * len(known), self.rank, self.iterations, self.penalty)
            factors[known] = found * self._length(cosines, found, norms[known]) / norms[known]
        return [float(factor) * self.scale for factor in factors]

    def _length(self, cosines: Matrix, found: Matrix, norms: Matrix) -> float:
        if self.rescale == "none":
            return 1 / self.rank
        median = float(np.median(norms))
        if self.rescale == "median":
            return median / len(norms)
        length = math.sqrt(max(0.0, float(found @ cosines @ found)))
        return median / length if length > _CANCELLED * len(norms) else 0.0


def flag_projection(
    cosines: Matrix,
    weights: Matrix,
    rank: int,
    iterations: int,
    penalty: float = 0.0,
    start: Matrix | None = None,
) -> Matrix:
    """The coefficients of ``sum_i w_i Y Y' g_i`` on the unit vectors g_i.

    Args:
        cosines: the inner products of the g_i.
        weights: one per vector.
        rank: dimensions of the subspace; at most that of the span of the g_i is used.
        iterations: of reweighting.
        penalty: weight of the differences.
        start: an n x n matrix P with ``P_ij = (Y_0' g_i)' (Y_0' g_j)`` of a subspace to start from; zeros by default.
    """
    count = len(cosines)
    pairs = list(itertools.permutations(range(count), 2)) if penalty > 0 else []
    columns = np.zeros((count, count + len(pairs)))
    columns[:, :count] = np.eye(count)
    scale = np.concatenate([weights, np.full(len(pairs), penalty / max(1, count * (count - 1)))])
    for index, (i, j) in enumerate(pairs, count):
        columns[i, index], columns[j, index] = 1.0, -1.0
    inside = np.zeros((count, count)) if start is None else start
    for _ in range(iterations):
        residual = np.abs(1 - np.einsum("ic,ij,jc->c", columns, inside, columns))
        spanned = columns * (scale * (residual + 1e-7) ** -0.25)
        values, vectors = np.linalg.eigh(spanned.T @ cosines @ spanned)
        leading = np.argsort(values)[::-1][:rank]
        leading = leading[values[leading] > values.max() * len(values) * np.finfo(float).eps]
        basis = spanned @ vectors[:, leading] / np.sqrt(values[leading])
        inside = cosines @ basis @ basis.T @ cosines
    projection: Matrix = basis @ (basis.T @ (cosines @ weights))
    return projection
