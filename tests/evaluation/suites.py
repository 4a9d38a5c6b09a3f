"""A whole small experiment on a tiny encoder, for tests of suites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.text_models import sentences, write_encoder, write_lines

METHODS: list[dict[str, Any]] = [
    {"method": "average"},
    {"method": "task_arithmetic", "search": {"scale": [0.2, 0.5, 1.0]}},
    {"method": "mats", "options": {"iterations": 3}},
    {"method": "emr"},
    {"method": "output_matching"},
    {"method": "sequential_mats", "options": {"iterations": 3}},
    {"method": "learned_soup", "options": {"by": "layer", "steps": 12, "lr": 0.3}},
]


def write_tasks(folder: Path, *names: str) -> dict[str, Any]:
    """Tasks whose label is a word of the text."""
    found = {}
    for number, name in enumerate(names):
        words = ("good", "bad", "film", "plot", "dull")[number : number + 2]
        records: list[dict[str, Any]] = []
        for text in sentences(80, seed=number):
            records.append({"text": f"{text} {words[len(records) % 2]}", "label": len(records) % 2})
        write_lines(folder / f"{name}.train.jsonl", records[:60])
        write_lines(folder / f"{name}.test.jsonl", records[60:])
        found[name] = {"kind": "classification", "train": f"{name}.train.jsonl", "test": f"{name}.test.jsonl"}
    return found


def small_suite(folder: Path, **changes: Any) -> dict[str, Any]:
    write_encoder(folder / "base")
    return {
        "name": "small",
        "base": {"path": "base"},
        "max_length": 16,
        "tasks": write_tasks(folder, "one", "two", "three"),
        "held_out": write_tasks(folder, "four"),
        "composition": {"five": {**write_tasks(folder, "five")["five"], "answers": "one"}},
        "splits": {"test": 20, "validation": 10, "statistics": 12, "probe": 20},
        "training": {"steps": 8, "rate": 1e-2, "head_rate": 1e-2},
        "methods": METHODS,
        "baseline_training": {"multitask_steps": 6, "distillation_steps": 4},
        "counts": {"models": [2], "draws": 2, "methods": ["average"], "seeds": 1},
        "seeds": [0, 1],
        **changes,
    }
