"""The choice among merges of one method with several options, made on the tasks' validation splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from examples.demo import evaluation
from examples.demo.evaluation import Model, Outcomes
from examples.demo.merges import Cost


@dataclass(frozen=True, slots=True)
class Candidate:
    """A merged encoder, and the options that tell it from the others."""

    options: Mapping[str, Any]
    model: Model


@dataclass(frozen=True, slots=True)
class Choice:
    """What was tried for a tuned row.

    Attributes:
        tried: The options of each candidate.
        means: The mean accuracy of each on the validation splits.
        labels: The labels that this took, per task.
        untuned: Which of them has the options that were fixed beforehand.
    """

    tried: Sequence[Mapping[str, Any]]
    means: Sequence[float]
    labels: int
    untuned: int

    @property
    def best(self) -> int:
        """Which candidate has the highest mean; of equals the untuned one, if it is one of them, or the first."""
        return max(range(len(self.means)), key=lambda index: (self.means[index], index == self.untuned))

    def named(self, index: int) -> str:
        """The options of a candidate, in words."""
        return ", ".join(f"{name} {value}" for name, value in self.tried[index].items())


def kept(options: Mapping[str, Any], model: Model) -> list[Candidate]:
    """The encoders that one solve left in a model's folder: one for each of the iterations that it kept."""
    shared = {name: value for name, value in options.items() if name != "keep"}
    return [
        Candidate(shared | {"iterations": step}, Model(model.folder / str(step), model.tasks, model.experts))
        for step in options["keep"]
    ]


def choose(tried: Sequence[Candidate], outcomes: Sequence[Outcomes], untuned: int) -> Choice:
    """Compares candidates by what they made of the validation splits."""
    means = [evaluation.mean(of_one)[0] for of_one in outcomes]
    labels = max(len(right) for right in outcomes[untuned].values())
    return Choice([candidate.options for candidate in tried], means, labels, untuned)


def total(costs: Sequence[Cost]) -> Cost:
    """The cost of merges made one after the other: all their seconds, and the highest peak."""
    return Cost(sum(cost.seconds for cost in costs), max(cost.peak_mb for cost in costs))
