"""Weights as files have them, for loops that need no copy in another type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._arithmetic import CHUNK, Partials
from merganser.kernels._compiled import loops
from merganser.kernels._ranks import room

__all__ = ["Around", "Stored", "Wall", "addresses", "takes_stored"]


@dataclass(frozen=True)
class Around:
    """How the magnitudes of a task vector lie about an interval of keys.

    Attributes:
        below: how many are below it.
        first: how many equal its first key.
        inside: the keys of the others in it (int32), in a buffer of the thread.
    """

    below: int
    first: int
    inside: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Wall:
    """A magnitude that divides others.

    Attributes:
        value: the magnitude.
        ties: of those that equal it the first so many lie above it, the others below; all lie above it if negative.
    """

    value: float
    ties: int = -1


@dataclass(frozen=True)
class Stored:
    """A block of a base and of models in bfloat16, finite and on the CPU.

    Attributes:
        base: W_0, flat.
        models: W_i.
        out: a buffer for the merge.
    """

    base: torch.Tensor
    models: Sequence[torch.Tensor]
    out: torch.Tensor

    def around(self, model: int, intervals: Sequence[tuple[int, int]]) -> tuple[int, list[Around]]:
        """The zeros of ``t = W_i - W_0``, and how the magnitudes lie about intervals of keys ``[low, high)``.

        Complexity: O(elements x intervals), one pass through memory.
        """
        fast = loops()
        assert fast is not None
        own, base = (x.view(torch.uint16).numpy() for x in (self.models[model], self.base))
        return self._around(lambda *rest: fast.split_stored(own, base, *rest), intervals)

    def variance_around(self, intervals: Sequence[tuple[int, int]]) -> tuple[int, list[Around]]:
        """The same of the variance of the task vectors over the models."""
        fast = loops()
        assert fast is not None
        own, base = addresses(self.models), self.base.view(torch.uint16).numpy()
        return self._around(lambda *rest: fast.split_variances(own, base, *rest), intervals)

    def _around(self, split: Callable[..., int], intervals: Sequence[tuple[int, int]]) -> tuple[int, list[Around]]:
        count, size = len(intervals), self.base.numel()
        inside = room.of(count * size)[: count * size].reshape(count, size)
        counts = np.zeros((count, 3), dtype=np.int64)
        zeros = split(np.array(intervals, dtype=np.int64), inside, counts)
        found = zip(counts.tolist(), inside, strict=True)
        return int(zeros), [Around(below, first, row[:number]) for (below, first, number), row in found]

    def products(self, pairs: Sequence[tuple[int, int]], least: Wall | None = None) -> list[Partials]:
        """`ordered_products` of the task vectors, without entries of a variance over the models below `least`, or 0."""
        fast = loops()
        assert fast is not None
        sums = np.zeros((len(pairs), -(-self.base.numel() // CHUNK)))
        wall, base = least or Wall(-1.0), self.base.view(torch.uint16).numpy()
        chosen = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        fast.products_stored(addresses(self.models), base, wall.value, wall.ties, chosen, sums)
        return list(sums)


def addresses(vectors: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
    """Of the first elements, for compiled loops."""
    return np.array([vector.data_ptr() for vector in vectors], dtype=np.int64)


def takes_stored(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether compiled loops are used, and there are some for weights of these types."""
    return loops() is not None and all(dtype == torch.bfloat16 for dtype in dtypes)
