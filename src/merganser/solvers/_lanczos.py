"""Eigenvalue estimates that conjugate gradients give for free."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

__all__ = ["extreme_eigenvalues"]

_STEPS = 256


def extreme_eigenvalues(alphas: Sequence[float], betas: Sequence[float]) -> tuple[float, float] | None:
    """The extreme eigenvalues of the Lanczos matrix of a conjugate gradient iteration (Ritz values).

    With the step lengths ``alpha_j`` and the ratios ``beta_j = <r_j+1, z_j+1> / <r_j, z_j>`` it is tridiagonal, with
    ``1/alpha_j + beta_j-1/alpha_j-1`` on the diagonal and ``sqrt(beta_j)/alpha_j`` beside it. Ritz values lie inside
    the spectrum. At most 256 steps are used. O(steps^3).

    Source: Golub and Van Loan, Matrix Computations, section 10.2.
    """
    steps = min(len(alphas), _STEPS)
    if not steps or not all(math.isfinite(value) and value > 0 for value in alphas[:steps]):
        return None
    matrix = np.zeros((steps, steps))
    for j in range(steps):
        matrix[j, j] = 1 / alphas[j] + (betas[j - 1] / alphas[j - 1] if j else 0.0)
        if j + 1 < steps:
            matrix[j, j + 1] = matrix[j + 1, j] = math.sqrt(betas[j]) / alphas[j]
    values = np.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])
