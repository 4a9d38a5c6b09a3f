"""What a merge layer by layer asks of a recipe: folders of whole models, one rule for all, data of every task."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

from merganser.blocks import Role
from merganser.engine._tensor import TensorPlan
from merganser.errors import InputError, Place, RecipeError, ResourceError, UsageError
from merganser.methods import Method, Sequential, find_method
from merganser.methods._matching import matrix_elements
from merganser.recipe import Recipe
from merganser.statistics import TaskData, open_model, open_task

__all__ = ["check_folders", "check_recipe", "explained", "has_data", "is_layerwise", "left_of", "loaded_bytes", "tasks"]

_IN_PYTHON = (
    "load the models in Python, for example without their heads, and pass modules and batches to merganser.merge"
)
_UNLIKE = ("E0405", "E0406", "E0407", "E0410", "E0411", "E0413")
_LEAST = 100_000_000
"""Bytes that a merge needs beside what is loaded."""


def is_layerwise(recipe: Recipe) -> bool:
    """Whether the recipe's method merges layer by layer."""
    method = recipe.method
    return issubclass(find_method(method) if isinstance(method, str) else type(method), Sequential)


def has_data(recipe: Recipe) -> bool:
    """Whether the data of a task are given."""
    return any(source.data is not None for part in recipe.slices for source in part.sources)


def check_recipe(recipe: Recipe, method: Method) -> None:
    """Refuse what a merge layer by layer cannot heed, and tasks without data.

    Raises:
        RecipeError: E0305 (a key that is of no use), E0310 (slices), E0308 (no data, or a method around another).
        UsageError: E0201, a model is no path.
    """
    name = method.name
    sources = [source for part in recipe.slices for source in part.sources]
    if not isinstance(method, Sequential):
        raise RecipeError(
            "E0308",
            f"`{name}` is made around a method that merges layer by layer, which can only stand alone",
            places=recipe.place("merge_method"),
        )
    if any(source.data is None for source in sources):
        raise RecipeError(
            "E0308",
            f"`{name}` merges layer by layer, each on inputs of the tasks: it needs data of every task",
            places=recipe.place("merge_method"),
            fix="give a file per model: --data of `merge` and `plan`, `data:` in a recipe, data= in Python",
        )
    if len(recipe.slices) > 1 or any(source.layers is not None for source in sources):
        raise RecipeError("E0310", f"`{name}` merges whole models, not slices", places=recipe.place("slices"))
    for key in ("only", "exclude", "rules"):
        if getattr(recipe, key):
            raise RecipeError(
                "E0305",
                f"`{name}` merges whole models: it cannot heed `{key}`",
                places=recipe.place(key),
                fix=_IN_PYTHON,
            )
    if recipe.heads != "merge":
        raise RecipeError(
            "E0305",
            f"`{name}` merges whole models: it cannot heed `heads: {recipe.heads}`",
            places=recipe.place("heads"),
            fix=_IN_PYTHON,
        )
    if not recipe.is_uniform():
        raise RecipeError(
            "E0305", f"`{name}` takes the same options for all tensors: no filter and no gradient over the layers"
        )
    for reference in (recipe.base, *(source.model for source in sources)):
        if not isinstance(reference, str | os.PathLike):
            raise UsageError(
                "E0201",
                f"`{name}` runs the models, so all are modules, or all are paths of folders; one is of type "
                f"{type(reference).__name__}",
            )


@contextlib.contextmanager
def explained(method: type[Method]) -> Iterator[None]:
    """For the time of the block, errors about models that are not alike say what helps in a merge layer by layer."""
    try:
        yield
    except InputError as error:
        if not issubclass(method, Sequential) or error.code not in _UNLIKE:
            raise
        raise InputError(
            error.code,
            error.message,
            places=error.places,
            why=error.why,
            fix=f"use models of one kind, or {_IN_PYTHON}",
        ) from None


def tasks(recipe: Recipe) -> list[TaskData]:
    """The folder and the data of every model, checked; no weight is loaded.

    Raises:
        InputError: a folder or a file is not fit for it.
    """
    base = os.fspath(recipe.base)
    spare = open_model(base).path
    return [open_task(os.fspath(source.model), source.data, spare, base) for source in recipe.slices[0].sources]


def check_folders(recipe: Recipe, tensors: Sequence[TensorPlan]) -> None:
    """Check the folders that are loaded and the data of the tasks, if the merge is layer by layer.

    Raises:
        InputError: one of them is not fit for it; E0419, the models have no loss, which the method needs.
    """
    method = next((tensor.method for tensor in tensors if isinstance(tensor.method, Sequential)), None)
    if method is None:
        return
    for folder in (open_model(os.fspath(recipe.base)), *(task.folder for task in tasks(recipe))):
        if method.curved and folder.task is None and (method.sweeps > 1 or not _has_statistics(recipe)):
            raise InputError(
                "E0419",
                f"`{method.name}` needs the gradients of a loss, and the model has no head with a known one",
                places=Place(file=str(folder.path)),
                fix="name models with their heads, or take output_matching, which needs no loss",
            )


def _has_statistics(recipe: Recipe) -> bool:
    return all(source.statistics is not None for part in recipe.slices for source in part.sources)


def left_of(budget: int, loaded: int) -> int:
    """What of a budget is left beside what is loaded.

    Raises:
        ResourceError: E0802.
    """
    if loaded and budget - loaded < _LEAST:
        raise ResourceError(
            "E0802",
            f"the models are loaded whole, and with what is measured take {(loaded + _LEAST) / 1e6:,.0f} MB above the "
            f"interpreter; the budget is {budget / 1e6:,.0f} MB",
            fix="raise --max-memory (in Python max_memory=), or leave it out",
        )
    return budget - loaded


def loaded_bytes(recipe: Recipe, tensors: Sequence[TensorPlan]) -> int:
    """Memory for what is loaded and measured, beside activations; 0 for a merge that is not layer by layer."""
    total, measured = 0, not _has_statistics(recipe)
    for tensor in tensors:
        method, spec = tensor.method, tensor.spec
        if isinstance(method, Sequential):
            # the models, the base, the merged model, the mean and the result
            elements = spec.numel * (len(tensor.inputs) + 4)
            if method.curved and measured and len(spec.shape) > 1 and spec.role is not Role.EMBEDDING:
                elements += matrix_elements(spec, len(tensor.inputs), outputs=True)
            total += elements * tensor.dtype.itemsize
    return total
