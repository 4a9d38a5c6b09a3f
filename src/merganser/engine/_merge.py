"""`merge`: models in, a model out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from merganser._torch import torch
from merganser.engine._commit import FolderOutput, check_output
from merganser.engine._executor import Executor, LocalThreads
from merganser.engine._plan import DEFAULT_MEMORY, Plan, make_plan
from merganser.engine._stream import Sink, Stream
from merganser.errors import RecipeError, escape
from merganser.methods import Method
from merganser.recipe import simple_recipe

__all__ = ["DEFAULT_SHARD", "Outcome", "execute", "merge", "save", "to_memory"]

DEFAULT_SHARD = 5_000_000_000


@dataclass(frozen=True)
class Outcome:
    """What a merge did.

    Attributes:
        out: the folder or file that was written.
        seconds: wall time.
        warnings: those of the plan, and what was noticed while merging.
    """

    out: Path
    seconds: float
    warnings: tuple[str, ...]


class _MemorySink:
    """Collects a state dict."""

    def __init__(self, plan: Plan) -> None:
        self.tensors = {t.spec.name: torch.empty(t.spec.shape, dtype=t.spec.dtype) for t in plan.tensors}

    def write(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Take consecutive elements."""
        self.tensors[name].view(-1)[start : start + piece.numel()].copy_(piece)


def execute(
    plan: Plan,
    sink: Sink,
    *,
    device: str | torch.device | None = None,
    allow_nonfinite: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Carry out a plan.

    Args:
        plan: what to do.
        sink: where the merged elements go.
        device: where the arithmetic happens; the CPU if None.
        allow_nonfinite: take NaN and infinite values as they are.
        executor: runs the blocks; by default the plan's number of threads.
        progress: called from any thread with the number of bytes just read and the tensor's name.

    Returns:
        Warnings about what was noticed while reading.

    Raises:
        NumericError: a value that is not finite, in an input or in the result.
        InputError: an input changed, or tied tensors differ.
    """
    executor = executor or LocalThreads(plan.threads)
    stream = Stream(
        executor,
        plan.block_elements,
        device=torch.device(device if device is not None else "cpu"),
        check_finite=not allow_nonfinite,
        counters=plan.counters,
        progress=progress,
    )
    warnings = []
    for second, owner in stream.differing(plan.ties):
        warnings.append(
            f"`{escape(second.name)}` of {second.checkpoint.label} is tied to `{escape(owner.name)}` but holds other "
            "values; they are ignored, as loading the model ignores them"
        )
    copies = plan.copies()
    buffers = [(t.inputs[0], other) for t in copies for other in t.inputs[1:]]
    for first, other in stream.differing(buffers):
        warnings.append(
            f"the buffer `{escape(first.name)}` of {other.checkpoint.label} differs from that of "
            f"{first.checkpoint.label}, which is used"
        )
    stream.copy(copies, sink)
    for method, tensors in plan.groups():
        stream.merge(method, tensors, plan.recipe.seed, sink)
    return warnings


def save(
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    shard_bytes: int = DEFAULT_SHARD,
    overwrite: bool = False,
    **run: Any,
) -> Outcome:
    """Carry out a plan into a folder (or one ``.safetensors`` file), which appears only when it is complete.

    Args:
        plan: what to do.
        out: the folder, which must not exist.
        shard_bytes: bytes per weights file.
        overwrite: replace a folder that an earlier merge made.
        **run: as for `execute`.

    Raises:
        EnvironmentFault: the output exists or cannot be written.
        ResourceError: too little disk space.
    """
    target = Path(out)
    started = time.monotonic()
    check_output(target, plan, overwrite=overwrite)
    with FolderOutput(target, plan, shard_bytes=shard_bytes) as output:
        found = execute(plan, output, **run)
        seconds = time.monotonic() - started
        found += output.commit([*plan.warnings, *found], seconds)
    return Outcome(target, time.monotonic() - started, (*plan.warnings, *found))


@overload
def merge(
    models: Sequence[Any],
    *,
    base: Any = ...,
    method: str | Method,
    weights: Sequence[float] | None = ...,
    statistics: Any = ...,
    init: Any = ...,
    dtype: str | torch.dtype | None = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    out: None = ...,
    **options: Any,
) -> dict[str, torch.Tensor]: ...


@overload
def merge(
    models: Sequence[Any],
    *,
    base: Any = ...,
    method: str | Method,
    weights: Sequence[float] | None = ...,
    statistics: Any = ...,
    init: Any = ...,
    dtype: str | torch.dtype | None = ...,
    seed: int = ...,
    device: str | torch.device | None = ...,
    out: str | os.PathLike[str],
    **options: Any,
) -> Path: ...


def merge(
    models: Sequence[Any],
    *,
    base: Any = None,
    method: str | Method,
    weights: Sequence[float] | None = None,
    statistics: Any = None,
    init: Any = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    out: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, torch.Tensor] | Path:
    """Merge models.

    Args:
        models: paths, state dicts, modules or checkpoints, in any mix. They are never modified.
        base: the model that they were fine-tuned from, for methods that need it.
        method: a registry name (`merganser methods` lists them), or a method object.
        weights: one number per model; 1 each if None. Averages normalise them, sums of task vectors do not.
        statistics: for methods that need statistics.
        init: for iterative methods.
        dtype: type of the result; that of the inputs if None (the wider, where they differ).
        seed: of random masks.
        device: where the arithmetic happens; the CPU if None.
        out: a folder to write, which must not exist, or a name that ends in ``.safetensors``. Streams in about
            1 GB of memory, whatever the size of the models.
        **options: options of the method, checked at once.

    Returns:
        The merged state dict, or the path `out`.

    Raises:
        MerganserError: with a code, the place, the cause and a fix.

    Complexity: O(models x elements) per pass; arithmetic in float32 (float64 for float64 inputs), rounded once.
    """
    for name, value in (("statistics", statistics), ("init", init)):
        if value is not None:
            label = method if isinstance(method, str) else method.name
            raise RecipeError("E0305", f"`{label}` does not use `{name}`")
    recipe = simple_recipe(
        models,
        base=base,
        method=method,
        weights=weights,
        options=options,
        dtype=None if dtype is None else str(dtype),
        seed=seed,
    )
    plan = make_plan(recipe, max_memory=DEFAULT_MEMORY)
    if out is not None:
        return save(plan, out, device=device).out
    return to_memory(plan, device=device)


def to_memory(plan: Plan, **run: Any) -> dict[str, torch.Tensor]:
    """Carry out a plan into a state dict; tied names share one tensor."""
    sink = _MemorySink(plan)
    execute(plan, sink, **run)
    result = dict(sink.tensors)
    for alias, owner in plan.aliases.items():
        result[alias] = result[owner]
    order = {name: i for i, name in enumerate(plan.donor.specs())}
    return dict(sorted(result.items(), key=lambda item: order.get(item[0], len(order))))
