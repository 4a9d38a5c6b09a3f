"""Weights as files have them, for loops that need no copy in another type."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._compiled import loops
from merganser.kernels._ranks import room

__all__ = ["Around", "Stored", "takes_stored"]


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
        count = len(intervals)
        inside = room.of(count * own.size)[: count * own.size].reshape(count, own.size)
        counts = np.zeros((count, 3), dtype=np.int64)
        zeros = fast.split_stored(own, base, np.array(intervals, dtype=np.int64), inside, counts)
        found = zip(counts.tolist(), inside, strict=True)
        return int(zeros), [Around(below, first, row[:size]) for (below, first, size), row in found]


def takes_stored(dtypes: Iterable[torch.dtype]) -> bool:
    """Whether compiled loops are used, and there are some for weights of these types."""
    return loops() is not None and all(dtype == torch.bfloat16 for dtype in dtypes)
