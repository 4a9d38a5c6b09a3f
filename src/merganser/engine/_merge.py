"""`merge`: models in, a model out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from merganser._torch import torch
from merganser.engine._commit import FolderOutput, check_output
from merganser.engine._executor import Executor, LocalThreads
from merganser.engine._plan import DEFAULT_MEMORY, Plan, make_plan
from merganser.engine._stream import Sink, Stream
from merganser.errors import EnvironmentFault, escape
from merganser.methods import Method
from merganser.recipe import simple_recipe

__all__ = ["DEFAULT_SHARD", "Outcome", "all_to_memory", "execute", "merge", "save", "to_memory"]

DEFAULT_SHARD = 5_000_000_000


@dataclass(frozen=True)
class Outcome:
    """What a merge did.

    Attributes:
        out: the folder or file that was written.
        seconds: wall time.
        warnings: those of the plan, and what was noticed while merging.
        report: the figures that the method reported, by tensor.
    """

    out: Path
    seconds: float
    warnings: tuple[str, ...]
    report: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Findings:
    """What was noticed while a plan was carried out.

    Attributes:
        warnings: about the inputs.
        report: the figures that the method reported, by tensor.
    """

    warnings: list[str]
    report: dict[str, dict[str, Any]]


class _MemorySink:
    """Collects state dicts, one for each output of the plan."""

    def __init__(self, plan: Plan) -> None:
        specs = [tensor.spec for tensor in plan.tensors]
        self.outputs = [
            {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs} for _ in plan.outputs or (0,)
        ]

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The first output."""
        return self.outputs[0]

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Take consecutive elements."""
        for tensors in self.outputs if output is None else (self.outputs[output],):
            tensors[name].view(-1)[start : start + piece.numel()].copy_(piece)


def execute(
    plan: Plan,
    sink: Sink,
    *,
    device: str | torch.device | None = None,
    allow_nonfinite: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Findings:
    """Carry out a plan.

    Args:
        plan: what to do.
        sink: where the merged elements go.
        device: where the arithmetic happens; the CPU if None.
        allow_nonfinite: take NaN and infinite values as they are.
        executor: runs the blocks; by default the plan's number of threads.
        progress: called from any thread with the number of bytes just read and the tensor's name.

    Returns:
        Warnings about what was noticed while reading, and the method's report.

    Raises:
        NumericError: a value that is not finite, in an input or in the result.
        InputError: an input changed while it was read.
    """
    executor = executor or LocalThreads(plan.threads)
    stream = Stream(
        executor,
        plan.block_elements,
        device=_device(device),
        check_finite=not allow_nonfinite,
        counters=plan.counters,
        budget=plan.max_memory,
        progress=progress,
    )
    try:
        return _run(plan, stream, sink)
    finally:
        for checkpoint in plan.checkpoints:
            checkpoint.close()


def _run(plan: Plan, stream: Stream, sink: Sink) -> Findings:
    """Copies, then every group of merged tensors, then a look whether the inputs are still what they were."""
    warnings: list[str] = []
    reports: dict[str, dict[str, Any]] = {}
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
        start = plan.start if method.initial() is not None else None
        reports.update(stream.merge(method, tensors, plan.recipe.seed, sink, init=start))
    for checkpoint in plan.checkpoints:
        checkpoint.check_unchanged()
    return Findings(warnings, reports)


def _device(device: str | torch.device | None) -> torch.device:
    """A device that exists.

    Raises:
        EnvironmentFault: E0706.
    """
    try:
        found = torch.device(device if device is not None else "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentFault(
            "E0706", f"the device `{device}` cannot be used", why=str(error).splitlines()[0], fix="use cpu"
        ) from None
    return found


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
    with FolderOutput(target, plan, shard_bytes=shard_bytes, overwrite=overwrite) as output:
        found = execute(plan, output, **run)
        seconds = time.monotonic() - started
        warnings = [*plan.warnings, *found.warnings]
        warnings += output.commit(warnings, seconds)
    return Outcome(target, time.monotonic() - started, tuple(warnings), found.report)


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
        out: a folder to write, which must not exist, or a name that ends in ``.safetensors``. Streams in about
            1 GB of memory, whatever the size of the models.
        **options: options of the method, checked at once.

    Returns:
        The merged state dict, or the path `out`. Methods with several results return a list with one state dict per
        model (`emr`), or a dict of them (`mats` with `keep`, by iteration); in `out` each has a folder of its own.

    Raises:
        MerganserError: with a code, the place, the cause and a fix.

    Complexity: O(models x elements) per pass; arithmetic in float32 (float64 for float64 inputs), rounded once.
    """
    recipe = simple_recipe(
        models,
        base=base,
        method=method,
        weights=weights,
        statistics=statistics,
        init=init,
        options=options,
        dtype=None if dtype is None else str(dtype),
        seed=seed,
    )
    plan = make_plan(recipe, max_memory=DEFAULT_MEMORY)
    if out is not None:
        return save(plan, out, device=device).out
    if not plan.outputs:
        return to_memory(plan, device=device)
    several = all_to_memory(plan, device=device)
    return several if plan.one_per_model else dict(zip(plan.outputs, several, strict=True))


def to_memory(plan: Plan, **run: Any) -> dict[str, torch.Tensor]:
    """Carry out a plan with one output into a state dict; tied names share one tensor."""
    (state,) = all_to_memory(plan, **run)
    return state


def all_to_memory(plan: Plan, **run: Any) -> list[dict[str, torch.Tensor]]:
    """Carry out a plan into a state dict for each of its outputs; tied names share one tensor."""
    sink = _MemorySink(plan)
    execute(plan, sink, **run)
    order = {name: i for i, name in enumerate(plan.donor.specs())}
    results = []
    for tensors in sink.outputs:
        result = tensors | {alias: tensors[owner] for alias, owner in plan.aliases.items()}
        results.append(dict(sorted(result.items(), key=lambda item: order.get(item[0], len(order)))))
    return results
