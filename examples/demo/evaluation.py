"""Accuracy of an encoder on the tasks, each with its own head, and how sure the numbers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from examples.demo.encoder import load_encoder, load_tokenizer, predictions, tokenize
from examples.demo.experts import Expert
from examples.demo.store import key, read_json, weights_digest, write_json
from examples.demo.tasks import Task

Z = 1.959964
"""The normal quantile of a 95 % interval."""

Part = Literal["test", "validation"]
"""The split of a task to evaluate on."""

Outcomes = Mapping[str, Sequence[bool]]
"""For each task, whether each item of one of its splits was labelled rightly."""


@dataclass(frozen=True, slots=True)
class Model:
    """An encoder's Hugging Face folder, and the tasks to evaluate it on, each with the expert whose head to use."""

    folder: Path
    tasks: Sequence[Task]
    experts: Sequence[Expert]


def evaluate(models: Sequence[Model], cache: Path, pool: Executor, split: Part = "test") -> list[dict[str, list[bool]]]:
    """Labels a split of every model's tasks.

    Results are kept under a digest of the weights, the data and the head: the same weights are never evaluated twice.

    Args:
        models: The encoders to evaluate.
        cache: The demo's cache folder.
        pool: The processes to do it in.
        split: Which items to label.

    Returns:
        For each model, for each of its tasks, whether each item was labelled rightly.
    """
    files = [_files(model, cache / "evaluations", split) for model in models]
    runs, begun = {}, set[Path]()
    for model, places in zip(models, files, strict=True):
        wanted = {task for task, place in places.items() if not (place.is_file() or place in begun)}
        pairs = zip(model.tasks, model.experts, strict=True)
        missing = [(task, expert) for task, expert in pairs if task.name in wanted]
        if missing:
            runs[pool.submit(_label, model.folder, missing, split)] = places
            begun.update(places.values())
    for done in as_completed(runs):
        for task, right in done.result().items():
            write_json(runs[done][task], right)
    return [{task: read_json(place) for task, place in places.items()} for places in files]


def _files(model: Model, folder: Path, split: Part) -> dict[str, Path]:
    """Where each task's outcomes belong."""
    weights = weights_digest(model.folder)
    pairs = zip(model.tasks, model.experts, strict=True)
    return {task.name: folder / f"{weights}-{key(task.digest, expert.digest, split)}.json" for task, expert in pairs}


def _label(folder: Path, pairs: Sequence[tuple[Task, Expert]], split: Part) -> dict[str, list[bool]]:
    """Runs in a worker process: loads the encoder once, and labels the items of each task's split."""
    encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
    right = {}
    for task, expert in pairs:
        items = task.validation if split == "validation" else task.test
        labels = predictions(encoder, expert.load_head(), tokenize(tokenizer, items.texts))
        right[task.name] = [label == target for label, target in zip(labels, items.targets, strict=True)]
    return right


def accuracy(outcomes: Sequence[bool]) -> float:
    """The share of items labelled rightly."""
    return sum(outcomes) / len(outcomes)


def wilson(outcomes: Sequence[bool]) -> tuple[float, float]:
    """Wilson's 95 % interval of an accuracy."""
    n, p = len(outcomes), accuracy(outcomes)
    middle = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2)) / (1 + Z**2 / n)
    return middle - half, middle + half


def mean(outcomes: Outcomes) -> tuple[float, float]:
    """Mean accuracy over the tasks, and half its 95 % interval: how far other test items would move it.

    The tasks are taken as given; the variance is that of independent items within each.
    """
    rates = [(accuracy(right), len(right)) for right in outcomes.values()]
    variance = sum(rate * (1 - rate) / count for rate, count in rates)
    return sum(rate for rate, _ in rates) / len(rates), Z * math.sqrt(variance) / len(rates)


def difference(first: Outcomes, second: Outcomes) -> tuple[float, float]:
    """Difference of two models' mean accuracies on the same items, and half its paired 95 % interval."""
    total, variance = 0.0, 0.0
    for task, right in first.items():
        deltas = [int(a) - int(b) for a, b in zip(right, second[task], strict=True)]
        average = sum(deltas) / len(deltas)
        total += average
        variance += sum((delta - average) ** 2 for delta in deltas) / (len(deltas) - 1) / len(deltas)
    return total / len(first), Z * math.sqrt(variance) / len(first)
