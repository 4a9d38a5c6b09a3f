"""What becomes of the task vectors of a block, in loops that take weights as files have them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.kernels._compiled import loops
from merganser.kernels._random import Drops
from merganser.kernels._stored import Stored, Wall, addresses

__all__ = ["Combination", "Dropped", "Elected", "Limits", "Rule", "Sum"]

_NONE = np.zeros((0, 2), dtype=np.int64)

_FEW = 1 << 12
"""Of so many elements one may cancel where positions are listed."""

_ALL = 3

Rule: TypeAlias = "tuple[npt.NDArray[np.float32], int, int, bool, float]"
"""What compiled loops want to know; `_loops.combine` says what it is."""

Dropped: TypeAlias = "Sequence[tuple[Drops, float]]"
"""For each model what `drop_draws` returns, and a factor of what is kept."""

Draws: TypeAlias = "tuple[npt.NDArray[np.uint8], np.uint64]"
"""What `keep_draws` returns."""


@dataclass(frozen=True)
class Elected:
    """What an election of signs counted.

    Attributes:
        balance: how many more sums are positive than negative.
        cancels: whether there are entries that are not zero but add up to zero.
        places: the positions of these, in order; None if they are not few.
    """

    balance: int
    cancels: bool
    places: npt.NDArray[np.int32] | None


@dataclass(frozen=True)
class Limits:
    """Which entries of task vectors count, where magnitudes below a floor, and above a cap, count as zero.

    Attributes:
        floors: for each vector, no floor if it is 0; none if None.
        caps: for each vector; none if None.
        least: the floor of the variance over the vectors; where that is below it, or zero, no entry counts.
    """

    floors: Sequence[Wall] | None = None
    caps: Sequence[Wall] | None = None
    least: Wall | None = None


class Combination(ABC):
    """What becomes of the task vectors of a block."""

    @abstractmethod
    def _rule(self) -> Rule:
        """For compiled loops."""

    def merge_stored(
        self,
        stored: Stored,
        limits: Limits,
        *,
        counts: npt.NDArray[np.int64] | None = None,
        dropped: Dropped | None = None,
    ) -> Elected:
        """The merge of ``t_i = W_i - W_0`` of a block as files have it, rounded to its type, in its buffer.

        The bits are those of the merge of task vectors without the entries that do not count.

        Args:
            stored: the block.
            limits: which entries count.
            counts: where it is given (models x 2), the numbers of magnitudes below each floor, and equal to it, are
                added to it; not beside `dropped`, `least` and ties.
            dropped: what is dropped at random before; nothing if None.

        Returns:
            What was counted; nothing where no sign is elected, or signs are not counted.

        Complexity: one pass through memory at half the width.
        """
        fast = loops()
        assert fast is not None
        base, out = (x.view(torch.uint16).numpy() for x in (stored.base, stored.out))
        models, least = len(stored.models), limits.least or Wall(-1.0)
        rows = (limits.floors or [Wall(0.0)] * models, limits.caps or [Wall(np.inf)] * models, [least] * models)
        walls = np.array([[wall.value for wall in row] for row in rows[:2]], dtype=np.float32)
        ties = np.array([[wall.ties for wall in row] for row in rows], dtype=np.int64)
        places = np.empty(stored.base.numel() // _FEW, dtype=np.int32)
        balance, cancels, number = fast.merge_stored(
            addresses(stored.models),
            walls,
            ties,
            least.value,
            _drawn(dropped),
            self._rule(),
            base,
            out,
            _NONE if counts is None else counts,
            places,
        )
        return Elected(int(balance), bool(cancels), None if number > places.size else places[:number].copy())

    def merge_ranked(
        self,
        stored: Stored,
        steps: Sequence[torch.Tensor | None],
        draws: Sequence[Draws],
        start: int,
        *,
        rescaled: bool,
    ) -> None:
        """`merge_stored` of task vectors of which entries are dropped at random, by the ranks of magnitudes in rows.

        Args:
            stored: whole rows.
            steps: for each model the probability for each rank, the smallest magnitude first, with which an entry is
                kept; None for a model that stays whole.
            draws: of `keep_draws`, for each model.
            start: the position of the first element.
            rescaled: whether what is kept is divided by its probability.

        Complexity: O(models x elements).
        """
        fast = loops()
        assert fast is not None
        base, out = (x.view(torch.uint16).numpy() for x in (stored.base, stored.out))
        row = next(own.numel() for own in steps if own is not None)
        whole = np.full(row, 2, dtype=np.float32)
        fast.merge_ranked(
            addresses(stored.models),
            np.array([whole if own is None else own.numpy() for own in steps]),
            np.array([own for own, _ in draws]),
            start,
            np.array([key for _, key in draws]),
            rescaled,
            self._rule(),
            base,
            out,
        )


def _drawn(dropped: Dropped | None) -> tuple[Any, ...]:
    """For compiled loops: bytes, chances with factors, keys, and the position of the first element."""
    if dropped is None:
        return np.zeros((0, 0), np.uint8), np.zeros((0, 3)), np.zeros(0, np.uint64), 0
    chances = np.array([(drops.coarse, drops.limit, factor) for drops, factor in dropped], dtype=np.float64)
    keys = np.array([drops.key for drops, _ in dropped], dtype=np.uint64)
    return np.array([drops.draws for drops, _ in dropped]), chances, keys, dropped[0][0].start


@dataclass(frozen=True)
class Sum(Combination):
    """``W = W_0 + scale sum_i t_i``, the sum in the order of the models."""

    models: int
    scale: float = 1.0

    def _rule(self) -> Rule:
        return np.ones((3, self.models), dtype=np.float32), _ALL, 0, False, self.scale
