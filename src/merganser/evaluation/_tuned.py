"""The result of a search as plain data: the document that is printed, and what the lock file keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merganser._version import __version__
from merganser.engine import as_scores
from merganser.errors import MerganserError
from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._outcomes import Evaluation
from merganser.evaluation._space import Space
from merganser.evaluation._trials import Trial
from merganser.pareto import non_dominated
from merganser.recipe import Recipe

__all__ = ["described", "document_of", "figures", "front_of", "record_of", "task_facts", "trials_of"]


def document_of(
    recipe: Recipe, space: Space, facts: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The parts of the document that do not depend on the trials."""
    names = [Path(m).name if isinstance(m, str | Path) else "state dict" for m in (recipe.base, *recipe.models())]
    return {
        "format": "merganser-tune",
        "version": 1,
        "merganser": __version__,
        "method": recipe.constant_method().name,
        "models": names[1:],
        "base": None if recipe.base is None else names[0],
        "search": {name: found.as_dict() for name, found in space.items()},
        **facts,
        "tasks": list(tasks),
    }


def trials_of(trials: Sequence[Trial], best: Trial | None, front: Sequence[int], labels: int | None) -> dict[str, Any]:
    """The parts that do."""
    chosen = None
    if best is not None:
        chosen = {"number": best.number, "params": dict(best.params), "value": best.value, "tasks": dict(best.tasks)}
    return {"trials": [t.as_dict() for t in trials], "best": chosen, "front": list(front), "labels": labels}


def task_facts(measure: Any, digests: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[dict[str, Any]]:
    """The tasks that guided the search."""
    if not isinstance(measure, Evaluator):
        return [{"name": name, "kind": None, "n": None, "data": None} for name in names]
    return [
        {
            "name": task.name,
            "kind": task.kind,
            "n": len(digests[task.name]),
            "data": {"file": task.data.name, "items": len(digests[task.name])},
        }
        for task in measure.tasks.tasks
    ]


def record_of(document: Mapping[str, Any], digests: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the lock file of the best merge says of the search, with digests of the examples that it has seen."""
    keys = ("method", "search", "sampler", "objective", "seed", "best", "labels")
    tried = [{key: trial[key] for key in ("number", "params", "value")} for trial in document["trials"]]
    data = {name: {"items": list(items)} for name, items in digests.items()}
    return {**{key: document[key] for key in keys}, "trials": tried, "data": data}


def figures(found: Any) -> dict[str, dict[str, Any]]:
    """What an evaluator returned, as the figures of each task."""
    if isinstance(found, Evaluation):
        return {name: result.outcomes.summary() for name, result in found.results.items()}
    given = {str(name): value for name, value in found.items()} if isinstance(found, Mapping) else {}
    return {
        name: {"interval": None, "value": value, **_named(given.get(name))} for name, value in as_scores(found).items()
    }


def _named(given: Any) -> dict[str, Any]:
    """The metric that counts and the number of items, where an evaluator names them."""
    named = given if isinstance(given, Mapping) else {}
    n = named.get("n")
    return {
        "metric": next((str(metric) for metric in named if metric != "n"), "score"),
        "n": n if isinstance(n, int) and not isinstance(n, bool) else None,
    }


def described(error: Exception) -> dict[str, Any]:
    """An error as plain data."""
    if isinstance(error, MerganserError):
        return {"code": error.code, "message": error.message}
    return {"code": None, "message": f"{type(error).__name__}: {error}"}


def front_of(trials: Sequence[Trial]) -> tuple[int, ...]:
    """The numbers of the trials that no other dominates over the tasks."""
    if not trials:
        return ()
    names = list(trials[0].tasks)
    scores = np.array([[trial.tasks[name]["value"] for name in names] for trial in trials])
    return tuple(trials[index].number for index in non_dominated(scores))
