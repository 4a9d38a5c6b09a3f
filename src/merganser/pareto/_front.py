"""Pareto fronts: which points are not dominated, and what is known of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser.errors import Place, RecipeError
from merganser.pareto._surrogate import Array, Surrogate

__all__ = ["Front", "check_preferences", "grid_points", "non_dominated", "spread"]

_GRID = 70_000
_PER_AXIS = 201
_SHOWN = 200


def non_dominated(scores: Array) -> npt.NDArray[np.int64]:
    """Indices of the rows of scores (n, tasks), more being better, that no other row exceeds or equals everywhere.

    Of equal rows the first counts. In the order of the rows.

    Complexity: O(n log n) for up to two tasks, else O(n f) with f rows in the front.
    """
    scores, first = np.unique(scores, axis=0, return_index=True)
    if scores.shape[1] <= 2:
        order = np.lexsort(tuple(scores.T[::-1]))[::-1]  # by falling first, then second score
        last = scores[order, -1]
        best = np.concatenate([[-np.inf], np.maximum.accumulate(last)[:-1]])
        kept = order[last > best]
        kept = kept[:1] if scores.shape[1] == 1 else kept
        return np.sort(first[kept])
    left = np.argsort(-scores.sum(axis=1), kind="stable")
    front = []
    while len(left):
        top = scores[left[0]]
        front.append(left[0])
        left = left[(scores[left] > top).any(axis=1)]
    return np.sort(first[front])


def grid_points(size: int) -> Array:
    """A grid of the unit cube (n, size): 201 points per axis, or fewer so that there are at most 70,000."""
    per_axis = max(2, min(_PER_AXIS, int(_GRID ** (1 / size) + 1e-9)))
    axes = np.meshgrid(*[np.linspace(0, 1, per_axis)] * size, indexing="ij")
    return np.stack(axes, axis=-1).reshape(-1, size)


def spread(scores: Array, most: int) -> npt.NDArray[np.int64]:
    """Indices of up to `most` rows that are far from each other: the best of each task, then always the farthest."""
    if len(scores) <= most:
        return np.arange(len(scores))
    span = np.ptp(scores, axis=0)
    scaled = (scores - scores.min(axis=0)) / np.where(span > 0, span, 1)
    chosen = list(dict.fromkeys(scores.argmax(axis=0).tolist()))
    distance = np.min([((scaled - scaled[index]) ** 2).sum(axis=1) for index in chosen], axis=0)
    while len(chosen) < most:
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, ((scaled - scaled[chosen[-1]]) ** 2).sum(axis=1))
    return np.sort(chosen)


def check_preferences(given: Sequence[float], tasks: Sequence[str]) -> tuple[float, ...]:
    """A weight per task; 1 each if none is given.

    Raises:
        RecipeError: E0306, there are not as many as tasks, one is negative, or all are zero.
    """
    weights = tuple(float(weight) for weight in given) or (1.0,) * len(tasks)
    if len(weights) != len(tasks) or min(weights) < 0 or max(weights) == 0:
        raise RecipeError(
            "E0306",
            f"the preferences {list(weights)} do not fit the {len(tasks)} tasks ({', '.join(tasks)})",
            places=Place(key="preferences"),
            fix="give one number per task, none of them negative",
        )
    return weights


@dataclass(frozen=True, eq=False)
class Front:
    """The trade-offs between tasks that merges of some models offer, as a surrogate predicts them.

    Attributes:
        models: names of the models.
        tasks: names of the tasks; of a nested search, of its last two groups of tasks.
        preferences: the user's weight of each.
        points: merges (n, k) that no other merge beats on all tasks, by the surrogate, in its coordinates.
        scores: the scores (n, tasks) that it predicts for them.
        sampled: the merges (m, k) that were measured.
        measured: their scores (m, tasks).
        surrogate: what was fitted to these.
        basis: the coefficients (k, models) of each coordinate; those of one model, except in a nested search.
        stages: of a nested search: what was merged in which order.
    """

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    preferences: tuple[float, ...]
    points: Array
    scores: Array
    sampled: Array
    measured: Array
    surrogate: Surrogate
    basis: Array
    stages: tuple[dict[str, Any], ...] = ()

    @property
    def coefficients(self) -> Array:
        """The coefficients (n, models) of the front's merges: what multiplies the task vectors."""
        return self.points @ self.basis

    def __len__(self) -> int:
        """The number of points."""
        return len(self.points)

    def pick(self, preferences: Sequence[float] | None = None) -> int:
        """The index of the point with the greatest weighted sum of predicted scores, ``argmax (w / |w|) . scores``.

        Args:
            preferences: a weight per task; those of the search if None.

        Raises:
            RecipeError: E0306, there are not as many as tasks, or none is positive.
        """
        given = self.preferences if preferences is None else preferences
        weights = np.array(check_preferences(given, self.tasks))
        return int((self.scores @ (weights / np.linalg.norm(weights))).argmax())

    def quality(self) -> dict[str, float]:
        """The share of the variance of each task's measured scores that the surrogate explains (R^2)."""
        error = ((self.measured - self.surrogate.predict(self.sampled)) ** 2).sum(axis=0)
        spread = ((self.measured - self.measured.mean(axis=0)) ** 2).sum(axis=0)
        share = np.where(spread > 0, 1 - error / np.where(spread > 0, spread, 1), 1.0)
        return dict(zip(self.tasks, share.tolist(), strict=True))

    def record(self) -> dict[str, Any]:
        """Everything as plain data; of a front with more than 200 points, 200 that lie far from each other."""
        shown = spread(self.scores, _SHOWN)
        return {
            "models": list(self.models),
            "tasks": list(self.tasks),
            "preferences": list(self.preferences),
            "sampled": (self.sampled @ self.basis).tolist(),
            "measured": self.measured.tolist(),
            "activation": self.surrogate.activation,
            "parameters": self.surrogate.parameters.tolist(),
            "r2": self.quality(),
            "front": {
                "size": len(self),
                "coefficients": self.coefficients[shown].tolist(),
                "scores": self.scores[shown].tolist(),
            },
            "stages": list(self.stages),
        }

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the front into a file; its ending says the format (png, svg, pdf).

        Raises:
            EnvironmentFault: E0704, matplotlib is not installed.
        """
        from merganser.pareto._plot import draw

        return draw(self, Path(path))
