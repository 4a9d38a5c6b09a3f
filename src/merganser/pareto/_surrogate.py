"""Quadratic surrogates: what a score would be at coefficients that were not tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from merganser.errors import UsageError

__all__ = ["ACTIVATIONS", "Array", "Surrogate", "features", "fit"]

Array: TypeAlias = "npt.NDArray[np.float64]"

ACTIVATIONS = ("identity", "sigmoid", "softplus")
_EDGE = 1e-6
_ITERATIONS = 500


def features(points: Array) -> Array:
    """``[c_i^2], [c_i c_j, i < j], [c_i], [1]`` of points (n, N): an array (n, (N + 1)(N + 2) / 2)."""
    first, second = np.triu_indices(points.shape[1], 1)
    pairs = points[:, first] * points[:, second]
    return np.concatenate([points**2, pairs, points, np.ones((len(points), 1))], axis=1)


@dataclass(frozen=True)
class Surrogate:
    """``M_t(c) = sign act(c' A_t c / 2 + b_t' c + e_t)`` for every task t.

    Attributes:
        parameters: of the features, (tasks, (N + 1)(N + 2) / 2).
        activation: ``identity``, ``sigmoid`` for shares such as accuracies, ``softplus`` for losses.
        sign: 1, or -1 per task where scores are minus losses.
    """

    parameters: Array
    activation: str
    sign: Array

    def predict(self, points: Array) -> Array:
        """The scores (n, tasks) at points (n, N)."""
        inner = features(np.asarray(points, dtype=np.float64)) @ self.parameters.T
        return self.sign * _apply(self.activation, inner)[0]

    def quadratic(self, task: int) -> tuple[Array, Array, float]:
        """``A`` (N, N, symmetric), ``b`` (N) and ``e`` of a task."""
        row = self.parameters[task]
        size = int(np.sqrt(2 * len(row))) - 1
        pairs = size * (size - 1) // 2
        A: Array = np.diag(2 * row[:size]).astype(np.float64)
        first, second = np.triu_indices(size, 1)
        A[first, second] = A[second, first] = row[size : size + pairs]
        return A, row[size + pairs : -1], float(row[-1])


def fit(points: Array, scores: Array, activation: str) -> Surrogate:
    """The surrogate with the least squared error on measured points, for each task on its own.

    For the identity in closed form; else by Levenberg-Marquardt, started from the least-squares fit of the scores that
    the activation's inverse was applied to.

    Args:
        points: (n, N).
        scores: (n, tasks).
        activation: one of `ACTIVATIONS`.

    Raises:
        UsageError: E0201, the scores are out of the activation's range.

    Complexity: O(n P^2) per iteration and task, P = (N + 1)(N + 2) / 2.

    Source: Li et al., MAP, 2024, arXiv:2406.07529; More, The Levenberg-Marquardt algorithm, 1978.
    """
    sign = np.ones(scores.shape[1])
    if activation == "softplus":
        sign = np.where((scores <= 0).all(axis=0), -1.0, 1.0)
    targets = scores * sign
    if (activation == "sigmoid" and ((targets < 0) | (targets > 1)).any()) or (
        activation == "softplus" and (targets < 0).any()
    ):
        wanted = "between 0 and 1" if activation == "sigmoid" else "positive losses, or minus such"
        raise UsageError(
            "E0201",
            f"the scores go from {scores.min():g} to {scores.max():g}; with activation={activation} they are {wanted}",
            fix="use activation=identity",
        )
    phi = features(points)
    rows = [_fit_one(phi, targets[:, task], activation) for task in range(targets.shape[1])]
    return Surrogate(np.stack(rows), activation, sign)


def _apply(activation: str, z: Array) -> tuple[Array, Array]:
    """The activation and its derivative."""
    if activation == "identity":
        return z, np.ones_like(z)
    logistic = 0.5 * (1 + np.tanh(z / 2))
    if activation == "sigmoid":
        return logistic, logistic * (1 - logistic)
    return np.logaddexp(0, z), logistic


def _inverse(activation: str, y: Array) -> Array:
    """The inverse of the activation, a little inside its range."""
    if activation == "identity":
        return y
    if activation == "sigmoid":
        inside = np.clip(y, _EDGE, 1 - _EDGE)
        return np.log(inside) - np.log1p(-inside)
    return np.log(np.expm1(np.clip(y, _EDGE, 30))) + np.maximum(y - 30, 0)


def _fit_one(phi: Array, y: Array, activation: str) -> Array:
    start: Array = np.asarray(np.linalg.lstsq(phi, _inverse(activation, y), rcond=None)[0], dtype=np.float64)
    return start if activation == "identity" else _levenberg_marquardt(phi, y, activation, start)


def _levenberg_marquardt(phi: Array, y: Array, activation: str, p: Array) -> Array:
    """The least squares of ``y - act(phi p)`` near `p`; every step lowers them."""
    damping = 1e-3
    value, slope = _apply(activation, phi @ p)
    residual: Array = y - value
    cost = float(residual @ residual)
    for _ in range(_ITERATIONS):
        jacobian = slope[:, None] * phi
        widths = np.sqrt((jacobian**2).sum(axis=0)) + 1e-12
        stacked = np.concatenate([jacobian, np.diag(np.sqrt(damping) * widths)])
        step: Array = np.linalg.lstsq(stacked, np.concatenate([residual, np.zeros(len(p))]), rcond=None)[0]
        value, slope_there = _apply(activation, phi @ (p + step))
        there = y - value
        if float(there @ there) < cost:
            p, residual, slope, cost = p + step, there, slope_there, float(there @ there)
            damping = max(damping / 10, 1e-15)
        else:
            damping *= 10
        if np.abs(step).max() <= 1e-13 * (1 + np.abs(p).max()) or damping > 1e15:
            break
    return p
