"""Results of evaluations, searches and benchmarks as docs/evaluation.md describes them, with made-up figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TASKS = ("sst2", "trec6", "subj", "snips")


def score(value: float, expert: float | None = 0.9, n: int = 500) -> dict[str, Any]:
    half = 1.96 * math.sqrt(value * (1 - value) / n)
    return {
        "kind": "classification",
        "metric": "accuracy",
        "value": value,
        "n": n,
        "interval": [value - half, value + half],
        "expert": expert,
        "normalised": None if expert is None else value / expert,
    }


def eval_data() -> dict[str, Any]:
    tasks = {name: score(0.7 + 0.05 * index) for index, name in enumerate(TASKS)}
    return {
        "format": "merganser-eval",
        "version": 1,
        "merganser": "0.1.0",
        "model": "merged",
        "tasks": tasks,
        "mean": {"value": 0.775, "interval": [0.75, 0.8], "normalised": 0.86, "tasks": 4},
        "errors": {"cola": {"code": "E0416", "message": "a label is none of the model's", "file": "cola.jsonl"}},
        "seconds": 12.5,
    }


def tune_data() -> dict[str, Any]:
    trials: list[dict[str, Any]] = []
    for number in range(10):
        scale = round(0.1 * (number + 1), 1)
        values = {
            name: 0.9 - 0.35 * (scale - best) ** 2 for name, best in zip(TASKS, (0.3, 0.5, 0.6, 0.4), strict=True)
        }
        trials.append(
            {
                "number": number,
                "params": {"scale": scale},
                "state": "complete",
                "value": sum(values.values()) / len(values),
                "tasks": {name: score(value, n=100) for name, value in values.items()},
                "reused": "scale",
                "seconds": {"merge": 0.1, "evaluation": 2.0},
                "error": None,
            }
        )
    error = {"code": "E0602", "message": "merged values are not finite"}
    failed = {"number": 10, "params": {"scale": 9.0}, "state": "failed", "value": None, "tasks": {}, "error": error}
    return {
        "format": "merganser-tune",
        "version": 1,
        "merganser": "0.1.0",
        "method": "task_arithmetic",
        "models": list(TASKS),
        "base": "base",
        "search": {"scale": {"kind": "float", "low": 0.1, "high": 1.0, "log": False}},
        "sampler": "grid",
        "objective": "mean",
        "seed": 0,
        "tasks": [{"name": name, "kind": "classification", "metric": "accuracy", "n": 100} for name in TASKS],
        "trials": [*trials, failed],
        "best": {key: trials[4][key] for key in ("number", "params", "value", "tasks")},
        "front": [2, 3, 4, 5],
        "labels": 400,
        "check": {"value": 0.89, "largest_difference": 3.0e-8},
        "cost": {"merges": 1, "merge_seconds": 1.2, "evaluation_seconds": 40.1, "peak_bytes": 900_000_000},
        "report": eval_data(),
        "out": "merged",
    }


ROWS = {
    "base": ("base", "baseline", "none", 0.55, 0.0),
    "experts": ("experts, one per task", "baseline", "none", 0.9, 0.0),
    "average": ("average", "merge", "none", 0.70, 0.4),
    "task_arithmetic": ("task arithmetic, tuned", "merge", "labelled", 0.74, 82.0),
    "ties": ("TIES", "merge", "none", 0.73, 2.2),
    "actmat": ("ACTMat", "merge", "none", 0.79, 12.0),
    "regmean": ("RegMean", "merge", "unlabelled", 0.81, 57.0),
    "mats": ("MaTS", "merge", "unlabelled", 0.86, 88.0),
}


def bench_data() -> dict[str, Any]:
    rows, summary = [], []
    for key, (label, kind, data, value, seconds) in ROWS.items():
        values = {name: min(0.98, value + 0.02 * index - 0.03) for index, name in enumerate(TASKS)}
        search = None
        if key == "task_arithmetic":
            found = tune_data()
            search = {"trials": found["trials"], "front": found["front"]}
        rows.append(
            {
                "id": key,
                "label": label,
                "kind": kind,
                "method": None if kind == "baseline" else key,
                "options": {},
                "tuned": key == "task_arithmetic",
                "data": data,
                "seed": 0,
                "models": list(TASKS),
                "count": len(TASKS),
                "draw": None,
                "scores": {name: score(v) for name, v in values.items()},
                "held_in": {"value": value, "interval": [value - 0.02, value + 0.02], "normalised": value / 0.9},
                "held_out": {"value": value / 2 + 0.2, "interval": [0.4, 0.7], "normalised": None},
                "cost": {},
                "search": search,
                "error": None,
            }
        )
        summary.append(
            {
                "id": key,
                "label": label,
                "kind": kind,
                "method": None if kind == "baseline" else key,
                "tuned": key == "task_arithmetic",
                "data": data,
                "seeds": 3,
                "held_in": {"mean": value, "spread": 0.004, "interval": [value - 0.02, value + 0.02]},
                "held_in_normalised": {"mean": value / 0.9, "spread": 0.003},
                "held_out": {"mean": value / 2 + 0.2, "spread": 0.01, "interval": [0.4, 0.7]},
                "seconds": {"statistics": 0.5 * seconds, "merge": 0.3 * seconds, "tuning": 0.2 * seconds},
            }
        )
    error = {"code": "E0418", "message": "the statistics do not fit the model in /home/someone/models/x"}
    rows.append({"id": "fisher", "label": "Fisher", "kind": "merge", "scores": {}, "held_in": None, "error": error})
    scaling = [
        {"id": k, "label": ROWS[k][0], "count": c, "draws": 3, "mean": ROWS[k][3] + 0.1 / c, "spread": 0.02 / c}
        for k in ("average", "ties", "mats")
        for c in (2, 3, 4)
    ]
    return {
        "format": "merganser-bench",
        "version": 1,
        "merganser": "0.1.0",
        "suite": {"name": "text4", "digest": "0", "quick": False},
        "machine": {"torch": "2.13.0", "threads": 1, "cpus": 2, "platform": "x86_64"},
        "tasks": [
            {"name": name, "kind": "classification", "metric": "accuracy", "role": "held_in", "n": 500, "classes": 2}
            for name in TASKS
        ],
        "seeds": [0, 1, 2],
        "rows": rows,
        "summary": summary,
        "scaling": scaling,
        "steps": [{"name": "expert sst2 seed 0", "state": "done", "seconds": 81.0, "error": None}],
    }


def write(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
