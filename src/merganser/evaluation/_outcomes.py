"""What a task's evaluation found: a value for every item, and the figures that they give."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from merganser.errors import MerganserError, NumericError, Place
from merganser.evaluation._intervals import Z, bootstrap, mean_interval, wilson

__all__ = ["Evaluation", "Outcomes", "TaskResult", "mean_over", "relative"]


@dataclass(frozen=True)
class Outcomes:
    """The items of a task.

    Attributes:
        metric: what the values are; more is better.
        values: one per item, in the order of the data.
        weights: how much each counts; all the same if None.
        others: further metrics.
        proportion: whether every value is 0 or 1.
    """

    metric: str
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    others: Mapping[str, float] = field(default_factory=dict)
    proportion: bool = True

    def __post_init__(self) -> None:
        bad = [name for name, value in self.metrics.items() if not math.isfinite(value)]
        if bad:
            raise NumericError("E0606", f"`{bad[0]}` is {self.metrics[bad[0]]}", places=Place(key=bad[0]))

    @cached_property
    def value(self) -> float:
        """The mean over the items."""
        if self.weights is None:
            return math.fsum(self.values) / len(self.values)
        total = math.fsum(self.weights)
        return math.fsum(v * w for v, w in zip(self.values, self.weights, strict=True)) / total

    @property
    def metrics(self) -> dict[str, float]:
        """Every metric, the one that counts first."""
        return {self.metric: self.value, **self.others}

    @cached_property
    def interval(self) -> tuple[float, float]:
        """Where the value lies with 95 % confidence."""
        if self.proportion:
            return wilson(math.fsum(self.values), len(self.values))
        return bootstrap(self.values, self.weights)

    @property
    def variance(self) -> float:
        """The variance of `value`, items being independent.

        Where all items are right, or none is, they show none: then it is that of Wilson's interval.
        """
        if self.proportion and len(set(self.values)) == 1:
            low, high = self.interval
            return ((high - low) / (2 * Z)) ** 2
        n, mean = len(self.values), self.value
        weights = self.weights or (1.0,) * n
        total = math.fsum(weights)
        squares = math.fsum((w * (v - mean)) ** 2 for v, w in zip(self.values, weights, strict=True))
        return squares / total**2 * n / max(1, n - 1)

    def normalised(self, expert: float) -> float | None:
        """The value relative to the expert's: a ratio, of perplexities where the value is a log-likelihood."""
        return relative(self.metric, self.value, expert)

    def summary(self) -> dict[str, Any]:
        """The first metric, its value, the number of items, and the interval."""
        return {"metric": self.metric, "value": self.value, "n": len(self.values), "interval": list(self.interval)}


def relative(metric: str, value: float, expert: float) -> float | None:
    """A value relative to the expert's: a ratio, of perplexities for log-likelihoods; None for an expert of 0."""
    if metric == "log_likelihood":
        return math.exp(min(700.0, value - expert))
    return value / expert if expert > 0 else None


@dataclass(frozen=True)
class TaskResult:
    """A task's figures.

    Attributes:
        kind: of the task.
        outcomes: the items.
        expert: the expert's value, if it is known.
        labels: labelled examples that were used.
        data: the data file, its digest and the number of items.
        digests: one per item.
        seconds: that it took.
        warnings: what the user should know.
    """

    kind: str
    outcomes: Outcomes
    expert: float | None
    labels: int
    data: Mapping[str, Any]
    digests: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...] = ()

    @property
    def normalised(self) -> float | None:
        """The value relative to the expert's."""
        return None if self.expert is None else self.outcomes.normalised(self.expert)

    def as_dict(self) -> dict[str, Any]:
        """As in the JSON output."""
        return {
            "kind": self.kind,
            **self.outcomes.summary(),
            "interval_kind": "wilson" if self.outcomes.proportion else "bootstrap",
            "metrics": self.outcomes.metrics,
            "expert": self.expert,
            "normalised": self.normalised,
            "labels": self.labels,
            "data": dict(self.data),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, eq=False)
class Evaluation(Mapping[str, Mapping[str, Any]]):
    """What was measured of a model: ``evaluation["sst2"]["accuracy"]``.

    A task's mapping begins with the metric that counts, of which more is better; then come other metrics, ``n`` and
    ``interval``. So it is also what `merge` expects of an evaluator.

    Attributes:
        model: what it is called.
        results: by task.
        errors: of the tasks that could not be measured.
        seconds: that all took.
    """

    model: str
    results: Mapping[str, TaskResult]
    errors: Mapping[str, MerganserError]
    seconds: float

    def __getitem__(self, task: str) -> Mapping[str, Any]:
        outcomes = self.results[task].outcomes
        return {**outcomes.metrics, "n": len(outcomes.values), "interval": outcomes.interval}

    def __iter__(self) -> Any:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)

    @property
    def labels(self) -> int:
        """Labelled examples that were used."""
        return sum(result.labels for result in self.results.values())

    def mean(self) -> dict[str, Any] | None:
        """The mean over the tasks, absolute and normalised; None without a task."""
        return mean_over(self.results)

    def as_dict(self) -> dict[str, Any]:
        """The document that ``merganser eval --json`` prints."""
        from merganser._version import __version__

        mean = self.mean()
        return {
            "format": "merganser-eval",
            "version": 1,
            "merganser": __version__,
            "model": self.model,
            "tasks": {name: result.as_dict() for name, result in self.results.items()},
            "mean": None if mean is None else {**mean, "tasks": len(self.results)},
            "errors": {name: error.as_dict() for name, error in self.errors.items()},
            "seconds": self.seconds,
        }


def mean_over(results: Mapping[str, TaskResult]) -> dict[str, Any] | None:
    """The mean value over tasks with its interval, and the mean of the normalised values where all are known."""
    if not results:
        return None
    outcomes = [result.outcomes for result in results.values()]
    ratios: Sequence[float | None] = [result.normalised for result in results.values()]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "value": math.fsum(o.value for o in outcomes) / len(outcomes),
        "interval": list(mean_interval([o.value for o in outcomes], [o.variance for o in outcomes])),
        "normalised": math.fsum(known) / len(known) if len(known) == len(ratios) else None,
    }
