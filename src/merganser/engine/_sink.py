"""Where merged elements go, and when a tensor is finished."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods import BlockKey, Mend

__all__ = ["Completion", "Finished", "MemorySink", "Sink"]


@dataclass(frozen=True)
class Finished:
    """What a method said of a tensor while it was merged.

    Attributes:
        notes: the counts of all its blocks, for `Method.review`.
        figures: what the method reported.
    """

    notes: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)


class Sink(Protocol):
    """Takes merged elements, from several threads and in any order."""

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Take consecutive elements of the flattened tensor, from element `start` on.

        Args:
            name: the tensor.
            start: the first element.
            piece: the elements; they are to be copied.
            output: the index of the output that they belong to; None for all.
        """
        ...

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Take single elements of a tensor, for all outputs.

        Args:
            name: the tensor.
            positions: in the flattened tensor.
            values: as many elements.
        """
        ...

    def finish(self, name: str, finished: Finished) -> None:
        """Know that all elements of a tensor have been written and that none will be written again."""
        ...

    def finished(self, name: str) -> Finished | None:
        """What was said of a tensor that an earlier run finished; None if it is to be merged."""
        ...


class MemorySink:
    """Collects tensors in memory.

    Args:
        specs: the tensors.
        outputs: how many sets of them.

    Attributes:
        outputs: the sets.
    """

    def __init__(self, specs: Sequence[BlockSpec], outputs: int = 1) -> None:
        self.outputs = [
            {spec.name: torch.empty(spec.shape, dtype=spec.dtype) for spec in specs} for _ in range(outputs)
        ]

    def write(self, name: str, start: int, piece: torch.Tensor, output: int | None = None) -> None:
        """Take consecutive elements."""
        for tensors in self.outputs if output is None else (self.outputs[output],):
            tensors[name].view(-1)[start : start + piece.numel()].copy_(piece)

    def amend(self, name: str, positions: npt.NDArray[np.int64], values: torch.Tensor) -> None:
        """Take single elements."""
        for tensors in self.outputs:
            tensors[name].view(-1)[torch.from_numpy(positions)] = values

    def finish(self, name: str, finished: Finished) -> None:
        """Nothing is to be done."""

    def finished(self, name: str) -> Finished | None:
        """Nothing is there from an earlier run."""
        return None


class Completion:
    """Counts the blocks of tensors, and tells the sink of every tensor whose last block stands.

    A tensor with a block that its method doubts waits for the review of the method, unless its counts show that it
    stands.

    Args:
        sink: where the tensors go.
        specs: the tensors, of which those that the sink has already are left out.
    """

    def __init__(self, sink: Sink, specs: Iterable[BlockSpec]) -> None:
        self._sink = sink
        self._lock = threading.Lock()
        self._left: dict[str, int] = {}
        self._notes: dict[str, Counter[str]] = {}
        self._figures: dict[str, Mapping[str, Any]] = {}
        self._doubted: dict[str, dict[BlockKey, tuple[frozenset[str], Mend | None]]] = {}
        for spec in specs:
            earlier = sink.finished(spec.name)
            if earlier is None:
                self._left[spec.name] = spec.numel
                self._notes[spec.name] = Counter()
            else:
                self._notes[spec.name] = Counter(earlier.notes)
                self._figures[spec.name] = earlier.figures

    @property
    def pending(self) -> set[str]:
        """The tensors that are not finished."""
        return set(self._left)

    def done(
        self,
        key: BlockKey,
        notes: Mapping[str, int] | None = None,
        figures: Mapping[str, Any] | None = None,
        *,
        doubts: Collection[str] = (),
        mend: Mend | None = None,
        stands: Callable[[Mapping[str, int]], bool] = lambda notes: False,
    ) -> None:
        """A block was written.

        Args:
            key: the block.
            notes: its counts.
            figures: what its method reported.
            doubts: why its method doubts it.
            mend: how it can be mended then.
            stands: whether its tensor, if this was the last block, needs no review, from all its counts.
        """
        with self._lock:
            self._notes[key.name].update(notes or {})
            if figures:
                self._figures[key.name] = figures
            if doubts:
                self._doubted.setdefault(key.name, {})[key] = frozenset(doubts), mend
            self._left[key.name] -= key.stop - key.start
            ready = self._left[key.name] == 0
            if ready and key.name in self._doubted:
                ready = stands(self._notes[key.name])
                if ready:
                    del self._doubted[key.name]
        if ready:
            self._finish(key.name)

    def _finish(self, name: str) -> None:
        self._sink.finish(name, Finished(dict(self._notes[name]), self._figures.get(name, {})))
        del self._left[name]

    def notes(self) -> Counter[str]:
        """The counts of all blocks, those of an earlier run included."""
        total: Counter[str] = Counter()
        for counts in self._notes.values():
            total.update(counts)
        return total

    def figures(self) -> dict[str, dict[str, Any]]:
        """What the method reported, by tensor."""
        return {name: dict(self._figures[name]) for name in self._notes if self._figures.get(name)}

    def settle(
        self, again: Callable[[BlockKey, frozenset[str]], bool] | None = None
    ) -> list[tuple[BlockKey, Mend | None]]:
        """Let the doubted blocks stand, but for those that are to be merged `again`; these, in order."""
        doubted, self._doubted = self._doubted, {}
        found = [
            (key, mend)
            for blocks in doubted.values()
            for key, (doubts, mend) in blocks.items()
            if again and again(key, doubts)
        ]
        for key, _ in found:
            self._left[key.name] += key.stop - key.start
        repeated = {key.name for key, _ in found}
        for name in doubted:
            if name not in repeated:
                self._finish(name)
        return sorted(found, key=lambda item: (item[0].name, item[0].start))
