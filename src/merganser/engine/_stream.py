"""Streaming: blocks of all models go through a method, in memory that does not depend on the models' size."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.checkpoint import Checkpoint
from merganser.engine._executor import Executor
from merganser.errors import NumericError, Place
from merganser.methods import Block, BlockKey, Context, Method

__all__ = ["Input", "Sink", "Stream", "TensorPlan"]

T = TypeVar("T")
_PIECE = 1 << 17


@dataclass(frozen=True, slots=True)
class Input:
    """A tensor of a checkpoint."""

    checkpoint: Checkpoint
    name: str

    @property
    def spec(self) -> BlockSpec:
        """Its shape and type."""
        return self.checkpoint.specs()[self.name]

    @property
    def place(self) -> Place:
        """Where it is, for messages."""
        return Place(file=self.checkpoint.place_of(self.name), tensor=self.name)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How one output tensor is made: merged by `method` from `inputs`, or copied from the only input.

    Attributes:
        spec: the output tensor.
        inputs: the models' tensors.
        base: the base's.
        method: None for a copy.
        weights: one per input.
        dtype: the compute type.
        reason: why it is copied.
    """

    spec: BlockSpec
    inputs: tuple[Input, ...]
    base: Input | None
    method: Method | None
    weights: tuple[float, ...]
    dtype: torch.dtype
    reason: str = ""


class Sink(Protocol):
    """Where merged elements go."""

    def write(self, name: str, start: int, piece: torch.Tensor) -> None:
        """Take consecutive elements of the flattened tensor, from element `start` on."""
        ...


class _Scratch(threading.local):
    """Buffers of one thread, made once and used for every block."""

    def __init__(self) -> None:
        self._buffers: dict[object, torch.Tensor] = {}

    def get(self, key: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A flat buffer, uninitialised."""
        found = self._buffers.get((key, dtype))
        if found is None or found.numel() < numel:
            found = self._buffers[key, dtype] = torch.empty(numel, dtype=dtype, device=device)
        return found[:numel]


class _StreamBlock(Block):
    """A block that is read when it is asked for."""

    def __init__(self, stream: Stream, tensor: TensorPlan, key: BlockKey, seed: int) -> None:
        self.spec = tensor.spec
        self.key = key
        self.weights = tensor.weights
        self.seed = seed
        self.notes: Counter[str] = Counter()
        self.doubtful = False
        self._stream = stream
        self._tensor = tensor
        self._base: torch.Tensor | None = None

    @property
    def base(self) -> torch.Tensor:
        if self._base is None:
            assert self._tensor.base is not None
            self._base = self._load(self._tensor.base, "base")
        return self._base

    def model(self, index: int, slot: int | None = None) -> torch.Tensor:
        return self._load(self._tensor.inputs[index], f"model {index if slot is None else slot}")

    def buffer(self, name: str) -> torch.Tensor:
        return self._get(f"scratch {name}", self._tensor.dtype)

    def note(self, name: str, amount: int) -> None:
        self.notes[name] += amount

    def doubt(self) -> None:
        self.doubtful = True

    def _get(self, key: str, dtype: torch.dtype) -> torch.Tensor:
        return self._stream.scratch.get(key, self.key.stop - self.key.start, dtype, self._stream.device)

    def _load(self, source: Input, key: str) -> torch.Tensor:
        target = self._get(key, self._tensor.dtype)
        native = source.spec.dtype
        if native == target.dtype and target.device.type == "cpu":
            self._stream.read(source, self.key.start, self.key.stop, target)
        else:
            for first in range(0, target.numel(), _PIECE):
                last = min(target.numel(), first + _PIECE)
                raw = self._stream.scratch.get("raw", last - first, native, torch.device("cpu"))
                self._stream.read(source, self.key.start + first, self.key.start + last, raw)
                target[first:last].copy_(raw)
        if self._stream.check_finite and kernels.count_nonfinite(target):
            raise self._stream.nonfinite_input(source)
        return target


class _StreamContext(Context):
    """Passes over the tensors that one method merges."""

    def __init__(self, stream: Stream, tensors: Mapping[str, TensorPlan], seed: int) -> None:
        first = next(iter(tensors.values()))
        self.specs = {name: tensor.spec for name, tensor in tensors.items()}
        self.models = len(first.inputs)
        self.seed = seed
        self.dtype = first.dtype
        self.counters = stream.counters
        self._stream = stream
        self._tensors = tensors

    def only(self, name: str) -> Context:
        return _StreamContext(self._stream, {name: self._tensors[name]}, self.seed)

    def each(self, fn: Callable[[Block], T], *, share: float = 1.0) -> Iterator[tuple[BlockKey, T]]:
        def run(task: Sequence[BlockKey]) -> list[tuple[BlockKey, T]]:
            results = []
            for key in task:
                block = _StreamBlock(self._stream, self._tensors[key.name], _middle(key, share), self.seed)
                results.append((key, fn(block)))
            return results

        for results in self._stream.executor.map(run, self._stream.tasks(self._tensors.values())):
            yield from results


def _middle(key: BlockKey, share: float) -> BlockKey:
    """The middle part of a block; it begins at a multiple of 64 elements."""
    if share >= 1:
        return key
    length = key.stop - key.start
    wanted = max(1, round(length * share))
    start = key.start + (length - wanted) // 2 // 64 * 64
    return BlockKey(key.name, start, start + wanted)


class Stream:
    """Runs passes over tensors in blocks.

    Args:
        executor: runs the tasks.
        block_elements: elements per block; a multiple of `kernels.CHUNK`.
        device: where the arithmetic happens.
        check_finite: whether NaN and infinite values are errors.
        counters: int64 counters that a method may keep.
        progress: called from any thread with the number of bytes just read and the tensor's name.
    """

    def __init__(
        self,
        executor: Executor,
        block_elements: int,
        *,
        device: torch.device,
        check_finite: bool = True,
        counters: int = 1 << 22,
        progress: Callable[[int, str], None] | None = None,
    ) -> None:
        self.scratch = _Scratch()
        self.device = device
        self.check_finite = check_finite
        self.counters = counters
        self.executor = executor
        self._block = block_elements
        self._progress = progress

    def tasks(self, tensors: Iterable[TensorPlan]) -> Iterator[list[BlockKey]]:
        """Blocks in order, small ones together, so that a task has about one block of work."""
        task: list[BlockKey] = []
        filled = 0
        for tensor in tensors:
            numel = tensor.spec.numel
            for start in range(0, max(numel, 1), self._block):
                stop = min(numel, start + self._block)
                if task and filled + stop - start > self._block:
                    yield task
                    task, filled = [], 0
                task.append(BlockKey(tensor.spec.name, start, stop))
                filled += stop - start + kernels.CHUNK // 16
        if task:
            yield task

    def read(self, source: Input, start: int, stop: int, out: torch.Tensor) -> None:
        """Read elements of an input in their stored type, and report the progress."""
        source.checkpoint.read_range(source.name, start, stop, out)
        if self._progress is not None:
            self._progress(out.numel() * out.element_size(), source.name)

    def context(self, tensors: Mapping[str, TensorPlan], seed: int) -> Context:
        """The view of some tensors that a method's `prepare` receives."""
        return _StreamContext(self, tensors, seed)

    def merge(self, method: Method, tensors: Mapping[str, TensorPlan], seed: int, sink: Sink) -> None:
        """Prepare the method, merge every block into `sink`, and repeat the blocks that its review asks for."""
        state = method.prepare(self.context(tensors, seed))
        notes, doubtful = self._merge_pass(method, tensors, seed, sink, state, self.tasks(tensors.values()))
        revised = method.review(state, notes)
        if revised is not None and doubtful:
            self._merge_pass(method, tensors, seed, sink, revised, ([key] for key in doubtful))

    def _merge_pass(
        self,
        method: Method,
        tensors: Mapping[str, TensorPlan],
        seed: int,
        sink: Sink,
        state: object,
        tasks: Iterable[list[BlockKey]],
    ) -> tuple[Mapping[str, int], list[BlockKey]]:
        """Merge blocks into `sink`; the sums of the method's notes, and the blocks that it doubts."""

        def run(task: list[BlockKey]) -> tuple[Counter[str], list[BlockKey]]:
            notes: Counter[str] = Counter()
            doubtful = []
            for key in task:
                block = _StreamBlock(self, tensors[key.name], key, seed)
                self._write(sink, block.spec, key, method.merge(block, state))
                notes.update(block.notes)
                if block.doubtful:
                    doubtful.append(key)
            return notes, doubtful

        all_notes: Counter[str] = Counter()
        all_doubtful: list[BlockKey] = []
        for notes, doubtful in self.executor.map(run, tasks):
            all_notes.update(notes)
            all_doubtful.extend(doubtful)
        return all_notes, all_doubtful

    def copy(self, tensors: Iterable[TensorPlan], sink: Sink) -> None:
        """Copy tensors from their only input, cast to the output type."""
        table = {tensor.spec.name: tensor for tensor in tensors}

        def run(task: list[BlockKey]) -> None:
            for key in task:
                source = table[key.name].inputs[0]
                raw = self.scratch.get("copy", key.stop - key.start, source.spec.dtype, torch.device("cpu"))
                self.read(source, key.start, key.stop, raw)
                if raw.is_floating_point() and self.check_finite and kernels.count_nonfinite(raw):
                    raise self.nonfinite_input(source)
                self._write(sink, table[key.name].spec, key, raw)

        for _ in self.executor.map(run, self.tasks(table.values())):
            pass

    def differing(self, pairs: Iterable[tuple[Input, Input]]) -> Iterator[tuple[Input, Input]]:
        """The pairs of equally shaped tensors whose values are not all equal."""
        cpu = torch.device("cpu")
        for a, b in pairs:
            for start in range(0, a.spec.numel, self._block):
                stop = min(a.spec.numel, start + self._block)
                x = self.scratch.get("copy", stop - start, a.spec.dtype, cpu)
                y = self.scratch.get("other", stop - start, b.spec.dtype, cpu)
                self.read(a, start, stop, x)
                self.read(b, start, stop, y)
                if not torch.equal(x, y):
                    yield a, b
                    break

    def _write(self, sink: Sink, spec: BlockSpec, key: BlockKey, values: torch.Tensor) -> None:
        values = values.reshape(-1)
        if values.dtype != spec.dtype or values.device.type != "cpu":
            for first in range(0, values.numel(), _PIECE):
                part = values[first : first + _PIECE]
                target = self.scratch.get("out", part.numel(), spec.dtype, torch.device("cpu"))
                target.copy_(part)
                sink.write(spec.name, key.start + first, target)
            return
        if self.check_finite and spec.is_float and kernels.count_nonfinite(values):
            raise NumericError(
                "E0602",
                f"the merged tensor has {kernels.count_nonfinite(values)} values that are not finite in this block, "
                f"the first at element {key.start + kernels.first_nonfinite(values)}, although its inputs are finite",
                places=Place(tensor=spec.name),
                why=f"the result exceeds the range of {str(spec.dtype).removeprefix('torch.')}",
                fix="use dtype bfloat16 or float32, or a smaller scale",
            )
        sink.write(spec.name, key.start, values)

    def nonfinite_input(self, source: Input) -> NumericError:
        """The error for an input with NaN or infinite values: their number, and the first one's index."""
        count, first = 0, -1
        spec = source.spec
        for start in range(0, spec.numel, self._block):
            stop = min(spec.numel, start + self._block)
            raw = torch.empty(stop - start, dtype=spec.dtype)
            source.checkpoint.read_range(source.name, start, stop, raw)
            found = kernels.count_nonfinite(raw)
            if found and first < 0:
                first = start + kernels.first_nonfinite(raw)
            count += found
        index = _unravel(first, spec.shape)
        return NumericError(
            "E0601",
            f"{count:,} of {spec.numel:,} values are NaN or infinite, the first at {list(index)}",
            places=source.place,
            fix="use an undamaged checkpoint, exclude the tensor, or pass --allow-nonfinite",
        )


def _unravel(index: int, shape: Sequence[int]) -> tuple[int, ...]:
    result: list[int] = []
    for size in reversed(shape):
        result.append(index % size)
        index //= size
    return tuple(reversed(result))
