"""NSGA-III: an evolutionary search for a Pareto front of many objectives."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from merganser.pareto._front import non_dominated
from merganser.pareto._surrogate import Array

__all__ = ["nsga3", "reference_points"]

_ETA = 20.0
_CROSSOVER = 0.7
_POLISH = 500


def reference_points(objectives: int, most: int) -> Array:
    """Points of the unit simplex at equal distances (Das and Dennis, 1998): as many divisions as `most` allows."""
    parts = 1
    while objectives > 1 and math.comb(objectives + parts, parts + 1) <= most:
        parts += 1
    bars = itertools.combinations(range(parts + objectives - 1), objectives - 1)
    rows = [np.diff([-1, *bar, parts + objectives - 1]) - 1 for bar in bars]
    result: Array = np.array(rows, dtype=np.float64) / parts
    return result


def nsga3(
    score: Callable[[Array], Array],
    size: int,
    rng: np.random.Generator,
    *,
    population: int = 100,
    generations: int = 150,
    weights: Array | None = None,
) -> Array:
    """Non-dominated points (n, size) of the unit cube, n up to twice the population (and a few by `weights`).

    Every generation makes as many points as there are: seven of ten by simulated binary crossover, the others by
    polynomial mutation of each coordinate with probability 1 / size (both of index 20); the best of all survive, by
    non-dominated sorting and, in the last front that is taken, by niches around reference directions. Beside the
    population, the best point by each reference direction as weights of the objectives is kept, and is a parent too:
    few directions through the ideal point meet a front of many objectives near its ends, which the best for one task
    are. At last every point moves by normal steps from 0.1 to 0.001 wherever that is better in all objectives (or
    by its weights).

    Args:
        score: the objectives (n, tasks) at points (n, size); more is better.
        size: the number of coordinates.
        rng: source of randomness.
        population: points per generation.
        generations: their number.
        weights: further rows (m, tasks) of weights whose best points are sought.

    Complexity: O(generations (population^2 tasks)).

    Source: Deb, Jain, An evolutionary many-objective optimization algorithm using reference-point-based nondominated
    sorting, 2014.
    """
    points = np.concatenate([np.eye(size), rng.random((max(0, population - size), size))])
    values = -score(points)
    directions = reference_points(values.shape[1], population)
    favoured = directions if weights is None else np.concatenate([directions, weights])
    ideal = values.min(axis=0)
    best = points[(values @ favoured.T).argmin(axis=0)]
    for _ in range(generations):
        children = _offspring(np.concatenate([points, best]), population, rng)
        points = np.concatenate([points, children])
        values = np.concatenate([values, -score(children)])
        best = _better(score, best, points[(values @ favoured.T).argmin(axis=0)], favoured)
        ideal = np.minimum(ideal, values.min(axis=0))
        kept = _survivors(values, ideal, directions, population, rng)
        points, values = points[kept], values[kept]
    for width in np.geomspace(0.1, 0.001, _POLISH):
        moved = np.clip(points + rng.normal(0, width, points.shape), 0, 1)
        found = -score(moved)
        dominates = np.all(found <= values, axis=1) & np.any(found < values, axis=1)
        points[dominates], values[dominates] = moved[dominates], found[dominates]
        best = _better(score, best, np.clip(best + rng.normal(0, width, best.shape), 0, 1), favoured)
    points = np.concatenate([points, best])
    return points[non_dominated(score(points))]


def _better(score: Callable[[Array], Array], first: Array, second: Array, weights: Array) -> Array:
    """Of two points for each row of weights, the one with the greater weighted score."""
    gain = ((score(second) - score(first)) * weights).sum(axis=1)
    return np.where(gain[:, None] > 0, second, first)


def _offspring(points: Array, count: int, rng: np.random.Generator) -> Array:
    first, second = points[rng.integers(0, len(points), (2, count))]
    u = rng.random(first.shape)
    beta = np.where(u <= 0.5, (2 * u) ** (1 / (_ETA + 1)), (1 / (2 - 2 * u)) ** (1 / (_ETA + 1)))
    beta = np.where(rng.random(first.shape) < 0.5, beta, 1.0)  # a coordinate in two is exchanged
    crossed = 0.5 * ((1 + beta) * first + (1 - beta) * second)
    u = rng.random(first.shape)
    down = (2 * u + (1 - 2 * u) * (1 - first) ** (_ETA + 1)) ** (1 / (_ETA + 1)) - 1
    up = 1 - (2 * (1 - u) + (2 * u - 1) * first ** (_ETA + 1)) ** (1 / (_ETA + 1))
    shift = np.where(u < 0.5, down, up)
    mutated = first + np.where(rng.random(first.shape) < 1 / first.shape[1], shift, 0.0)
    children: Array = np.clip(np.where(rng.random((count, 1)) < _CROSSOVER, crossed, mutated), 0, 1)
    return children


def _survivors(
    values: Array, ideal: Array, directions: Array, count: int, rng: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Indices of the points to keep: whole fronts, and the last one by niches."""
    fronts = _fronts(values, count)
    kept = np.concatenate(fronts[:-1]) if len(fronts) > 1 else np.zeros(0, dtype=np.int64)
    last = fronts[-1]
    missing = count - len(kept)
    if len(last) <= missing:
        return np.concatenate([kept, last])
    chosen = np.concatenate([kept, last])
    scaled = (values[chosen] - ideal) / _widths(values[chosen] - ideal, values[fronts[0]] - ideal)
    niche, distance = _associate(scaled, directions)
    counts = np.bincount(niche[: len(kept)], minlength=len(directions))
    free = list(range(len(kept), len(chosen)))
    taken: list[int] = []
    while len(taken) < missing:
        open_niches = np.unique(niche[free])
        fewest = counts[open_niches].min()
        target = int(rng.choice(open_niches[counts[open_niches] == fewest]))
        candidates = [index for index in free if niche[index] == target]
        nearest = min(candidates, key=lambda index: distance[index])
        pick = nearest if fewest == 0 else int(rng.choice(candidates))
        taken.append(pick)
        free.remove(pick)
        counts[target] += 1
    return np.concatenate([kept, chosen[taken]])


def _fronts(values: Array, count: int) -> list[npt.NDArray[np.int64]]:
    """The fronts of least values, until they hold `count` points."""
    rows, columns = values[:, None], values[None]
    below: npt.NDArray[np.bool_] = np.all(rows <= columns, axis=2) & np.any(rows < columns, axis=2)
    dominators = below.sum(axis=0)
    left = np.ones(len(values), dtype=bool)
    fronts: list[npt.NDArray[np.int64]] = []
    while sum(map(len, fronts)) < count and left.any():
        front = np.flatnonzero(left & (dominators == 0))
        fronts.append(front)
        left[front] = False
        dominators = dominators - below[front].sum(axis=0)
    return fronts


def _widths(values: Array, first: Array) -> Array:
    """The intercepts of the plane through the extreme points; the largest values of the first front otherwise."""
    size = values.shape[1]
    weights = np.where(np.eye(size, dtype=bool), 1.0, 1e6)
    extreme = values[[int((values * row).max(axis=1).argmin()) for row in weights]]
    fallback: Array = np.maximum(first.max(axis=0), 1e-12)
    try:
        with np.errstate(divide="ignore"):
            widths: Array = 1 / np.linalg.solve(extreme, np.ones(size))
    except np.linalg.LinAlgError:
        return fallback
    sound = np.isfinite(widths).all() and (widths > 1e-12).all()
    return widths if sound else fallback


def _associate(values: Array, directions: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """The nearest direction of each point, and the distance from its line."""
    units = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    along = values @ units.T
    squares = np.maximum((values**2).sum(axis=1)[:, None] - along**2, 0)
    nearest = squares.argmin(axis=1)
    return nearest, squares[np.arange(len(values)), nearest]
