"""Where to measure: points in the unit cube of coefficients, and points where a surrogate is wrong."""

from __future__ import annotations

import numpy as np

from merganser.pareto._surrogate import Array

__all__ = ["from_spherical", "sample_points", "to_spherical", "uncertain_points"]

_NOISE = 0.1
_TEMPERATURE = 0.07
_RESAMPLES = 30


def sample_points(size: int, count: int, rng: np.random.Generator, *, isotropic: float, onehot: float) -> Array:
    """Points (count, size) in the unit cube to fit a surrogate on.

    The one-hot points (the models themselves); then a share on and near the diagonal, half with normal noise of 0.1,
    reflected at the borders; a share of one-hot points with such noise; and points of the grid of tenths that are
    neither one-hot, nor on the diagonal, nor sum to 1, without repetition while there are some. One model has
    equidistant points.

    Args:
        size: the number of models.
        count: the number of points; at least `size`.
        rng: source of randomness.
        isotropic: share of points on and near the diagonal.
        onehot: share of points near the one-hot ones.

    Source: Li et al., MAP, 2024, arXiv:2406.07529 and the authors' code, which clips, and makes fewer points by
    halving integers.
    """
    if size == 1:
        return np.linspace(1, 0, count)[:, None]
    known = np.eye(size)
    free = count - size
    diagonal = round(isotropic * free)
    near = np.repeat(rng.random((diagonal, 1)), size, axis=1)
    near[diagonal // 2 :] += rng.normal(0, _NOISE, (diagonal - diagonal // 2, size))
    hot = round(onehot * free)
    around = np.eye(size)[np.arange(hot) % size] + rng.normal(0, _NOISE, (hot, size))
    rest = _grid_points(size, free - diagonal - hot, rng)
    points = np.concatenate([known, near, around, rest])
    result: Array = np.clip(1 - np.abs(1 - np.abs(points)), 0, 1)
    return result


def _grid_points(size: int, count: int, rng: np.random.Generator) -> Array:
    found: dict[tuple[int, ...], None] = {}
    for _ in range(50 * count):
        tenths = tuple(int(t) for t in rng.integers(0, 11, size))
        if sum(tenths) != 10 and len(set(tenths)) > 1 and len(found) < count:
            found[tenths] = None
    grid = np.array(list(found), dtype=np.float64).reshape(len(found), size) / 10
    return np.concatenate([grid, rng.random((count - len(grid), size))])


def to_spherical(points: Array) -> tuple[Array, Array]:
    """Radii (n) and angles (n, N - 1) of points (n, N): ``tan(phi_k) = |(c_{k+1}, ..., c_N)| / c_k``."""
    radii = np.linalg.norm(points, axis=1)
    tails = np.sqrt(np.cumsum(points[:, :0:-1] ** 2, axis=1))[:, ::-1]
    if points.shape[1] > 1:
        tails[:, -1] = points[:, -1]  # the last angle keeps the sign
    return radii, np.arctan2(tails, points[:, :-1])


def from_spherical(radii: Array, angles: Array) -> Array:
    """The points (n, N) of radii (n) and angles (n, N - 1)."""
    ones = np.ones((len(radii), 1))
    sines = np.concatenate([ones, np.cumprod(np.sin(angles), axis=1)], axis=1)
    result: Array = radii[:, None] * sines * np.concatenate([np.cos(angles), ones], axis=1)
    return result


def uncertain_points(points: Array, errors: Array, count: int, rng: np.random.Generator) -> Array:
    """New points (count, N) in the directions where a surrogate is wrong.

    The angles of the measured points are divided into bins (4 per angle, 2 from four models on). A bin's figure is the
    mean squared error in it plus half the standard deviation of that mean over 30 subsamples of four fifths of its
    points. Bins that hold points are drawn by the softmax of the figures at temperature 0.07, directions uniformly
    in the bin, radii from U(0.2, 0.8).

    Args:
        points: the measured points (n, N), in the positive orthant; N > 1.
        errors: the surrogate's error at each (n).
        count: how many.
        rng: source of randomness.

    Source: Li et al., MAP, 2024, arXiv:2406.07529, the Bayesian variant.
    """
    _, angles = to_spherical(points)
    per_angle = 4 if points.shape[1] < 4 else 2
    width = np.pi / 2 / per_angle
    cells = np.clip((angles / width).astype(np.int64), 0, per_angle - 1)
    bins, member = np.unique(cells, axis=0, return_inverse=True)
    figures = np.array([_figure(errors[member.reshape(-1) == b] ** 2, rng) for b in range(len(bins))])
    chosen = rng.choice(len(bins), size=count, p=_softmax(figures))
    directions = (bins[chosen] + rng.random((count, angles.shape[1]))) * width
    return from_spherical(rng.uniform(0.2, 0.8, count), directions)


def _figure(squares: Array, rng: np.random.Generator) -> float:
    kept = max(1, round(0.8 * len(squares)))
    means = [squares[rng.permutation(len(squares))[:kept]].mean() for _ in range(_RESAMPLES)]
    return float(squares.mean() + 0.5 * np.std(means))


def _softmax(values: Array) -> Array:
    powers = np.exp((values - values.max()) / _TEMPERATURE)
    result: Array = powers / powers.sum()
    return result
