"""Merging layer by layer in memory: modules in, a state dict out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merganser._torch import torch
from merganser.engine._evidence import open_evidence
from merganser.engine._merge import to_memory
from merganser.engine._plan import make_plan
from merganser.engine._sequential import solve_layers
from merganser.errors import Place, RecipeError, UsageError
from merganser.methods import Sequential
from merganser.methods.average import Average
from merganser.recipe import parse_dtype, simple_recipe

__all__ = ["merge_modules"]


def merge_modules(
    models: Sequence[Any],
    data: Sequence[Iterable[Any]],
    method: Sequential,
    *,
    base: Any,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    **unused: Any,
) -> dict[str, torch.Tensor]:
    """Merge modules by a method that needs the inputs of the merged layers.

    Args:
        models: modules of one architecture; they are not changed.
        data: for each of them batches of its task (no labels are needed).
        method: how.
        base: the module that they were fine-tuned from; a copy of it becomes the merged model.
        weights: one per model.
        statistics: with K-FAC output factors, one per model, for methods that need them.
        dtype: of the result; that of the models if None.
        seed: of sampled labels.
        **unused: further arguments of `merge`, which must be None.

    Raises:
        UsageError: E0201, something is no module, or not one set of data is given per model.
        RecipeError: the weights or the method do not fit; E0305, an argument that is of no use.
        InputError: the data or the statistics do not fit, or a layer is never reached.
        NumericError: E0601, a solution is not finite.
    """
    _refuse(method, unused)
    for name, module in (*((f"models[{i}]", model) for i, model in enumerate(models)), ("base", base)):
        if not isinstance(module, torch.nn.Module):
            raise UsageError(
                "E0201",
                f"`{method.name}` runs the models, so all are modules, or all are paths of folders; {name} is of type "
                f"{type(module).__name__}",
                places=Place(key=name),
                fix="load it, for example with transformers' from_pretrained",
            )
    if len(data) != len(models):
        raise UsageError(
            "E0201",
            f"`data` is a list with the batches of every model's task: {len(models)} are needed",
            places=Place(key="data"),
        )
    if any(isinstance(given, str | os.PathLike) for given in data):
        raise UsageError(
            "E0201",
            "a data file needs a model folder, for its tokenizer",
            places=Place(key="data"),
            fix="pass batches with the modules, or the paths of the models with the files",
        )
    if statistics is not None and not method.curved:
        raise RecipeError("E0305", f"`{method.name}` does not use statistics", places=Place(key="statistics"))
    if statistics is not None and len(statistics) != len(models):
        raise RecipeError(
            "E0308",
            f"{len(statistics)} statistics are given for {len(models)} models",
            places=Place(key="statistics"),
        )
    kind = parse_dtype(dtype)
    own = tuple(weights) if weights is not None else (1.0,) * len(models)
    method.check(len(models), own)
    solved = solve_layers(
        models,
        data,
        method,
        base=base,
        mean=to_memory(make_plan(simple_recipe(models, base=base, method=Average(), weights=own, seed=seed))),
        weights=own,
        evidence=[open_evidence(s, f"statistics[{i}]") for i, s in enumerate(statistics or ())],
        seed=seed,
    )
    return {
        name: tensor.to(kind if kind is not None and tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in solved.tensors.items()
    }


def _refuse(method: Sequential, given: Mapping[str, Any]) -> None:
    """Refuse arguments that a merge of modules has no use for.

    Raises:
        RecipeError: E0305.
    """
    for name, value in given.items():
        if value is not None:
            raise RecipeError(
                "E0305",
                f"`{method.name}` does not use `{name}` with modules",
                places=Place(key=name),
                fix="name the models by their paths, or save a module with the returned state dict"
                if name == "out"
                else "",
            )
