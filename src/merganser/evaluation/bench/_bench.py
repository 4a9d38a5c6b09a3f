"""Running a suite: step by step, each kept, so that a run that was stopped goes on and a crash costs one step."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._version import __version__
from merganser.errors import InputError, MerganserError
from merganser.evaluation._cost import Cost
from merganser.evaluation._tuned import described
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._experts import make_expert
from merganser.evaluation.bench._pretraining import prepared_lab
from merganser.evaluation.bench._results import document, finished_row
from merganser.evaluation.bench._rows import (
    Measured,
    baseline_row,
    chooses,
    collected,
    merge_row,
    moments_of,
    needs_statistics,
    walks,
)
from merganser.evaluation.bench._schema import MethodEntry, SuiteTask
from merganser.evaluation.bench._statistics import statistics_of
from merganser.evaluation.bench._store import key, read_json, write_json
from merganser.evaluation.bench._suite import Suite, method_id, read_suite

__all__ = ["bench"]

Say = Callable[[str], None]


def subsets(number: int, size: int, draws: int) -> list[tuple[int, ...]]:
    """Random subsets of ``range(number)``, no two the same: as many as asked for, or as there are."""
    found: list[tuple[int, ...]] = []
    draw = random.Random(f"{number}/{size}")
    while len(found) < min(draws, math.comb(number, size)):
        chosen = tuple(sorted(draw.sample(range(number), size)))
        found += [] if chosen in found else [chosen]
    return found


def bench(
    suite: str | os.PathLike[str] | Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    data: str | os.PathLike[str] | None = None,
    quick: bool = False,
    say: Say | None = None,
) -> dict[str, Any]:
    """Run a suite of experiments.

    Args:
        suite: a suite file, or what it would hold.
        out: the folder of ``results.json`` and of the cache. A run that was stopped goes on there.
        data: the folder at which relative paths of data start; the current one by default.
        quick: with the changes of the suite's key ``quick``.
        say: called with each line of progress.

    Returns:
        The document of ``results.json``.

    Raises:
        RecipeError: the suite is wrong.
        MerganserError: the base, or the data of every task, cannot be prepared.
    """
    return _Run(read_suite(suite, data=data, quick=quick), Path(out), say or (lambda line: None)).run()


class _Run:
    def __init__(self, suite: Suite, out: Path, say: Say) -> None:
        self._suite, self._out, self._say = suite, out, say
        self._settings = suite.settings
        self._lab = prepared_lab(suite, out / "cache")
        self._steps: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._tasks: list[dict[str, Any]] = []

    def run(self) -> dict[str, Any]:
        """All seeds."""
        for seed in self._settings.seeds:
            self._seed(seed)
        return self._write()

    def _seed(self, seed: int) -> None:
        experts = []
        for name in self._settings.tasks:
            found = self._step(
                f"expert {name} seed {seed}", None, functools.partial(make_expert, self._lab, name, seed)
            )
            experts += [found] if isinstance(found, Expert) else []
        if not experts:
            return
        scores = self._baseline("experts", experts, seed, {})
        own = {name: score["value"] for name, score in (scores or {"scores": {}})["scores"].items()}
        self._describe(scores)
        for name in self._settings.baselines:
            if name != "experts":
                self._baseline(name, experts, seed, own)
        files = self._statistics(experts, seed)
        for entry in self._settings.methods:
            self._merge(entry, experts, files, seed, own)
        counts = self._settings.counts
        swept = counts.seeds is None or self._settings.seeds.index(seed) < counts.seeds
        for count in counts.models if swept else []:
            for draw, chosen in enumerate(subsets(len(experts), min(count, len(experts)), counts.draws)):
                some = [experts[index] for index in chosen]
                for name in counts.methods:
                    self._merge(self._suite.methods[name], some, files, seed, own, draw=draw)

    def _statistics(self, experts: Sequence[Expert], seed: int) -> dict[str, Measured]:
        """The statistics of every expert, if a method reads them."""
        if not any(needs_statistics(entry, len(experts)) for entry in self._settings.methods):
            return {}
        found = {}
        for expert in experts:
            name = f"statistics {expert.task} seed {seed}"
            depends = (
                expert.digest,
                self._settings.statistics.model_dump_json(),
                self._settings.splits.model_dump_json(),
            )
            made = self._step(name, depends, functools.partial(collected, self._lab, expert))
            if made is not None:
                found[expert.task] = Measured((statistics_of(self._lab, expert),), Cost(**made["cost"]))
        return found

    def _baseline(
        self, name: str, experts: Sequence[Expert], seed: int, own: Mapping[str, float]
    ) -> dict[str, Any] | None:
        make = functools.partial(baseline_row, self._lab, name, experts, seed)
        found: dict[str, Any] | None = self._step(f"{name} seed {seed}", self._depends(experts, seed), make)
        used = {"base": "none", "experts": "none", "ensemble": "none", "distillation": "unlabelled"}
        row = self._row(name, name, experts, seed) | {"kind": "baseline", "data": used.get(name, "labelled")}
        known = own or {n: s["value"] for n, s in (found or {"scores": {}})["scores"].items()}
        self._rows.append(finished_row(row, found, known))
        self._write()
        return found

    def _merge(
        self,
        entry: MethodEntry,
        experts: Sequence[Expert],
        files: Mapping[str, Measured],
        seed: int,
        own: Mapping[str, float],
        draw: int | None = None,
    ) -> None:
        name = method_id(entry)
        reads = needs_statistics(entry, len(experts))
        label = f"{name} seed {seed}" + ("" if draw is None else f", {len(experts)} models, draw {draw}")

        def make() -> dict[str, Any]:
            if reads and (missing := [e.task for e in experts if e.task not in files]):
                raise InputError("E0419", f"the statistics of `{missing[0]}` were not collected")
            some = [files[e.task] for e in experts] if reads else []
            if entry.reads_moments:
                some = [moments_of(expert) for expert in experts]
            cost = sum((m.cost for m in some), Cost())
            measured = Measured(tuple(file for m in some for file in m.files), cost)
            return merge_row(self._lab, entry, experts, measured, seed, tuned=draw is None)

        depends = (*self._depends(experts, seed), entry.model_dump_json(), draw is None)
        found = self._step(label, depends, make)
        labelled = chooses(entry, len(experts)) or (reads and self._settings.statistics.estimator == "empirical")
        row = self._row(name, entry.label or name, experts, seed) | {
            "kind": "merge",
            "method": entry.method,
            "options": entry.options,
            "tuned": bool(entry.search) and draw is None,
            "data": "labelled" if labelled else "unlabelled" if reads or walks(entry) else "none",
            "draw": draw,
        }
        self._rows.append(finished_row(row, found, own))
        self._write()

    def _row(self, name: str, label: str, experts: Sequence[Expert], seed: int) -> dict[str, Any]:
        return {
            "id": name,
            "label": label,
            "method": None,
            "options": {},
            "tuned": False,
            "seed": seed,
            "models": [e.task for e in experts],
            "count": len(experts),
            "draw": None,
            "error": self._steps[-1]["error"],
        }

    def _depends(self, experts: Sequence[Expert], seed: int) -> tuple[Any, ...]:
        """What the scores of a row depend on, beside what the row is."""
        settings = self._settings
        parts = (
            "splits",
            "statistics",
            "merge",
            "held_out",
            "composition",
            "baseline_training",
            "pooling",
            "max_length",
            "batch_norm",
        )
        names = [*(e.task for e in experts), *settings.held_out, *settings.composition]
        data = [(name, self._lab.source(name)) for name in names]
        found = [(e.task, e.digest) for e in experts]
        return self._lab.digest, found, data, seed, *(repr(getattr(settings, part)) for part in parts)

    def _step(self, name: str, depends: Any, make: Callable[[], Any]) -> Any:
        """What a step made, now or in an earlier run; None if it failed, which is recorded.

        Args:
            name: of the step.
            depends: what its result depends on; None if what it makes is kept elsewhere.
            make: makes it: plain data, if it is to be kept.
        """
        began = time.perf_counter()
        place = self._out / "cache" / "steps" / f"{key(name, depends, __version__)}.json"
        kept = None if depends is None else read_json(place)
        step: dict[str, Any] = {"name": name, "state": "cached", "seconds": 0.0, "error": None}
        if kept is None:
            try:
                kept = make()
                step["state"] = "done"
                if depends is not None:
                    write_json(place, kept)
            except Exception as error:  # noqa: BLE001 - whatever happens to one step, the others go on
                step |= {"state": "failed", "error": described(error)}
            step["seconds"] = time.perf_counter() - began
        self._steps.append(step)
        problem = "" if step["error"] is None else f": {step['error']['message']}"
        self._say(f"{name}: {step['state']} in {step['seconds']:.1f} s{problem}")
        for task, found in (kept.get("errors", {}) if isinstance(kept, dict) else {}).items():
            self._say(f"  `{task}` was not measured: {found['message']}")
        return kept

    def _describe(self, experts: Mapping[str, Any] | None) -> None:
        """The tasks, as the document names them."""
        if self._tasks or experts is None:
            return
        for task, texts in experts["warnings"].items():
            self._say(f"  `{task}`: {'; '.join(texts)}")
        settings = self._settings
        groups: Mapping[str, Mapping[str, SuiteTask]] = {
            "held_in": settings.tasks,
            "held_out": settings.held_out,
            "composition": settings.composition,
        }
        for role, group in groups.items():
            for name, entry in group.items():
                score = experts["scores"].get(name, {})
                classes = None
                if entry.kind in ("classification", "image"):
                    with contextlib.suppress(MerganserError):  # a task with broken data has a failed step
                        classes = self._lab.classes(name)
                self._tasks.append(
                    {
                        "name": name,
                        "kind": entry.kind,
                        "metric": score.get("metric"),
                        "role": role,
                        "n": score.get("n"),
                        "classes": classes,
                        "warnings": experts["warnings"].get(name, []),
                    }
                )

    def _write(self) -> dict[str, Any]:
        found = document(self._suite, self._tasks, self._rows, self._steps)
        write_json(self._out / "results.json", found)
        return found
