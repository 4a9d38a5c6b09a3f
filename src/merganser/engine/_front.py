"""`map_front`: the trade-offs between tasks that merges of some models offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from merganser._torch import torch
from merganser.engine._search import Evaluator, start
from merganser.methods.map import Map
from merganser.pareto import Front
from merganser.recipe import simple_recipe

__all__ = ["map_front"]


def map_front(
    models: Sequence[Any],
    *,
    base: Any,
    evaluator: Evaluator,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    **options: Any,
) -> Front:
    """The Pareto front of ``base + sum_i c_i (model_i - base)`` over the tasks of an evaluator.

        front = mg.map_front([a, b], base=base, evaluator=accuracies, activation="sigmoid")
        front.plot("front.png")
        best = front.coefficients[front.pick([0.7, 0.3])]
        merged = mg.merge([a, b], base=base, method="task_arithmetic", weights=best)

    Args:
        models: paths, state dicts, modules or checkpoints.
        base: the model that they were fine-tuned from.
        evaluator: a function of a merged state dict that returns a number per task, more being better.
        weights: factors of the task vectors; 1 each if None.
        seed: of the points that are measured, and of NSGA-III.
        device: where merges are computed.
        **options: those of the method `map`.

    Raises:
        MerganserError: as for `merge`.

    Complexity: one merge and evaluation per measured point, by default (models + 1)(models + 2).
    """
    recipe = simple_recipe(models, base=base, method=Map.name, weights=weights, options=options, seed=seed)
    method = recipe.constant_method()
    assert isinstance(method, Map)
    return method.explore(start(recipe, method, evaluator, device=device))
