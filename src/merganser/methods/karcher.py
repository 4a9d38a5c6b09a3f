"""Karcher mean: the Riemannian centre of mass on the sphere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merganser._torch import torch
from merganser.methods._base import About, Method, check_positive
from merganser.methods._block import Block, Context
from merganser.methods._combination import Matrix, combine, inner_products
from merganser.methods._options import option

__all__ = ["Karcher"]

_VANISHING = 1e-7


@dataclass(frozen=True)
class Karcher(Method, name="karcher"):
    """The Riemannian mean m of the models' directions ``u_i = W_i / |W_i|`` on the sphere, times their mean norm.

    Per tensor: from the normalised mean direction, ``T = sum_i w_i log_m(u_i)`` and ``m <- exp_m(T)`` until
    ``|T| <= tol`` or `max_iter` times, with ``log_m(u) = theta / sin(theta) (u - cos(theta) m)``,
    ``cos(theta) = <u, m>``. Then ``W = m sum_i w_i |W_i|``; weights are normalised.

    Every iterate is a combination of the u_i, so the iteration runs on coefficients and the matrix of inner products.
    A tensor of zeros has no direction and counts in the mean norm only. Where the directions cancel, W is the average.
    Two passes, O(models^2 x elements).
    """

    max_iter: int = option(10, "most iterations; 0 gives the normalised mean direction", ge=0)
    tol: float = option(1e-5, "stop where a step on the sphere is at most this angle", ge=0.0)

    about = About(
        title="Mean of the directions along the sphere, times the mean norm, tensor by tensor",
        equation="W = argmin_m sum_i w_i angle(m, W_i)^2 . sum_i w_i |W_i|",
        source="Karcher, Riemannian center of mass, 1977; for models: mergekit",
        helps="Three or more models of one family, where slerp is limited to two.",
        hurts="Fine-tunes of one base are nearly parallel: it is then the average with its norm restored.",
        work=10,
        passes=2,
        deviations="mergekit has no weights here, and between opposite models it returns the first.",
    )
    base_is_model = True

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The models, and parts of them in float64 during the first pass."""
        return models + 2

    def check(self, models: int, weights: Sequence[float]) -> None:
        """A centre of mass needs positive weights."""
        super().check(models, weights)
        check_positive(self, weights)

    def prepare(self, context: Context) -> dict[str, Matrix]:
        """The inner products of every tensor's models."""
        return inner_products(context, deltas=False)

    def merge(self, block: Block, state: Mapping[str, Matrix]) -> torch.Tensor:
        """The combination of one block."""
        merged = combine(block, self._coefficients(state[block.key.name], block.weights))
        return merged if self.scale == 1 else merged.sub_(block.base).mul_(self.scale).add_(block.base)

    def _coefficients(self, products: Matrix, weights: Sequence[float]) -> list[float]:
        norms = np.sqrt(np.diag(products))
        known = np.flatnonzero(norms > 0)
        shares = np.array(weights) / math.fsum(weights)
        cosines = products[np.ix_(known, known)] / np.outer(norms[known], norms[known])
        direction = karcher_mean(cosines, shares[known] / max(shares[known].sum(), _VANISHING), self.max_iter, self.tol)
        if direction is None:
            return [float(share) for share in shares]
        factors = np.zeros(len(weights))
        factors[known] = direction / norms[known] * float(shares @ norms)
        return [float(factor) for factor in factors]


def karcher_mean(cosines: Matrix, weights: Matrix, max_iter: int, tol: float) -> Matrix | None:
    """The coefficients of the mean on unit vectors with these inner products; None where their mean vanishes."""
    length = _length(weights, cosines)
    if length < _VANISHING:
        return None
    mean = weights / length
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(along)
        sines = np.sin(angles)
        stretch = (
            np.where(sines > _VANISHING, angles / np.maximum(sines, _VANISHING), np.where(along > 0, 1.0, 0.0))
            * weights
        )
        step = stretch - mean * (stretch @ along)
        length = _length(step, cosines)
        if length <= tol:
            break
        mean = math.cos(length) * mean + math.sin(length) / length * step
        mean /= _length(mean, cosines)
    return mean


def _length(vector: Matrix, cosines: Matrix) -> float:
    return math.sqrt(max(0.0, float(vector @ cosines @ vector)))
