"""Streaming: blocks of all models go through a method, in memory that does not depend on the models' size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.engine._block import PIECE, Reader, StreamBlock
from merganser.engine._executor import Executor, LocalThreads
from merganser.engine._sample import RUN, middle, some
from merganser.engine._sink import Completion, Sink
from merganser.engine._tensor import Input, TensorPlan
from merganser.errors import NumericError, Place
from merganser.methods import AsMerged, Block, BlockKey, Context, Mend, Method

__all__ = ["Stream"]

T = TypeVar("T")

_LONGER, _LONGEST = 8, 1 << 21
"""How many times as long a block may be that is read as files have it, and how long at most."""


class _StreamContext(Context):
    """Passes over the tensors that one method merges."""

    def __init__(
        self,
        stream: Stream,
        tensors: Mapping[str, TensorPlan],
        seed: int,
        *,
        stored: bool = False,
        finished: frozenset[str] = frozenset(),
    ) -> None:
        first = next(iter(tensors.values()))
        self.specs = {name: tensor.spec for name, tensor in tensors.items()}
        self.models = len(first.inputs)
        self.seed = seed
        self.dtype = first.dtype
        self.counters = stream.counters
        self.finished = finished
        self.stored = stored and stream.reader.takes_stored and all(t.takes_stored for t in tensors.values())
        self._stream = stream
        self._tensors = tensors

    def only(self, *names: str) -> Context:
        return _StreamContext(
            self._stream,
            {name: self._tensors[name] for name in names},
            self.seed,
            stored=self.stored,
            finished=self.finished.intersection(names),
        )

    def each(
        self, fn: Callable[[Block], T], *, share: float = 1.0, as_merged: bool = False
    ) -> Iterator[tuple[BlockKey, T]]:
        def run(task: Sequence[BlockKey]) -> list[tuple[BlockKey, T]]:
            results = []
            for key in task:
                block = StreamBlock(self._stream.reader, self._tensors[key.name], middle(key, share), self.seed)
                block.may_round = not as_merged  # where blocks are merged in a pass, that is not written
                results.append((key, fn(block)))
            return results

        executor = self._stream.executor_for(self._tensors) if as_merged else self._stream.executor
        tasks = self._stream.tasks(self._tensors.values(), as_merged=as_merged)
        if share < RUN:
            tasks, share = some(tasks, round(RUN / share)), RUN
        for results in executor.map(run, tasks):
            yield from results


class Stream:
    """Runs passes over tensors in blocks.

    Args:
        executor: runs the tasks.
        block_elements: elements per block; a multiple of `kernels.CHUNK`.
        device: where the arithmetic happens.
        check_finite: whether NaN and infinite values are errors.
        counters: int64 counters that a method may keep.
        budget: bytes for tensors that must be whole.
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
        budget: int = 1 << 30,
        progress: Callable[[int, str], None] | None = None,
    ) -> None:
        self.reader = Reader(device, check_finite, progress)
        self.progress = progress or (lambda count, name: None)
        self.counters = counters
        self._budget = budget
        self.executor = executor
        self._block = block_elements

    def tasks(self, tensors: Iterable[TensorPlan], *, as_merged: bool = True) -> Iterator[list[BlockKey]]:
        """Blocks in order, small ones together, so that a task has about one block of work.

        Args:
            tensors: what to divide.
            as_merged: keep tensors or rows in one block where their method asks for that; else blocks begin at
                multiples of `kernels.CHUNK`.
        """
        task: list[BlockKey] = []
        filled = 0
        for tensor in tensors:
            numel, block = tensor.spec.numel, self._elements(tensor)
            step = tensor.step(block) if as_merged else block
            for start in range(0, max(numel, 1), step):
                stop = min(numel, start + step)
                if task and filled + stop - start > block:
                    yield task
                    task, filled = [], 0
                task.append(BlockKey(tensor.spec.name, start, stop))
                filled += stop - start + kernels.CHUNK // 16
        if task:
            yield task

    def _elements(self, tensor: TensorPlan) -> int:
        """Elements per block: more where they are read as files have them, for then there is less work to a block."""
        method = tensor.method
        if method is None or not (method.reads_stored() and self.reader.takes_stored and tensor.takes_stored):
            return self._block
        count = len(tensor.inputs)
        # some blocks may have to be made float32 after all
        width = max(4 * tensor.spec.dtype.itemsize * (count + 2), tensor.dtype.itemsize * (method.buffers(count) + 1))
        room = self._budget // (self.executor.workers * width)
        return self._block * max(1, min(_LONGER, _LONGEST // self._block, room // self._block))

    def context(self, tensors: Mapping[str, TensorPlan], seed: int) -> Context:
        """The view of some tensors that a method's `prepare` receives."""
        return _StreamContext(self, tensors, seed)

    def merge(
        self, method: Method, tensors: Mapping[str, TensorPlan], seed: int, sink: Sink, init: Method | None = None
    ) -> tuple[dict[str, dict[str, Any]], Mapping[str, Any] | None]:
        """Prepare the method, merge every block into `sink`, and repeat the blocks that its review asks for.

        Tensors that the sink has from an earlier run are left out; what was noted of them counts in the review.

        Args:
            method: the method.
            tensors: what it merges.
            seed: of random masks.
            sink: where the elements go.
            init: the method whose merge is the initialisation.

        Returns:
            The figures that the method reported, by tensor, and its memory for a later merge.
        """
        completion = Completion(sink, (tensor.spec for tensor in tensors.values()))
        pending = {name: tensor for name, tensor in tensors.items() if name in completion.pending}
        if not pending and type(method).memory is Method.memory:
            return completion.figures(), None
        rounds = method.reads_stored()
        finished = frozenset(tensors.keys() - pending.keys())
        context = _StreamContext(self, tensors, seed, stored=rounds, finished=finished)
        state = method.prepare(context)
        start = None if init is None else (init, init.prepare(AsMerged(context, reviewed=False)))

        def run(task: list[BlockKey], state: object, *, again: bool = False) -> None:
            for key in task:
                block = StreamBlock(self.reader, tensors[key.name], key, seed)
                block.start, block.may_round = start, rounds
                merged = method.results(block, state)
                for index, values in enumerate(merged):
                    self._write(sink, block.spec, key, values, index if len(merged) > 1 else None)
                if again:
                    completion.done(key)
                else:
                    completion.done(
                        key,
                        block.notes,
                        block.figures,
                        doubts=block.doubts,
                        mend=block.mend,
                        stands=partial(method.stands, key.name, state),
                    )

        for _ in self.executor_for(pending).map(lambda t: run(t, state), self.tasks(pending.values())):
            pass
        revised = method.review(state, completion.notes())
        if revised is None:
            completion.settle()
        else:
            doubted = completion.settle(lambda key, doubts: method.repeats(key, doubts, revised))

            def repeat(task: tuple[BlockKey, Mend | None]) -> None:
                key, mend = task
                if mend is not None and self._amend(sink, key, mend(revised)):
                    completion.done(key)
                else:
                    run([key], revised, again=True)

            for _ in self.executor.map(repeat, doubted):
                pass
        return completion.figures(), method.memory(state)

    def _amend(self, sink: Sink, key: BlockKey, changes: tuple[npt.NDArray[np.int32], torch.Tensor] | None) -> bool:
        """Write some elements of a block that was written; false if that does not do."""
        if changes is None or (self.reader.check_finite and kernels.count_nonfinite(changes[1])):
            return False
        places, values = changes
        sink.amend(key.name, places.astype(np.int64) + key.start, values)
        return True

    def executor_for(self, tensors: Mapping[str, TensorPlan]) -> Executor:
        """Fewer threads, where several whole tensors at once would exceed the memory budget."""
        largest = max((t.whole_bytes() for t in tensors.values() if t.is_whole), default=0)
        workers = max(1, min(self.executor.workers, self._budget // max(1, largest)))
        return self.executor if workers == self.executor.workers else LocalThreads(workers)

    def copy(self, tensors: Iterable[TensorPlan], sink: Sink) -> None:
        """Copy tensors from their only input, cast to the output type; those that the sink has already are left out."""
        table = {tensor.spec.name: tensor for tensor in tensors}
        completion = Completion(sink, (tensor.spec for tensor in table.values()))
        pending = [tensor for name, tensor in table.items() if name in completion.pending]

        def run(task: list[BlockKey]) -> None:
            for key in task:
                source = table[key.name].inputs[0]
                raw = self.reader.scratch.get("copy", key.stop - key.start, source.spec.dtype, torch.device("cpu"))
                self.reader.load(source, key.start, key.stop, raw)
                self._write(sink, table[key.name].spec, key, raw)
                completion.done(key)

        for _ in self.executor.map(run, self.tasks(pending)):
            pass

    def differing(self, pairs: Iterable[tuple[Input, Input]]) -> Iterator[tuple[Input, Input]]:
        """The pairs of equally shaped tensors whose values are not all equal."""
        cpu = torch.device("cpu")
        for a, b in pairs:
            for start in range(0, a.spec.numel, self._block):
                stop = min(a.spec.numel, start + self._block)
                x = self.reader.scratch.get("copy", stop - start, a.spec.dtype, cpu)
                y = self.reader.scratch.get("other", stop - start, b.spec.dtype, cpu)
                self.reader.read(a, start, stop, x)
                self.reader.read(b, start, stop, y)
                if not torch.equal(x, y):
                    yield a, b
                    break

    def _write(
        self, sink: Sink, spec: BlockSpec, key: BlockKey, values: torch.Tensor, output: int | None = None
    ) -> None:
        """Round the merged elements to the output type, piece by piece, and write them if they are finite."""
        values = values.reshape(-1)
        converted = values.dtype != spec.dtype or values.device.type != "cpu"
        for first in range(0, values.numel(), PIECE if converted else max(1, values.numel())):
            merged = piece = values[first : first + PIECE] if converted else values
            if converted:
                piece = self.reader.scratch.get("out", merged.numel(), spec.dtype, torch.device("cpu"))
            finite = kernels.convert(merged, piece)
            if self.reader.check_finite and spec.is_float and not finite:
                raise NumericError(
                    "E0602",
                    f"merged values are not finite, although the inputs are: {kernels.count_nonfinite(piece)} of "
                    f"{piece.numel():,}, the first at element {key.start + first + kernels.first_nonfinite(piece)}",
                    places=Place(tensor=spec.name),
                    why=f"the result exceeds the range of {str(spec.dtype).removeprefix('torch.')}",
                    fix="use dtype bfloat16 or float32, or a smaller scale",
                )
            sink.write(spec.name, key.start + first, piece, output)
