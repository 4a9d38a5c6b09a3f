"""The rows of a suite's table: made one after the other, each with its scores and its cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from merganser.engine import in_memory, make_plan, merge, resolve
from merganser.errors import MerganserError, Place, RecipeError
from merganser.evaluation._cost import Cost, Meter
from merganser.evaluation._outcomes import Outcomes
from merganser.evaluation._space import space_of
from merganser.evaluation._tuned import described
from merganser.evaluation._tuning import Tuning, tune_recipe
from merganser.evaluation.bench._baselines import Found, composed, distilled, ensemble, found_of, held_out
from merganser.evaluation.bench._expert import Expert
from merganser.evaluation.bench._experts import make_multitask
from merganser.evaluation.bench._flops import FlopCounter
from merganser.evaluation.bench._lab import Lab
from merganser.evaluation.bench._schema import MethodEntry
from merganser.evaluation.bench._statistics import statistics_of
from merganser.methods import create_method
from merganser.methods._sequential import Sequential
from merganser.methods.learned_soup import LearnedSoup
from merganser.recipe import Recipe, simple_recipe
from merganser.statistics import TABLES
from merganser.statistics._settings import parse_kinds

__all__ = [
    "Measured",
    "baseline_row",
    "chooses",
    "collected",
    "merge_row",
    "moments_of",
    "needs_statistics",
    "walks",
]

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Measured:
    """The statistics files of some experts, and what collecting them took."""

    files: tuple[Path, ...]
    cost: Cost


def walks(entry: MethodEntry) -> bool:
    """Whether a method merges layer by layer, on the inputs of the statistics."""
    return isinstance(create_method(entry.method, entry.options), Sequential)


def needs_statistics(entry: MethodEntry, models: int) -> bool:
    """Whether a method reads statistics that are collected."""
    method = create_method(entry.method, entry.options)
    if isinstance(method, Sequential):
        return method.curved
    return not entry.reads_moments and bool(method.requires(models) & set(TABLES))


def chooses(entry: MethodEntry, models: int) -> bool:
    """Whether a row looks at labels: a search, or a method that tries merges itself."""
    return bool(entry.search) or "evaluator" in create_method(entry.method, entry.options).requires(models)


def collected(lab: Lab, expert: Expert) -> dict[str, Any]:
    """Collect an expert's statistics: the file's name and the cost, as plain data."""
    with Meter() as meter, FlopCounter() as counter:
        file = statistics_of(lab, expert)
    labels = lab.settings.splits.statistics if lab.settings.statistics.estimator == "empirical" else 0
    cost = dataclasses.replace(meter.cost, bytes=file.stat().st_size, flops=counter.total, labels=labels)
    return {"file": file.name, "cost": dataclasses.asdict(cost)}


def moments_of(expert: Expert) -> Measured:
    """What an expert's optimizer has left; it costs nothing.

    Raises:
        RecipeError: E0308, the expert was not trained here.
    """
    if expert.moments is None:
        raise RecipeError(
            "E0308",
            "`squisher` needs the state of the optimizers, and the expert was not trained by this suite",
            places=Place(file=str(expert.model), key=expert.task),
            fix="leave the row out",
        )
    return Measured((expert.moments,), Cost())


def merge_row(
    lab: Lab, entry: MethodEntry, experts: Sequence[Expert], measured: Measured, seed: int, *, tuned: bool = True
) -> dict[str, Any]:
    """A merge: its options, scores on held-in and held-out tasks, and cost, as plain data."""
    _check_kinds(lab, entry, len(experts))
    if walks(entry):
        return _walked_row(lab, entry, experts, measured, seed)
    recipe = _recipe(lab, entry, experts, measured, seed)
    costs = {"statistics": measured.cost, "merge": Cost(), "tuning": Cost()}
    judge = lab.judge(experts)
    options, search = dict(entry.options), None
    if entry.search and tuned:
        space = space_of(entry.search, recipe)
        with Meter() as meter:
            # the best merge is made below, the ordinary way
            found = tune_recipe(
                recipe, judge, space, sampler="grid", trials=entry.trials, check=False, seed=seed, threads=1
            )
        costs["tuning"] = dataclasses.replace(meter.cost, labels=found.labels or 0)
        options, search = {**options, **_best(found)}, _searched(found)
        recipe = _recipe(lab, entry.model_copy(update={"options": options}), experts, measured, seed)
    elif "evaluator" in recipe.constant_method().requires(len(experts)):
        method = recipe.constant_method()
        measure: Any = judge
        if isinstance(method, LearnedSoup):
            measure = lab.losses(experts, score=not method.minimize)
        with Meter() as meter:
            recipe, _ = resolve(recipe, measure, threads=1)
        labels = sum(len(items) for items in judge.digests().values())
        costs["tuning"] = dataclasses.replace(meter.cost, labels=labels)
    with Meter() as meter:
        plan = make_plan(recipe, threads=1, max_memory=None)  # which may measure the machine's speed: not counted
        with FlopCounter() as counter:
            states, _ = in_memory(plan)
    costs["merge"] = _merge_cost(meter, counter, states)
    if recipe.constant_method().outputs(len(experts)) == tuple(range(len(experts))):
        own = [lab.whole(state, experts) for state in states]
        scores = _parts(_each_its_own(lab, own, experts))
    else:
        scores = _scored(lab, lab.whole(states[0], experts), experts, everything=tuned)
    return {**scores, "options": options, "search": search, "cost": _plain(costs)}


def _walked_row(
    lab: Lab, entry: MethodEntry, experts: Sequence[Expert], measured: Measured, seed: int
) -> dict[str, Any]:
    """A merge layer by layer. Its inputs are those of the statistics, without labels.

    Raises:
        RecipeError: E0308, the suite wants what such a merge cannot do.
    """
    keys = lab.settings.merge
    trained = set(lab.settings.training.only)  # all other weights are those of the base in every expert
    patterns = keys.exclude or (keys.only and set(keys.only) != trained)
    refused = "(IA)^3 vectors" if experts[0].vectors else "`merge: only` and `exclude`" if patterns else ""
    if refused:
        raise RecipeError(
            "E0308",
            f"`{entry.method}` merges whole models layer by layer: it cannot heed {refused}",
            places=Place(key="methods"),
            fix="leave the row out",
        )
    modules = [lab.encoder(e.model, e.head) for e in experts]
    base = lab.encoder(str(lab.base), experts[0].head)
    data = [[inputs for inputs, _ in lab.examples(e.task, "statistics", e.head).all(16)] for e in experts]
    files = [str(file) for file in measured.files] or None
    with Meter() as meter, FlopCounter() as counter:
        found = merge(modules, base=base, method=entry.method, statistics=files, data=data, seed=seed, **entry.options)
    state = {name: found[name] for name in lab.names if name in found}
    costs = {"statistics": measured.cost, "merge": _merge_cost(meter, counter, [state]), "tuning": Cost()}
    return {**_scored(lab, state, experts), "options": dict(entry.options), "search": None, "cost": _plain(costs)}


def _merge_cost(meter: Meter, counter: FlopCounter, states: Sequence[State]) -> Cost:
    """What a merge took, and the bytes of what it made."""
    written = sum(t.numel() * t.element_size() for state in states for t in state.values())
    return dataclasses.replace(meter.cost, bytes=written, flops=counter.total)


def _check_kinds(lab: Lab, entry: MethodEntry, models: int) -> None:
    """Refuse a method whose statistics the suite does not collect: without them it would average.

    Raises:
        RecipeError: E0308.
    """
    if not needs_statistics(entry, models):
        return
    wanted = create_method(entry.method, entry.options).requires(models) & set(TABLES)
    missing = sorted(wanted - parse_kinds(lab.settings.statistics.kinds))
    if missing:
        raise RecipeError(
            "E0308",
            f"`{entry.method}` needs statistics that the suite does not collect: {', '.join(missing)}",
            places=Place(key="statistics"),
            fix="name them under `statistics: {kinds: [...]}`",
        )


def baseline_row(lab: Lab, name: str, experts: Sequence[Expert], seed: int) -> dict[str, Any]:
    """What is no merge: its scores, and the cost of making it (as that of a merge), as plain data."""
    with Meter() as meter:
        if name == "experts":
            row = _parts(_each_its_own(lab, [str(e.model) for e in experts], experts))
        elif name == "ensemble":
            row = _parts(Found(ensemble(lab, experts)))
        elif name == "base":
            row = _scored(lab, str(lab.base), experts)
        elif name == "multitask":
            heads = {e.task: e for e in make_multitask(lab, seed)}
            trained = [heads[e.task] for e in experts]
            row = _scored(lab, str(trained[0].model), trained)
        else:
            row = _scored(lab, distilled(lab, experts, seed), experts)
    cost = Cost() if name in ("base", "experts", "ensemble") else meter.cost
    return {
        **row,
        "options": {},
        "search": None,
        "cost": _plain({"statistics": Cost(), "merge": cost, "tuning": Cost()}),
    }


def _recipe(lab: Lab, entry: MethodEntry, experts: Sequence[Expert], measured: Measured, seed: int) -> Recipe:
    keys = lab.settings.merge
    return simple_recipe(
        [str(e.merged) for e in experts],
        base=str(lab.origin(experts)),
        method=entry.method,
        statistics=[str(file) for file in measured.files] or None,
        options=entry.options,
        init=entry.init,
        seed=seed,
        exclude=tuple(keys.exclude),
        only=tuple(keys.only),
        heads=keys.heads,
    )


def _best(found: Tuning) -> Mapping[str, Any]:
    if found.best is None:
        error = found.trials[0].error or {}
        raise RuntimeError(f"every trial failed: {error.get('message')}")
    return found.best.params


def _searched(found: Tuning) -> dict[str, Any]:
    trials = [{"params": dict(t.params), "value": t.value, "tasks": dict(t.tasks)} for t in found.trials]
    return {"trials": trials, "front": list(found.front)}


def _scored(lab: Lab, model: State | str, experts: Sequence[Expert], *, everything: bool = True) -> dict[str, Any]:
    """What a model scores on the tasks of some experts and, of `everything`, on the held-out ones."""
    found = found_of(lab.evaluator("test", experts).measure(model))
    return _parts(
        found, held_out=held_out(lab, model) if everything else Found(), composition=composed(lab, model, experts)
    )


def _each_its_own(lab: Lab, models: Sequence[State | str], experts: Sequence[Expert]) -> Found:
    """What each model scores on the task of the expert at its place."""
    found = Found()
    for expert, model in zip(experts, models, strict=True):
        try:
            found.take(found_of(lab.evaluator("test", [expert]).measure(model)))
        except MerganserError as error:
            found.errors[expert.task] = error
    return found


def _parts(found: Found, **others: Found) -> dict[str, Any]:
    """Scores as plain data, with the errors and warnings of all tasks."""
    parts = [found, *others.values()]
    return {
        "scores": _summaries(found.outcomes),
        **{name: _summaries(other.outcomes) for name, other in others.items()},
        "errors": {name: described(error) for part in parts for name, error in part.errors.items()},
        "warnings": {name: list(texts) for part in parts for name, texts in part.warnings.items()},
    }


def _summaries(found: Mapping[str, Outcomes]) -> dict[str, Any]:
    return {name: {**outcomes.summary(), "variance": outcomes.variance} for name, outcomes in found.items()}


def _plain(costs: Mapping[str, Cost]) -> dict[str, Any]:
    return {part: dataclasses.asdict(cost) for part, cost in costs.items()}
