"""`tune`: the search of a merge's options from Python."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from merganser._torch import torch
from merganser.evaluation._evaluator import Evaluator, evaluator
from merganser.evaluation._space import space_of
from merganser.evaluation._tuning import Tuning, tune_recipe
from merganser.methods import Method
from merganser.recipe import simple_recipe

__all__ = ["tune"]


def tune(
    models: Sequence[Any],
    *,
    method: str | Method,
    search: Mapping[str, Any],
    tasks: Any,
    base: Any = None,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    init: Any = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    sampler: str = "tpe",
    trials: int | None = None,
    objective: str = "mean",
    storage: str | None = None,
    report: Any = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Tuning:
    """Search the options of a merge; one merge serves every scale, and one solve every iteration count.

        found = mg.tune([a, b], base=base, method="task_arithmetic", search={"scale": "0.1:1"}, tasks="validation.yml")
        merged = mg.merge([a, b], base=base, method="task_arithmetic", **found.best.params)

    Args:
        models: as for `merge`, like all that is not named here.
        method: a registry name, or a method object.
        search: by option a list of values, or a range as text: ``"0.1:1"``, ``"0.01:1:log"``.
        tasks: what guides the search: a task file, what it would hold, an `Evaluator`, or a function of a state dict.
        base: the model that they were fine-tuned from.
        weights: one number per model.
        statistics: one per model.
        init: where iterative methods start.
        dtype: type of the result.
        seed: of random masks, and of the sampler.
        device: where to compute.
        sampler: ``grid``, ``tpe`` or ``cmaes``.
        trials: how many; all points of a grid, 20 otherwise.
        objective: ``mean`` over the tasks, or ``pareto``: each for itself.
        storage: URL of a database, to go on where a search was stopped.
        report: tasks on which the best merge is reported; no example may be among those of `tasks`.
        out: a folder for the best merge.
        **options: further options of the method.

    Raises:
        MerganserError: with a code, the place, the cause and a fix.
    """
    keys = {"init": init, "dtype": None if dtype is None else str(dtype), "seed": seed}
    recipe = simple_recipe(
        models, base=base, method=method, weights=weights, statistics=statistics, options=options, **keys
    )
    return tune_recipe(
        recipe,
        _measure(tasks, device),
        space_of(search, recipe),
        sampler=sampler,
        trials=trials,
        objective=objective,
        seed=seed,
        storage=storage,
        report=None if report is None else _measure(report, device),
        out=out,
        device=device,
    )


def _measure(tasks: Any, device: Any) -> Any:
    if isinstance(tasks, Evaluator) or callable(tasks):
        return tasks
    return evaluator(tasks, device=device)
