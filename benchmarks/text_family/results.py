"""Evaluates merges and keeps what they scored, so that a run that was stopped goes on where it stopped."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from examples.demo.encoder import load_encoder, predictions
from examples.demo.evaluation import Outcomes
from examples.demo.experts import Expert
from examples.demo.store import key, read_json, weights_digest, write_json
from torch import Tensor

from benchmarks.text_family import distillation
from benchmarks.text_family.data import Split, Task, digest
from benchmarks.text_family.family import Say, padded, source_digest
from benchmarks.text_family.rows import Row, merged

Scores = dict[str, list[bool]]


@dataclass(frozen=True, slots=True)
class Result:
    """A row of the table.

    Attributes:
        label: what it is.
        outcomes: for each task, whether each test item was labelled rightly.
        seconds: wall time of the merge, files read included; of a path of iterations, of all of it. None for no merge.
    """

    label: str
    outcomes: Outcomes
    seconds: float | None = None


@dataclass(frozen=True)
class Bench:
    """The family, and what is done with it.

    Attributes:
        base: the base encoder's folder.
        tasks: the tasks.
        experts: the expert of each.
        statistics: the experts' statistics files, by kind.
        cache: the benchmark's cache folder.
        say: called with each line of progress.
    """

    base: Path
    tasks: Sequence[Task]
    experts: Sequence[Expert]
    statistics: Mapping[str, Sequence[Path]]
    cache: Path
    say: Say

    def references(self) -> list[Result]:
        """The base encoder with the tasks' heads, and every expert on its own task."""
        of_experts: Scores = {}
        for index, expert in enumerate(self.experts):
            of_experts |= self.evaluate(_tensors(expert.encoder), only=index)
        base = self.evaluate(_tensors(self.base))
        return [Result("base encoder with the tasks' heads", base), Result("individual experts", of_experts)]

    def run(self, row: Row, part: str = "test") -> list[Result]:
        """The row's merges, made and evaluated, or from the cache."""
        files = self.statistics[row.statistics] if row.statistics else ()
        inputs = [expert.digest for expert in self.experts], [file.name for file in files], weights_digest(self.base)
        made_with = key(repr(row), inputs, source_digest("merganser"), self._judges(part), torch.get_num_threads())
        place = self.cache / "rows" / f"{made_with}.json"
        kept = read_json(place)
        if kept is None:
            began = time.perf_counter()
            models = list(self._merges(row))
            seconds = time.perf_counter() - began
            kept = [{"label": label, "outcomes": self.evaluate(model, part)} for label, model in models]
            kept = [{**found, "seconds": seconds} for found in kept]
            write_json(place, kept)
            accuracies = ", ".join(f"{100 * mean_accuracy(found['outcomes']):.2f}" for found in kept)
            self.say(f"{row.label}: {accuracies}; merged in {seconds:.1f} s")
        return [Result(found["label"], found["outcomes"], found["seconds"]) for found in kept]

    def _merges(self, row: Row) -> Iterator[tuple[str, dict[str, Tensor]]]:
        files = self.statistics[row.statistics] if row.statistics else ()
        return merged(row, [expert.encoder for expert in self.experts], self.base, files, self._inputs())

    def _inputs(self) -> list[list[dict[str, Tensor]]]:
        return [list(padded(task.statistics.ids)) for task in self.tasks]

    def distilled(self, row: Row, steps: Sequence[int]) -> list[Result]:
        """The encoder after steps of distillation from a row's merge, or from the cache; the seconds are without it."""
        how = Path(distillation.__file__).read_bytes()
        made_with = key(repr(row), list(steps), how, self._judges("test"), [task.statistics.ids for task in self.tasks])
        place = self.cache / "distilled" / f"{made_with}.json"
        kept = read_json(place)
        if kept is None:
            encoder, kept = load_encoder(self.base), []
            encoder.load_state_dict(next(self._merges(row))[1])
            for count, seconds in distillation.distilled(encoder, self.experts, self._inputs(), steps):
                label = f"Adam distillation from {row.label}, {count} steps"
                outcomes = self.evaluate(encoder.state_dict())
                kept.append({"label": label, "outcomes": outcomes, "seconds": seconds})
                self.say(f"{label}: {100 * mean_accuracy(outcomes):.2f}; {seconds:.1f} s")
            write_json(place, kept)
        return [Result(found["label"], found["outcomes"], found["seconds"]) for found in kept]

    def tuned(self, candidates: Sequence[Row]) -> Result:
        """The candidate that is best on the validation items, on the test items."""
        scores = [mean_accuracy(self.run(row, "validation")[0].outcomes) for row in candidates]
        best = candidates[scores.index(max(scores))]
        result = self.run(best)[0]
        return Result(f"{result.label}, tuned on validation", result.outcomes, result.seconds)

    def evaluate(self, tensors: Mapping[str, Tensor], part: str = "test", only: int | None = None) -> Scores:
        """Labels a split of every task, or of one; the same weights are never evaluated twice."""
        chosen = range(len(self.tasks)) if only is None else [only]
        place = self.cache / "evaluations" / f"{key(_digest(tensors), self._judges(part), only)}.json"
        kept: Scores | None = read_json(place)
        if kept is None:
            encoder, kept = load_encoder(self.base), {}
            encoder.load_state_dict(tensors)
            for index in chosen:
                split: Split = getattr(self.tasks[index], part)
                found = predictions(encoder, self.experts[index].load_head(), split.ids)
                right = [label == target for label, target in zip(found, split.targets, strict=True)]
                kept[self.tasks[index].name] = right
            write_json(place, kept)
        return kept

    def _judges(self, part: str) -> str:
        """A digest of what weights are evaluated with: items and heads."""
        heads = [weights_digest(expert.head.parent) for expert in self.experts]
        return key(part, [digest(getattr(task, part)) for task in self.tasks], heads)


def mean_accuracy(outcomes: Outcomes) -> float:
    """The mean over the tasks of the share that is right."""
    return sum(sum(right) / len(right) for right in outcomes.values()) / len(outcomes)


def _tensors(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = load_encoder(folder).state_dict()
    return state


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
