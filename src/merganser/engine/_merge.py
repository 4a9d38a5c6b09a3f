"""Carrying out a plan: into memory, or into a folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.checkpoint import lay_out
from merganser.engine._commit import FolderOutput
from merganser.engine._executor import Executor, LocalThreads
from merganser.engine._folders import solve_folders
from merganser.engine._key import plan_key
from merganser.engine._names import describe_method
from merganser.engine._place import check_output
from merganser.engine._plan import Plan
from merganser.engine._provenance import lock_data
from merganser.engine._sink import MemorySink, Sink
from merganser.engine._solved import unsolved_systems
from merganser.engine._stream import Stream
from merganser.errors import EnvironmentFault, NumericError, Place, escape
from merganser.methods import Sequential

__all__ = ["DEFAULT_SHARD", "Outcome", "execute", "in_memory", "save", "to_memory", "usable_device"]

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
        memory: what a later merge needs to add models to this one.
    """

    warnings: list[str]
    report: dict[str, Mapping[str, Any]]
    memory: dict[str, Any]


class _MemorySink(MemorySink):
    """Collects state dicts, one for each output of the plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__([tensor.spec for tensor in plan.tensors], max(1, len(plan.outputs)))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The first output."""
        return self.outputs[0]


_COMPILED_FROM = 1 << 28
"""Elements of all models from which on compiled loops are worth their start-up."""


def execute(
    plan: Plan,
    sink: Sink,
    *,
    device: str | torch.device | None = None,
    allow_nonfinite: bool = False,
    require_convergence: bool = False,
    executor: Executor | None = None,
    progress: Callable[[int, str], None] | None = None,
) -> Findings:
    """Carry out a plan.

    Args:
        plan: what to do.
        sink: where the merged elements go.
        device: where the arithmetic happens; the CPU if None.
        allow_nonfinite: take NaN and infinite values as they are.
        require_convergence: whether a system that was not solved to its tolerance is an error, not a warning.
        executor: runs the blocks; by default the plan's number of threads.
        progress: called from any thread with the number of bytes just read and the tensor's name.

    Returns:
        Warnings about what was noticed while reading, and the method's report.

    Raises:
        NumericError: a value that is not finite, in an input or in the result; E0605 with `require_convergence`.
        InputError: an input changed while it was read.
    """
    executor = executor or LocalThreads(plan.threads)
    if sum(tensor.spec.numel * len(tensor.inputs) for tensor in plan.tensors) >= _COMPILED_FROM:
        kernels.accelerate()
    stream = Stream(
        executor,
        plan.block_elements,
        device=usable_device(device),
        check_finite=not allow_nonfinite,
        counters=plan.counters,
        budget=plan.max_memory,
        progress=progress,
    )
    try:
        found = _run(plan, stream, sink)
    finally:
        for checkpoint in plan.checkpoints:
            checkpoint.close()
    unsolved = unsolved_systems(found.report)
    if unsolved and require_convergence:
        raise NumericError("E0605", unsolved.text, places=Place(tensor=unsolved.worst), fix=unsolved.fix)
    if unsolved:
        found.warnings.append(unsolved.text)
    return found


def _run(plan: Plan, stream: Stream, sink: Sink) -> Findings:
    """Copies, then every group of merged tensors, then a look whether the inputs are still what they were."""
    warnings: list[str] = []
    reports: dict[str, Mapping[str, Any]] = {}
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
    memories: list[dict[str, Any]] = []
    layerwise = {t.spec.name: t for t in plan.tensors if isinstance(t.method, Sequential)}
    if layerwise:
        found = solve_folders(plan, layerwise, stream)
        stream.copy(found.copies, sink)
        reports.update(found.figures)
        warnings += found.notes
    for method, tensors in () if layerwise else plan.groups():
        start = plan.start if method.initial() is not None else None
        figures, memory = stream.merge(method, tensors, plan.recipe.seed, sink, init=start)
        reports.update(figures)
        memories.append({} if memory is None else {"method": describe_method(method), **memory})
    for checkpoint in plan.checkpoints:
        checkpoint.check_unchanged()
    return Findings(warnings, reports, memories[0] if len(memories) == 1 else {})


def usable_device(device: str | torch.device | None) -> torch.device:
    """A device that exists.

    Raises:
        EnvironmentFault: E0706.
    """
    try:
        found = torch.device(device if device is not None else "cpu")
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
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
    record: Mapping[str, Any] | None = None,
    whole_inputs: bool = False,
    check: Callable[[Mapping[str, Any]], None] | None = None,
    notify: Callable[[str], None] | None = None,
    **run: Any,
) -> Outcome:
    """Carry out a plan into a folder (or one ``.safetensors`` file), which appears only when it is complete.

    A run that was stopped or killed is continued by the next one of the same plan, and the result is the same.

    Args:
        plan: what to do.
        out: the folder, which must not exist.
        shard_bytes: bytes per weights file.
        overwrite: replace a folder that an earlier merge made.
        record: what a search tried, for the lock file.
        whole_inputs: whether the lock file has digests of all bytes of the inputs, not of a sample.
        check: called with the digests of the weight files before the output appears; it may raise.
        notify: is told at once what the user should know, such as that an earlier run is continued.
        **run: as for `execute`.

    Raises:
        EnvironmentFault: the output exists or cannot be written.
        ResourceError: too little disk space.
    """
    target = Path(out)
    started = time.monotonic()
    single = target.suffix == ".safetensors"
    shards = lay_out((t.spec for t in plan.tensors), plan.bytes_written + 1 if single else shard_bytes)
    settings = {key: run[key] for key in ("device", "allow_nonfinite") if run.get(key)}
    key = plan_key(plan, shards, settings)
    check_output(target, plan, overwrite=overwrite, key=key)
    with FolderOutput(target, plan, shards, key=key, overwrite=overwrite, notify=notify) as output:
        found = execute(plan, output, **run)
        warnings = [*plan.warnings, *found.warnings]
        files = output.complete()
        if check is not None:
            check(files)

        def lock(notes: Sequence[str]) -> dict[str, Any]:
            seconds = time.monotonic() - started
            data = lock_data(plan, [*warnings, *notes], seconds, whole_inputs=whole_inputs)
            settled = {"shard_bytes": shard_bytes, **{key: str(value) for key, value in settings.items()}}
            extra = {"search": dict(record or {}), "memory": found.memory, "report": found.report}
            return {**data, "settings": settled, **{key: value for key, value in extra.items() if value}}

        warnings += output.commit(lock)
    return Outcome(target, time.monotonic() - started, tuple(warnings), found.report)


def to_memory(plan: Plan, **run: Any) -> dict[str, torch.Tensor]:
    """Carry out a plan into a state dict (the first, if it has several outputs); tied names share one tensor."""
    return in_memory(plan, **run)[0][0]


def in_memory(plan: Plan, **run: Any) -> tuple[list[dict[str, torch.Tensor]], Findings]:
    """A state dict for each of a plan's outputs, and what was noticed."""
    sink = _MemorySink(plan)
    found = execute(plan, sink, **run)
    order = {name: i for i, name in enumerate(plan.donor.specs())}
    results = []
    for tensors in sink.outputs:
        result = tensors | {alias: tensors[owner] for alias, owner in plan.aliases.items()}
        results.append(dict(sorted(result.items(), key=lambda item: order.get(item[0], len(order)))))
    return results, found
