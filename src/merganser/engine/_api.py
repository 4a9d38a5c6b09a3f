"""`merge`: models in, a model out."""

from __future__ import annotations

import logging
import numbers
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from merganser._torch import torch
from merganser.engine._arguments import check_arguments
from merganser.engine._merge import in_memory, save
from merganser.engine._onto import onto_recipe
from merganser.engine._plan import DEFAULT_MEMORY, make_plan
from merganser.engine._search import Evaluator, resolve
from merganser.engine._sequential import merge_sequentially
from merganser.errors import Place, RecipeError
from merganser.methods import Method, Sequential, create_method
from merganser.recipe import simple_recipe

__all__ = ["merge"]

_log = logging.getLogger("merganser")


@overload
def merge(
    models: Sequence[Any],
    *,
    base: Any = ...,
    method: str | Method,
    weights: Sequence[float] | None = ...,
    statistics: Sequence[Any] | None = ...,
    init: Any = ...,
    dtype: str | torch.dtype | None = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    out: None = ...,
    require_convergence: bool = ...,
    evaluator: Evaluator | None = ...,
    onto: str | os.PathLike[str] | None = ...,
    max_memory: int | None = ...,
    data: Sequence[Any] | None = ...,
    **options: Any,
) -> dict[str, torch.Tensor]: ...


@overload
def merge(
    models: Sequence[Any],
    *,
    base: Any = ...,
    method: str | Method,
    weights: Sequence[float] | None = ...,
    statistics: Sequence[Any] | None = ...,
    init: Any = ...,
    dtype: str | torch.dtype | None = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    out: str | os.PathLike[str],
    require_convergence: bool = ...,
    evaluator: Evaluator | None = ...,
    onto: str | os.PathLike[str] | None = ...,
    max_memory: int | None = ...,
    data: Sequence[Any] | None = ...,
    **options: Any,
) -> Path: ...


def merge(
    models: Sequence[Any],
    *,
    base: Any = None,
    method: str | Method,
    weights: Sequence[float] | None = None,
    statistics: Sequence[Any] | None = None,
    init: Any = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | os.PathLike[str] | None = None,
    require_convergence: bool = False,
    evaluator: Evaluator | None = None,
    onto: str | os.PathLike[str] | None = None,
    max_memory: int | None = None,
    data: Sequence[Any] | None = None,
    **options: Any,
) -> Any:
    """Merge models.

    Args:
        models: paths, state dicts, modules or checkpoints, in any mix. They are never modified.
        base: the model that they were fine-tuned from, for methods that need it.
        method: a registry name (`merganser methods` lists them), or a method object.
        weights: one number per model; 1 each if None. Averages normalise them, sums of task vectors do not.
        statistics: one per model (files or `Statistics`), for methods that need them; the base's may come before them.
        init: where iterative methods start: a registry name, a method object, or weights (path or state dict).
        dtype: type of the result; that of the inputs if None (the wider, where they differ).
        seed: of random masks.
        device: where the arithmetic happens; the CPU if None.
        out: a folder to write, which must not exist, or a name that ends in ``.safetensors``. Streams, whatever the
            size of the models.
        require_convergence: whether a system that was not solved to its tolerance is an error, not a warning.
        evaluator: for methods that choose by trying: a function of a merged state dict that returns a number, or one
            per task; more is better.
        onto: the folder of an earlier merge by the same method (`opcm`), to which the models are added; `weights` are
            those of the new models, and the options are the earlier ones if not given.
        max_memory: bytes above the interpreter (and above a result in memory). By default 1 GB with `out`, and
            otherwise as much as the largest tensor needs.
        data: for methods that merge layer by layer (`regmean_pp`, `output_matching`, `sequential_mats`): for every
            model the batches of its task, as for `collect`. The models and the base are modules then.
        **options: options of the method, checked at once.

    Returns:
        The merged state dict, or the path `out`. Methods with several results return a list with one state dict per
        model (`emr`), or a dict of them (`mats` with `keep`, by iteration); in `out` each has a folder of its own.

    Raises:
        MerganserError: with a code, the place, the cause and a fix.

    Complexity: O(models x elements) per pass; arithmetic in float32 (float64 for float64 inputs), rounded once.
    """
    check_arguments(
        weights=weights,
        statistics=statistics,
        seed=seed,
        out=out,
        evaluator=evaluator,
        max_memory=max_memory,
        data=data,
    )
    if weights is not None:
        weights = [_plain(weight) for weight in weights]
    keys: dict[str, Any] = {
        "base": base,
        "method": method,
        "weights": weights,
        "init": init,
        "options": options,
        "dtype": None if dtype is None else str(dtype),
        "seed": int(seed),
    }
    chosen = create_method(method, options) if isinstance(method, str) else method
    if isinstance(chosen, Sequential) and data is not None:
        _refuse_sequential(chosen, init=init, device=device, out=out, evaluator=evaluator, onto=onto)
        return merge_sequentially(
            models, data, chosen, base=base, weights=weights, statistics=statistics, dtype=keys["dtype"], seed=seed
        )
    if data is not None:
        raise RecipeError("E0305", f"`{chosen.name}` does not use data", places=Place(key="data"))
    if onto is not None:
        if statistics is not None:
            raise RecipeError(
                "E0305", "statistics are of no use in a merge onto another", places=Place(key="statistics")
            )
        recipe = onto_recipe(models, onto, **keys)
    else:
        recipe = simple_recipe(models, statistics=statistics, **keys)
    recipe, record = resolve(recipe, evaluator, device=device, max_memory=max_memory)
    plan = make_plan(recipe, max_memory=DEFAULT_MEMORY if max_memory is None and out is not None else max_memory)
    if out is not None:
        outcome = save(plan, out, record=record, device=device, require_convergence=require_convergence)
        for text in outcome.warnings:
            _log.warning(text)
        return outcome.out
    several, findings = in_memory(plan, device=device, require_convergence=require_convergence)
    for text in (*plan.warnings, *findings.warnings):
        _log.warning(text)
    if not plan.outputs:
        return several[0]
    return several if plan.one_per_model else dict(zip(plan.outputs, several, strict=True))


def _plain(weight: Any) -> Any:
    """A number of numpy as one of Python; what is no number is refused with the recipe."""
    return weight if isinstance(weight, bool) or not isinstance(weight, numbers.Real) else float(weight)


def _refuse_sequential(method: Sequential, **given: Any) -> None:
    """Refuse arguments that a merge layer by layer has no use for.

    Raises:
        RecipeError: E0305.
    """
    for name, value in given.items():
        if value is not None:
            raise RecipeError(
                "E0305",
                f"`{method.name}` does not use `{name}`",
                places=Place(key=name),
                fix="load the returned state dict into a module, and save that" if name == "out" else "",
            )
