"""The recipe of a call, where options are the same everywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merganser.errors import Place, RecipeError
from merganser.methods import Method, create_method
from merganser.recipe._recipe import Recipe, Slice, Source
from merganser.recipe._settings import constant

__all__ = ["simple_recipe"]


def simple_recipe(
    models: Sequence[Any],
    *,
    base: Any = None,
    method: str | Method,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    data: Sequence[Any] | None = None,
    options: Mapping[str, Any] | None = None,
    **rest: Any,
) -> Recipe:
    """The recipe of a call: whole models, and options that are the same everywhere.

    Raises:
        RecipeError: unknown method, option or value; as many weights as models are not given.
    """
    if isinstance(models, str | bytes | Mapping) or not isinstance(models, Sequence) or not models:
        raise RecipeError("E0308", "the models are given as a list with at least one model")
    if weights is not None and len(weights) != len(models):
        raise RecipeError("E0307", f"{len(weights)} weights are given for {len(models)} models")
    if statistics is not None and len(statistics) == len(models) + 1:
        rest["base_statistics"], statistics = statistics[0], statistics[1:]
    if statistics is not None and len(statistics) != len(models):
        raise RecipeError("E0308", f"{len(statistics)} statistics are given for {len(models)} models")
    if data is not None and len(data) != len(models):
        raise RecipeError(
            "E0308",
            f"{len(models)} models need the data of as many tasks; those of {len(data)} are given",
            places=Place(key="data"),
            fix="give the data of every model's task, in the order of the models",
        )
    if isinstance(method, str):
        create_method(method, options or {})
    elif options:
        raise RecipeError("E0305", f"options {sorted(options)} are given beside a method that has its own")
    sources = tuple(
        Source(
            model,
            parameters=constant({"weight": weights[i]}) if weights is not None else {},
            statistics=None if statistics is None else statistics[i],
            data=None if data is None else data[i],
        )
        for i, model in enumerate(models)
    )
    return Recipe((Slice(sources),), method, base=base, parameters=constant(options or {}), **rest)
