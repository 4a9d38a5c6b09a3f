"""The search for the options of a merge: trials in memory, the best one made again as an ordinary merge."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser._version import __version__
from merganser.engine import FolderEvaluator, describe_method, make_plan, save, to_memory
from merganser.errors import NumericError, Place, RecipeError, UsageError
from merganser.evaluation._candidates import Candidates, reusable, with_options
from merganser.evaluation._cost import Meter
from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._outcomes import Evaluation
from merganser.evaluation._overlap import refuse_overlap
from merganser.evaluation._space import Space, grid
from merganser.evaluation._trials import OBJECTIVES, SAMPLERS, Trial, Trials
from merganser.evaluation._tuned import described, document_of, figures, front_of, record_of, task_facts, trials_of
from merganser.recipe import Recipe

__all__ = ["Tuning", "tune_recipe"]

State = Mapping[str, torch.Tensor]
Measure = Evaluator | FolderEvaluator | Callable[[State], Any]


@dataclass(frozen=True)
class Tuning:
    """What a search found.

    Attributes:
        trials: all of them.
        best: the one with the highest mean; None if all failed.
        front: the numbers of those that no other dominates over the tasks.
        labels: labelled examples that the search has seen.
        out: the folder of the best merge, if one was asked for.
        report: the best merge on the tasks for reporting.
        document: everything, as ``merganser tune --json`` prints it.
    """

    trials: tuple[Trial, ...]
    best: Trial | None
    front: tuple[int, ...]
    labels: int
    out: Path | None
    report: Evaluation | None
    document: Mapping[str, Any]


def tune_recipe(
    recipe: Recipe,
    measure: Measure,
    space: Space,
    *,
    sampler: str = "tpe",
    trials: int | None = None,
    objective: str = "mean",
    seed: int = 0,
    storage: str | None = None,
    report: Evaluator | None = None,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    device: str | torch.device | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> Tuning:
    """Search the options of a merge.

    Args:
        recipe: the merge.
        measure: an `Evaluator`, or a function of a state dict (or folder) as for `merge`.
        space: what is searched, see `space_of`.
        sampler: ``grid``, ``tpe`` or ``cmaes``.
        trials: how many; all points of a grid, 20 otherwise.
        objective: what guides the sampler: the ``mean`` over the tasks, or every task (``pareto``).
        seed: of the sampler.
        storage: URL of a database; a search that was stopped goes on from there.
        report: tasks on which the best merge is reported; no example may be among those of `measure`.
        out: the folder for the best merge.
        overwrite: replace a folder that an earlier merge made.
        threads: worker threads of merges.
        device: where merges are computed.
        on_trial: called after every trial.

    Raises:
        RecipeError: the merge cannot be searched.
        InputError: E0426, tuning and reporting share examples; or the data of a task are wrong.
    """
    if objective not in OBJECTIVES or sampler not in SAMPLERS or (trials is not None and trials < 1):
        raise UsageError(
            "E0201", f"sampler is one of {', '.join(SAMPLERS)}, objective of {', '.join(OBJECTIVES)}, trials 1 or more"
        )
    if "evaluator" in recipe.constant_method().requires(2):
        raise RecipeError(
            "E0308",
            f"`{recipe.constant_method().name}` chooses by an evaluator itself",
            places=Place(file=recipe.file, key="merge_method"),
            fix="merge with an evaluator (evaluator=, or --eval-cmd)",
        )
    return _Search(recipe, measure, space, sampler, trials, objective, seed, storage, report, threads, device).run(
        on_trial, out, overwrite
    )


class _Search:
    def __init__(
        self,
        recipe: Recipe,
        measure: Measure,
        space: Space,
        sampler: str,
        trials: int | None,
        objective: str,
        seed: int,
        storage: str | None,
        report: Evaluator | None,
        threads: int | None,
        device: str | torch.device | None,
    ) -> None:
        self._recipe, self._space = recipe, space
        self._sampler, self._objective, self._seed = sampler, objective, seed
        self._threads, self._device = threads, device
        points = grid(space, trials, [name for name in space if name not in reusable()]) if sampler == "grid" else []
        self._count = len(points) if sampler == "grid" else trials or 20
        plan = make_plan(recipe, threads=threads)  # everything that is wrong with the merge is said before a trial
        self._measure, self._report = _based(measure, plan.donor.folder), _based(report, plan.donor.folder)
        self._digests = self._data()
        self._candidates = Candidates(recipe, space, threads=threads, device=device)
        self._names: tuple[str, ...] = tuple(self._digests)
        self._trials = Trials(
            self._name(),
            space,
            sampler=sampler,
            points=points,
            tasks=len(self._names) if objective == "pareto" and len(self._names) > 1 else 0,
            seed=seed,
            storage=storage,
        )

    def run(
        self, on_trial: Callable[[Trial], None] | None, out: str | os.PathLike[str] | None, overwrite: bool
    ) -> Tuning:
        """All trials that are not done yet, then the best merge."""
        with Meter() as meter:
            while len(self._trials.done()) < self._count:
                with self._trials.next() as (number, params, result):
                    result.update(self._try(params))
                if on_trial is not None:
                    on_trial(Trial(number=number, params=params, **result))
        trials = self._trials.done()
        complete = [trial for trial in trials if trial.value is not None]
        best = max(complete, key=lambda trial: (trial.value or 0.0, -trial.number), default=None)
        front = front_of(complete)
        labels = self._labels()
        facts = {"sampler": self._sampler, "objective": self._objective, "seed": self._seed}
        document = document_of(self._recipe, self._space, facts, task_facts(self._measure, self._digests, self._names))
        document |= trials_of(trials, best, front, labels)
        found: Evaluation | None = None
        folder = None
        if best is not None:
            folder = None if out is None else Path(out)
            document["check"], final = self._final(best, folder, overwrite, document)
            if self._report is not None:
                found = self._report.measure(final)
                document["report"] = found.as_dict()
        document["out"] = None if folder is None else folder.name
        seconds = {part: math.fsum(t.seconds.get(part, 0.0) for t in trials) for part in ("merge", "evaluation")}
        document["cost"] = {
            "merges": self._candidates.merges,
            "merge_seconds": seconds["merge"],
            "evaluation_seconds": seconds["evaluation"],
            "seconds": meter.cost.seconds,
            "cpu_seconds": meter.cost.cpu_seconds,
            "peak_bytes": meter.cost.peak_bytes,
        }
        return Tuning(tuple(trials), best, front, labels, folder, found, document)

    def _try(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes of one trial; whatever goes wrong in it is recorded."""
        began = time.perf_counter()
        merged = began
        try:
            if isinstance(self._measure, FolderEvaluator):
                tasks, merged = self._in_folder(params, self._measure)
                reused = "merge"
            else:
                state, reused = self._candidates.make(params)
                merged = time.perf_counter()
                tasks = figures(self._measure(state))
            self._check_tasks(tasks)
        except Exception as error:  # noqa: BLE001 - an evaluator is code of the user's; the others go on
            return {"state": "failed", "error": described(error), "seconds": _seconds(began, merged)}
        value = math.fsum(task["value"] for task in tasks.values()) / len(tasks)
        return {
            "state": "complete",
            "value": value,
            "tasks": tasks,
            "reused": reused,
            "seconds": _seconds(began, merged),
        }

    def _in_folder(self, params: Mapping[str, Any], measure: FolderEvaluator) -> tuple[dict[str, Any], float]:
        plan = make_plan(with_options(self._recipe, params), threads=self._threads)
        with tempfile.TemporaryDirectory(prefix="merganser-trial-") as folder:
            out = save(plan, Path(folder) / "model", device=self._device).out
            merged = time.perf_counter()
            return figures(measure.evaluate(out)), merged

    def _check_tasks(self, tasks: Mapping[str, Any]) -> None:
        """Every trial must have the same tasks.

        Raises:
            NumericError: E0606, one is missing.
        """
        missing = [name for name in self._names if name not in tasks]
        if missing or not tasks:
            raise NumericError("E0606", f"the evaluator left out the task `{(missing or ['?'])[0]}`")
        self._names = self._names or tuple(tasks)

    def _data(self) -> dict[str, tuple[str, ...]]:
        """The digests of the items that the search will see, by task; they must not be reported on.

        Raises:
            InputError: E0426.
        """
        if not isinstance(self._measure, Evaluator):
            return {}
        digests = self._measure.digests()
        if self._report is not None:
            refuse_overlap(digests, self._report.digests(), self._report)
        return digests

    def _labels(self) -> int:
        if not isinstance(self._measure, Evaluator):
            return 0
        labelled = {task.name for task in self._measure.tasks.tasks if task.kind != "perplexity"}
        return sum(len(items) for name, items in self._digests.items() if name in labelled)

    def _name(self) -> str:
        """A digest of everything that a trial's result depends on, except its options."""
        recipe = self._recipe
        sources = [source for part in recipe.slices for source in part.sources]
        files = [recipe.base, recipe.init, *(x for source in sources for x in (source.model, source.statistics))]
        parts = (
            __version__,
            describe_method(recipe.constant_method()),
            list(map(_identity, files)),
            [sorted(source.parameters.items()) for source in sources],
            {name: found.as_dict() for name, found in self._space.items()},
            (self._sampler, self._objective, self._seed, recipe.seed, str(recipe.dtype)),
            self._digests,
        )
        return f"merganser-{hashlib.sha256(repr(parts).encode()).hexdigest()[:16]}"

    def _final(
        self, best: Trial, out: Path | None, overwrite: bool, document: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Any]:
        """The best options as an ordinary merge, what it scores, and how far the trial's weights were from it."""
        plan = make_plan(with_options(self._recipe, best.params), threads=self._threads, max_memory=None)
        if out is not None:
            record = {"tuning": record_of(document, self._digests)}
            save(plan, out, record=record, overwrite=overwrite, device=self._device)
        if isinstance(self._measure, FolderEvaluator):
            return {"value": best.value, "largest_difference": None}, None if out is None else str(out)
        final = to_memory(plan, device=self._device)
        trial, _ = self._candidates.make(best.params)
        largest = max((_difference(trial[name], value) for name, value in final.items()), default=0.0)
        tasks = figures(self._measure(final))
        value = math.fsum(task["value"] for task in tasks.values()) / len(tasks)
        return {"value": value, "largest_difference": largest}, final if out is None else str(out)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _seconds(began: float, merged: float) -> dict[str, float]:
    return {"merge": merged - began, "evaluation": time.perf_counter() - merged}


def _based(measure: Any, folder: Path | None) -> Any:
    """An evaluator for state dicts of a merge, whose configuration is that of the merge."""
    return measure.based(folder) if isinstance(measure, Evaluator) else measure


def _identity(reference: Any) -> Any:
    """What tells whether a model or statistics file is still the same: its path, and sizes and times of its files."""
    if not isinstance(reference, str | os.PathLike):
        return type(reference).__name__
    path = Path(reference)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []
    return str(path), [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
