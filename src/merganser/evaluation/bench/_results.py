"""The results of a suite as one document: rows, their means over seeds, and accuracy against the number of models."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from merganser._version import __version__
from merganser.evaluation._intervals import mean_interval
from merganser.evaluation._outcomes import relative
from merganser.evaluation.bench._suite import Suite

__all__ = ["document", "finished_row"]

_OTHERS = ("held_out", "composition")
"""Groups of tasks without experts of their own."""


def finished_row(
    row: Mapping[str, Any], found: Mapping[str, Any] | None, experts: Mapping[str, float]
) -> dict[str, Any]:
    """A row of the table from what a step found: scores with their relation to the experts', means, cost.

    Args:
        row: what the row is.
        found: what its step found; None if it failed.
        experts: the score of each task's expert. A row without a score that its expert has is no row of the summary.
    """
    if found is None:
        nothing = dict.fromkeys(("held_in", *_OTHERS, "cost", "search"))
        return {**row, **nothing, "scores": {}, "errors": {}}
    scores = {name: _score(score, experts.get(name)) for name, score in found["scores"].items()}
    others = {group: {name: _score(s, None) for name, s in found.get(group, {}).items()} for group in _OTHERS}
    return {
        **row,
        "options": found["options"],
        "scores": {**scores, **{name: score for group in others.values() for name, score in group.items()}},
        "held_in": _mean(found["scores"], scores) if _is_complete(found["errors"], experts) else None,
        **{group: _mean(found.get(group, {}), others[group]) for group in _OTHERS},
        "cost": found["cost"],
        "search": found["search"],
        "errors": found["errors"],
    }


def _is_complete(errors: Mapping[str, Any], experts: Mapping[str, float]) -> bool:
    """Whether what could not be measured could not be measured of the experts either."""
    return not any(name in experts for name in errors)


def _score(score: Mapping[str, Any], expert: float | None) -> dict[str, Any]:
    shown = {key: score[key] for key in ("metric", "value", "n", "interval")}
    ratio = None if expert is None else relative(score["metric"], score["value"], expert)
    return {**shown, "expert": expert, "normalised": ratio}


def _mean(found: Mapping[str, Any], scores: Mapping[str, Any]) -> dict[str, Any] | None:
    if not found:
        return None
    values = [score["value"] for score in found.values()]
    ratios = [score["normalised"] for score in scores.values()]
    known = [ratio for ratio in ratios if ratio is not None]
    return {
        "value": statistics.fmean(values),
        "interval": list(mean_interval(values, [score["variance"] for score in found.values()])),
        "normalised": statistics.fmean(known) if len(known) == len(ratios) else None,
    }


def document(
    suite: Suite,
    tasks: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything so far."""
    whole = [row for row in rows if row["draw"] is None]
    return {
        "format": "merganser-bench",
        "version": 1,
        "merganser": __version__,
        "suite": {"name": suite.settings.name, "digest": suite.digest, "quick": suite.quick},
        "machine": {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "platform": platform.machine(),
        },
        "tasks": list(tasks),
        "seeds": list(suite.settings.seeds),
        "rows": list(rows),
        "summary": [_summary(group) for group in _grouped(whole, "id").values()],
        "scaling": [
            _scaled(group) for group in _grouped([r for r in rows if r["draw"] is not None], "id", "count").values()
        ],
        "steps": list(steps),
    }


def _grouped(rows: Sequence[Mapping[str, Any]], *keys: str) -> dict[Any, list[Mapping[str, Any]]]:
    """Rows that succeeded, by some of their keys."""
    found: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["held_in"] is not None:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first = rows[0]
    others = {group: [row[group] for row in rows if row[group] is not None] for group in _OTHERS}
    ratios = [row["held_in"]["normalised"] for row in rows if row["held_in"]["normalised"] is not None]
    return {
        **{key: first[key] for key in ("id", "label", "kind", "method", "tuned", "data")},
        "seeds": len(rows),
        "held_in": _over_seeds([row["held_in"] for row in rows]),
        "held_in_normalised": {"mean": statistics.fmean(ratios), "spread": _spread(ratios)} if ratios else None,
        **{group: _over_seeds(means) if means else None for group, means in others.items()},
        "seconds": _mean_costs(rows, "seconds"),
        "cpu_seconds": _mean_costs(rows, "cpu_seconds"),
    }


def _mean_costs(rows: Sequence[Mapping[str, Any]], kind: str) -> dict[str, float]:
    return {part: statistics.fmean(row["cost"][part][kind] for row in rows) for part in rows[0]["cost"]}


def _over_seeds(means: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [mean["value"] for mean in means]
    half = statistics.fmean((mean["interval"][1] - mean["interval"][0]) / 2 for mean in means)
    center = statistics.fmean(values)
    return {"mean": center, "spread": _spread(values), "interval": [center - half, center + half]}


def _scaled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    values = [row["held_in"]["value"] for row in rows]
    ratios = [row["held_in"]["normalised"] for row in rows if row["held_in"]["normalised"] is not None]
    return {
        **{key: rows[0][key] for key in ("id", "label", "count")},
        "draws": len(rows),
        "mean": statistics.fmean(values),
        "spread": _spread(values),
        "normalised": statistics.fmean(ratios) if ratios else None,
        "values": values,
    }


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None
