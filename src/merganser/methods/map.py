"""MAP: Pareto fronts of task arithmetic by quadratic surrogates of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merganser import pareto
from merganser.errors import Place, RecipeError, UsageError
from merganser.methods._base import About
from merganser.methods._map_nested import nested_front
from merganser.methods._options import list_option, option
from merganser.methods._search import Choice, Search, Trials
from merganser.methods.task_arithmetic import TaskArithmetic
from merganser.pareto import Front
from merganser.pareto._surrogate import Array

__all__ = ["Map"]

_GRID_LIMIT = 3


@dataclass(frozen=True)
class Map(Search, name="map"):
    """``W = W_0 + scale sum_i c_i w_i (W_i - W_0)`` with the c in [0, 1] that a surrogate of the evaluator prefers.

    `samples` merges are measured: every model alone, points on and near the diagonal (a share `isotropic`), points
    near single models (`onehot`), and points of a grid. For every task of the evaluator, ``M_t(c) = act(c' A_t c / 2 +
    b_t' c + e_t)`` is fitted to them by least squares (``activation``: `identity`, in closed form; `sigmoid` for scores
    between 0 and 1; `softplus` for losses, or minus losses). The Pareto front of the surrogates is found on a grid, for
    up to three models and tasks, or by NSGA-III; of it, the point is merged whose scores have the greatest sum by
    `preferences`. With `rounds`, `round_points` more merges are measured before each fit but the first, in directions
    where the surrogate is wrong. With `nested`, where every model has a task, in the same order, the two
    groups of models with the nearest scores are merged until one is left.

    `merganser.map_front` returns the front itself, and draws it; the lock file of a merge has it under `search`.

    One merge and evaluation per sample, by default (models + 1)(models + 2) and one for the point that is chosen; the
    surrogate needs at least half of them. Coefficients beyond 1 are reached by `scale`.
    """

    samples: int = option(0, "merges to measure; 0 means (models + 1)(models + 2), or 20 per stage if nested", ge=0)
    activation: str = option("identity", "what the surrogate's quadratic form passes", choices=pareto.ACTIVATIONS)
    front: str = option("auto", "how the front is found", choices=("auto", "grid", "nsga3"))
    preferences: tuple[float, ...] = list_option((), "a weight per task; equal if empty", ge=0, whole=False)
    nested: bool = option(False, "merge two groups of models at a time")
    isotropic: float = option(0.2, "share of samples on and near the diagonal", ge=0.0, le=1.0)
    onehot: float = option(0.2, "share of samples near single models", ge=0.0, le=1.0)
    rounds: int = option(0, "further rounds of samples where the surrogate is wrong", ge=0)
    round_points: int = option(10, "samples per round", ge=1)
    population: int = option(100, "of NSGA-III", ge=4)
    generations: int = option(150, "of NSGA-III", ge=1)

    about = About(
        title="Pareto front of task arithmetic, from quadratic surrogates of the scores",
        equation="W = W_0 + lambda sum_i c_i w_i t_i,  c = argmax p . M(c) over the front,  "
        "M_t(c) = act(c' A_t c / 2 + b_t' c + e_t)",
        source="Li et al., MAP: low-compute model merging with amortized Pareto fronts, 2024, arXiv:2406.07529",
        helps="Two to eight tasks with a measure each, and no idea of how much of which is wanted.",
        hurts="An evaluator that takes hours: it is called some ten to a hundred times. Many models and noisy scores: "
        "with 60 measured merges of eight models it ended below the average, with 20 of four well above it.",
        work=4,
        deviations="The authors' code fits from a start of ones and drops tasks whose fit fails, makes fewer points "
        "than asked for, searches coefficients in [-3, 3], outside the samples, and knows NSGA-III only.",
    )
    needs = frozenset({"base", "evaluator"})
    symmetric = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.isotropic + self.onehot > 1:
            raise RecipeError("E0306", "`isotropic` and `onehot` are shares of one whole", places=Place(key="onehot"))

    def search(self, trials: Trials) -> Choice:
        """The front, and the point that the preferences pick."""
        front = self.explore(trials)
        index = front.pick()
        weights = self._weights(trials, front.coefficients[index])
        scores = trials.scores(TaskArithmetic(scale=self.scale), weights)
        chosen = {
            "coefficients": front.coefficients[index].tolist(),
            "predicted": front.scores[index].tolist(),
            "measured": dict(scores),
        }
        return Choice(TaskArithmetic(scale=self.scale), weights, None, {"chosen": chosen, **front.record()})

    def explore(self, trials: Trials) -> Front:
        """The front.

        Raises:
            RecipeError: E0306, too few samples, or preferences that do not fit the tasks.
            UsageError: E0201, other tasks for another merge, scores out of range, or not a task per model if nested.
        """
        size = trials.models
        rng = np.random.Generator(np.random.Philox(trials.seed))
        nested = self.nested and size > 1
        unknowns = 6 if nested else (size + 1) * (size + 2) // 2
        count = self.samples or (0 if nested else 2 * unknowns)
        if 0 < count < unknowns:
            raise RecipeError(
                "E0306",
                f"{count} samples cannot determine the {unknowns} unknowns of each surrogate",
                places=Place(key="samples"),
                fix=f"take {unknowns} or more, best {2 * unknowns}",
            )
        tasks = self._tasks(trials)
        preferences = pareto.check_preferences(self.preferences, tasks)
        if nested:
            if len(tasks) != size:
                raise UsageError("E0201", f"with `nested`, every model has a task: {size} models, {len(tasks)} tasks")
            return nested_front(
                lambda points: self._measure(trials, tasks, points),
                trials.labels,
                tasks,
                preferences,
                samples=count,
                activation=self.activation,
                rng=rng,
            )
        points = pareto.sample_points(size, count, rng, isotropic=self.isotropic, onehot=self.onehot)
        measured = self._measure(trials, tasks, points)
        surrogate = pareto.fit(points, measured, self.activation)
        for _ in range(self.rounds if size > 1 else 0):
            errors = measured - surrogate.predict(points)
            shares = np.bincount(np.arange(self.round_points) % len(tasks), minlength=len(tasks)).tolist()
            parts = [pareto.uncertain_points(points, errors[:, t], n, rng) for t, n in enumerate(shares) if n]
            more = np.concatenate(parts)
            points, measured = (
                np.concatenate([points, more]),
                np.concatenate([measured, self._measure(trials, tasks, more)]),
            )
            surrogate = pareto.fit(points, measured, self.activation)
        found = self._candidates(surrogate, size, preferences, rng)
        return Front(
            trials.labels,
            tasks,
            preferences,
            found,
            surrogate.predict(found),
            points,
            measured,
            surrogate,
            np.eye(size),
        )

    def _candidates(
        self, surrogate: pareto.Surrogate, size: int, preferences: Sequence[float], rng: np.random.Generator
    ) -> Array:
        """The non-dominated points."""
        small = size <= _GRID_LIMIT and len(preferences) <= _GRID_LIMIT
        if self.front == "grid" or (self.front == "auto" and small):
            points = pareto.grid_points(size)
            return points[pareto.non_dominated(surrogate.predict(points))]
        return pareto.nsga3(
            surrogate.predict,
            size,
            rng,
            population=self.population,
            generations=self.generations,
            weights=np.array([preferences]),
        )

    def _tasks(self, trials: Trials) -> tuple[str, ...]:
        """The tasks, as the evaluator orders them for the first model."""
        first = np.eye(trials.models)[0]
        return tuple(trials.scores(TaskArithmetic(scale=self.scale), self._weights(trials, first)))

    def _measure(self, trials: Trials, tasks: Sequence[str], points: Array) -> Array:
        """The evaluator's scores (n, tasks) at coefficients (n, models)."""
        rows = []
        for point in points:
            scores = trials.scores(TaskArithmetic(scale=self.scale), self._weights(trials, point))
            if set(scores) != set(tasks):
                raise UsageError(
                    "E0201", f"the evaluator returned the tasks {list(scores)}, and {list(tasks)} for another merge"
                )
            rows.append([scores[task] for task in tasks])
        return np.array(rows)

    def _weights(self, trials: Trials, point: Array) -> tuple[float, ...]:
        return tuple(c * weight for c, weight in zip(point.tolist(), trials.weights, strict=True))
