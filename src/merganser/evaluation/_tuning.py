"""The search for the options of a merge: trials in memory, the best one made again as an ordinary merge."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser.engine import FolderEvaluator, check_output, make_plan, save, to_memory
from merganser.errors import NumericError, Place, RecipeError, UsageError
from merganser.evaluation._candidates import Candidates, reusable, with_options
from merganser.evaluation._cost import Meter
from merganser.evaluation._evaluator import Evaluator
from merganser.evaluation._outcomes import Evaluation
from merganser.evaluation._overlap import refuse_overlap
from merganser.evaluation._space import Space, grid
from merganser.evaluation._study import study_name
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
        labels: labelled examples that the search has seen; None if only the evaluator knows.
        out: the folder of the best merge, if one was asked for.
        report: the best merge on the tasks for reporting.
        failure: what went wrong with the best merge after the search, so that `out` or `report` may be missing.
        document: everything, as ``merganser tune --json`` prints it.
    """

    trials: tuple[Trial, ...]
    best: Trial | None
    front: tuple[int, ...]
    labels: int | None
    out: Path | None
    report: Evaluation | None
    failure: Exception | None
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
    check: bool = True,
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
        check: make the best options an ordinary merge at last, and say how far the trial was from it; without `out` and
            `report` that can be left out.
        threads: worker threads of merges.
        device: where merges are computed.
        on_trial: called after every trial.

    Raises:
        RecipeError: the merge cannot be searched.
        InputError: E0426, tuning and reporting share examples; or the data of a task are wrong.
        EnvironmentFault: E0701, E0702, `out` is taken.
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
    search = _Search(recipe, measure, space, sampler, trials, objective, seed, storage, report, threads, device)
    finish = check or out is not None or report is not None
    return search.run(on_trial, None if out is None else Path(out), overwrite, finish)


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
        self._plan = plan = make_plan(recipe, threads=threads)  # what is wrong with the merge is said before a trial
        self._measure, self._report = _based(measure, plan.donor.folder), _based(report, plan.donor.folder)
        self._digests = self._data()
        self._candidates = Candidates(recipe, space, threads=threads, device=device)
        self._folders = 0
        self._names: tuple[str, ...] = tuple(self._digests)
        self._trials = Trials(
            study_name(recipe, space, points, (sampler, objective, seed), self._measure, self._digests),
            space,
            sampler=sampler,
            points=points,
            tasks=len(self._names) if objective == "pareto" and len(self._names) > 1 else 0,
            seed=seed,
            storage=storage,
        )

    def run(self, on_trial: Callable[[Trial], None] | None, out: Path | None, overwrite: bool, finish: bool) -> Tuning:
        """All trials that are not done yet, then the best merge if that is wanted."""
        if out is not None:
            check_output(out, self._plan, overwrite=overwrite)
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
        last = _Last()
        if best is not None and finish:
            try:
                self._finish(best, out, overwrite, document, last)
            except Exception as error:  # noqa: BLE001 - an evaluator is code of the user's; the trials are not lost
                last.failure = error
        document |= {
            "check": last.check,
            "report": None if last.report is None else last.report.as_dict(),
            "out": None if last.out is None else last.out.name,
            "failure": None if last.failure is None else described(last.failure),
        }
        seconds = {part: math.fsum(t.seconds.get(part, 0.0) for t in trials) for part in ("merge", "evaluation")}
        document["cost"] = {
            "merges": self._candidates.merges + self._folders,
            "merge_seconds": seconds["merge"],
            "evaluation_seconds": seconds["evaluation"],
            "seconds": meter.cost.seconds,
            "cpu_seconds": meter.cost.cpu_seconds,
            "peak_bytes": meter.cost.peak_bytes,
        }
        return Tuning(tuple(trials), best, front, labels, last.out, last.report, last.failure, document)

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
        return {
            "state": "complete",
            "value": _mean(tasks),
            "tasks": tasks,
            "reused": reused,
            "seconds": _seconds(began, merged),
        }

    def _in_folder(self, params: Mapping[str, Any], measure: FolderEvaluator) -> tuple[dict[str, Any], float]:
        plan = make_plan(with_options(self._recipe, params), threads=self._threads)
        with tempfile.TemporaryDirectory(prefix="merganser-trial-") as folder:
            out = save(plan, Path(folder) / "model", device=self._device).out
            self._folders += 1
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

    def _labels(self) -> int | None:
        if not isinstance(self._measure, Evaluator):
            return None
        labelled = {task.name for task in self._measure.tasks.tasks if task.kind != "perplexity"}
        return sum(len(items) for name, items in self._digests.items() if name in labelled)

    def _finish(self, best: Trial, out: Path | None, overwrite: bool, document: Mapping[str, Any], last: _Last) -> None:
        """Make the best options an ordinary merge: write it, check how far the trial was from it, and report it."""
        plan = make_plan(with_options(self._recipe, best.params), threads=self._threads, max_memory=None)
        if out is not None:
            record = {"tuning": record_of(document, self._digests)}
            last.out = save(plan, out, record=record, overwrite=overwrite, device=self._device).out
        in_folder = isinstance(self._measure, FolderEvaluator)
        final = (
            None if in_folder and (out is not None or self._report is None) else to_memory(plan, device=self._device)
        )
        if in_folder:
            last.check = {"value": best.value, "largest_difference": None}
        elif final is not None:
            trial, _ = self._candidates.make(best.params)
            largest = max((_difference(trial[name], value) for name, value in final.items()), default=0.0)
            value = best.value if largest == 0 else _mean(figures(self._measure(final)))
            last.check = {"value": value, "largest_difference": largest}
        if self._report is not None:
            last.report = self._report.measure(final if out is None else str(out))


@dataclass
class _Last:
    """What came of the best merge after the search, as far as it came."""

    out: Path | None = None
    check: dict[str, Any] | None = None
    report: Evaluation | None = None
    failure: Exception | None = None


def _mean(tasks: Mapping[str, Any]) -> float:
    return math.fsum(task["value"] for task in tasks.values()) / len(tasks)


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


def _seconds(began: float, merged: float) -> dict[str, float]:
    return {"merge": merged - began, "evaluation": time.perf_counter() - merged}


def _based(measure: Any, folder: Path | None) -> Any:
    """An evaluator for state dicts of a merge, whose configuration is that of the merge."""
    return measure.based(folder) if isinstance(measure, Evaluator) else measure
