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
from merganser.engine._layerwise import is_layerwise
from merganser.engine._merge import in_memory, save
from merganser.engine._modules import merge_modules
from merganser.engine._onto import onto_recipe
from merganser.engine._plan import DEFAULT_MEMORY, make_plan
from merganser.engine._search import Evaluator, resolve
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
            otherwise as much as the largest tensor needs; layer by layer, as much as the models take.
        data: for methods that merge layer by layer (`regmean_pp`, `output_matching`, `sequential_mats`): for every
            model the batches of its task, or a file, as for `collect`. The models and the base are the paths of model
            folders, which are loaded; or they are modules, with batches, and a state dict is returned.
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
    if isinstance(chosen, Sequential) and data is not None and not _are_paths(models, base):
        return merge_modules(
            models,
            data,
            chosen,
            base=base,
            weights=weights,
            statistics=statistics,
            dtype=keys["dtype"],
            seed=seed,
            init=init,
            device=device,
            out=out,
            evaluator=evaluator,
            onto=onto,
        )
    if onto is not None:
        for name, given in (("statistics", statistics), ("data", data)):
            if given is not None:
                raise RecipeError("E0305", f"{name} are of no use in a merge onto another", places=Place(key=name))
        recipe = onto_recipe(models, onto, **keys)
    else:
        recipe = simple_recipe(models, statistics=statistics, data=data, **keys)
    recipe, record = resolve(recipe, evaluator, device=device, max_memory=max_memory)
    if max_memory is None and out is not None and not is_layerwise(recipe):
        max_memory = DEFAULT_MEMORY
    plan = make_plan(recipe, max_memory=max_memory)
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


def _are_paths(models: Any, base: Any) -> bool:
    """Whether models are named by their paths, so that they are loaded where they have to run."""
    named = [base] if base is not None else []
    return isinstance(models, Sequence) and all(isinstance(model, str | os.PathLike) for model in (*named, *models))
