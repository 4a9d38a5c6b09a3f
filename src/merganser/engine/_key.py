"""The digest of a plan: two runs with the same one write the same bytes, so one can go on where the other stopped."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser._torch import torch
from merganser._version import __version__
from merganser.checkpoint import Checkpoint, Shard, stamp_of
from merganser.engine._names import describe_method
from merganser.engine._plan import Plan
from merganser.engine._tensor import Input, TensorPlan
from merganser.methods import Method

__all__ = ["data_files", "data_of", "plan_key", "statistics_of"]


def plan_key(plan: Plan, shards: Sequence[Shard], run: Mapping[str, Any]) -> str | None:
    """Everything that decides the bytes of an output: tensors, methods, inputs, layout, versions.

    Inputs count by path, size, time of change and inode; their contents are not read. None where an input is in
    memory, because a later process cannot know that it has the same, and where models are solved for before the first
    tensor is written, so that there is nothing to go on with.

    Args:
        plan: the plan.
        shards: how the tensors are laid out in files.
        run: arguments of the run that change the result.

    Complexity: O(models x tensors).
    """
    if data_of(plan):
        return None
    files: dict[str, tuple[int, ...]] = {}
    for checkpoint in plan.checkpoints:
        if not checkpoint.stamps():
            return None
        files |= {str(path.resolve()): stamp for path, stamp in checkpoint.stamps().items()}
    for source in statistics_of(plan):
        if not isinstance(source, str | os.PathLike):
            return None
        files[str(Path(source).resolve())] = stamp_of(Path(source))
    numbers = {id(checkpoint): index for index, checkpoint in enumerate(plan.checkpoints)}
    methods: dict[Method, str] = {}
    data = {
        "versions": [__version__, torch.__version__],
        "files": files,
        "seed": plan.recipe.seed,
        "start": None if plan.start is None else describe_method(plan.start),
        "outputs": plan.outputs,
        "run": {key: str(value) for key, value in run.items()},
        "shards": [(shard.file, shard.nbytes) for shard in shards],
        "tensors": [_row(tensor, numbers, methods) for tensor in plan.tensors],
    }
    return hashlib.sha256(json.dumps(data, default=repr).encode()).hexdigest()


def statistics_of(plan: Plan) -> list[Any]:
    """The statistics that the recipe names, each once, those of the base first."""
    recipe = plan.recipe
    found = [recipe.base_statistics, *(source.statistics for part in recipe.slices for source in part.sources)]
    return _distinct(found)


def data_of(plan: Plan) -> list[Any]:
    """The data that the recipe names, each once."""
    return _distinct(source.data for part in plan.recipe.slices for source in part.sources)


def data_files(path: Path) -> list[Path]:
    """A data file, or all files of a saved data set."""
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def _distinct(found: Iterable[Any]) -> list[Any]:
    unique: list[Any] = []
    for given in found:
        if given is not None and not any(given is other or _same_path(given, other) for other in unique):
            unique.append(given)
    return unique


def _same_path(one: Any, other: Any) -> bool:
    both = isinstance(one, str | os.PathLike) and isinstance(other, str | os.PathLike)
    return both and Path(one) == Path(other)


def _row(tensor: TensorPlan, numbers: Mapping[int, int], methods: dict[Method, str]) -> list[Any]:
    def place(source: Input | None) -> Any:
        return None if source is None else (_number(numbers, source.checkpoint), source.name)

    if tensor.method is not None and tensor.method not in methods:
        methods[tensor.method] = json.dumps(describe_method(tensor.method), default=repr)
    return [
        tensor.spec.name,
        tensor.spec.shape,
        str(tensor.spec.dtype),
        str(tensor.dtype),
        None if tensor.method is None else methods[tensor.method],
        tensor.weights,
        [place(source) for source in (*tensor.inputs, tensor.base, tensor.init)],
        {option: [place(source) for source in group] for option, group in tensor.options.items()},
        [entry.name for entry in tensor.statistics],
    ]


def _number(numbers: Mapping[int, int], checkpoint: Checkpoint) -> int:
    return numbers.get(id(checkpoint), -1)
