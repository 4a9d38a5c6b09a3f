"""Nested Pareto fronts: two groups of models at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from merganser.pareto import Front, Surrogate, fit, grid_points, non_dominated, sample_points
from merganser.pareto._surrogate import Array

__all__ = ["nested_front"]

_SAMPLES = 20
_ISOTROPIC = 0.2


@dataclass(frozen=True)
class _Group:
    """Models that were merged already: their coefficients, tasks, the sum of the preferences, and the group's score."""

    coefficients: Array
    tasks: tuple[int, ...]
    preference: float
    score: float


def nested_front(
    measure: Callable[[Array], Array],
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    preferences: tuple[float, ...],
    *,
    samples: int,
    activation: str,
    rng: np.random.Generator,
) -> Front:
    """Merge the two groups of models whose scores are nearest, until two are left, whose front is returned.

    Model i belongs to task i. A group's score is the mean of its tasks' scores, weighted by preference. Two groups are
    merged at the point of their own front, over the two factors of their coefficients, that the sums of their
    preferences pick (equal ones, where neither has any).

    Args:
        measure: the scores (n, tasks) at coefficients (n, models).
        models: their names; two or more.
        tasks: their names, as many.
        preferences: a weight per task.
        samples: points that are measured per stage; 20 if 0.
        activation: of the surrogates.
        rng: source of randomness.

    Complexity: (models - 1)(samples + 1) evaluations, and one per model.

    Source: Li et al., MAP, 2024, arXiv:2406.07529, nested merging.
    """
    count = len(models)
    alone = measure(np.eye(count))
    groups = [_Group(np.eye(count)[k], (k,), preferences[k], float(alone[k, k])) for k in range(count)]
    stages: list[dict[str, Any]] = []
    while True:
        groups.sort(key=lambda group: group.score)
        gaps = [b.score - a.score for a, b in itertools.pairwise(groups)]
        first = int(np.argmin(gaps))
        pair = sorted(groups[first : first + 2], key=lambda group: group.tasks)
        front = _pair_front(measure, pair, models, tasks, preferences, samples, activation, rng, tuple(stages))
        if len(groups) == 2:
            return front
        chosen = front.coefficients[front.pick()]
        merged = tuple(sorted(pair[0].tasks + pair[1].tasks))
        score = float(_group_scores(measure(chosen[None]), [merged], preferences)[0, 0])
        stages.append(
            {
                "groups": list(front.tasks),
                "coefficients": chosen.tolist(),
                "predicted": front.scores[front.pick()].tolist(),
                "score": score,
            }
        )
        groups[first : first + 2] = [_Group(chosen, merged, pair[0].preference + pair[1].preference, score)]


def _pair_front(
    measure: Callable[[Array], Array],
    pair: list[_Group],
    models: tuple[str, ...],
    tasks: tuple[str, ...],
    preferences: tuple[float, ...],
    samples: int,
    activation: str,
    rng: np.random.Generator,
    stages: tuple[dict[str, Any], ...],
) -> Front:
    basis = np.stack([group.coefficients for group in pair])
    sampled = sample_points(2, samples or _SAMPLES, rng, isotropic=_ISOTROPIC, onehot=0.0)
    measured = _group_scores(measure(sampled @ basis), [group.tasks for group in pair], preferences)
    surrogate: Surrogate = fit(sampled, measured, activation)
    grid = grid_points(2)
    scores = surrogate.predict(grid)
    kept = non_dominated(scores)
    return Front(
        models,
        tuple("+".join(tasks[index] for index in group.tasks) for group in pair),
        tuple(group.preference for group in pair) if any(group.preference for group in pair) else (1.0, 1.0),
        grid[kept],
        scores[kept],
        sampled,
        measured,
        surrogate,
        basis,
        stages,
    )


def _group_scores(scores: Array, groups: list[tuple[int, ...]], preferences: tuple[float, ...]) -> Array:
    """The mean score (n, groups) of each group's tasks by preference; the plain mean where none is preferred."""
    columns = []
    for group in groups:
        weights = np.array([preferences[index] for index in group])
        columns.append(np.average(scores[:, group], axis=1, weights=weights if weights.any() else None))
    return np.stack(columns, axis=1)
