"""Several vectors at once: the disjoint merge, which elects a sign per entry, and the variance."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from merganser._torch import torch
from merganser.kernels._arithmetic import balance, count_ones, flip_, nonzero, positions, sign_bits_, trim_below_
from merganser.kernels._combination import Combination, Rule
from merganser.kernels._compiled import loops
from merganser.kernels._stored import addresses

__all__ = ["Disjoint", "variance"]

_TILE = 1 << 13
"""Elements whose float64 copies stay in the cache."""

_TAKE = {"mean": 0, "sum": 1, "max": 2}


@dataclass(frozen=True)
class Disjoint(Combination):
    """``W = W_0 + scale s sum_i f_i |v_i| / sum_i d_i`` over the models i for which ``sign(v_i) = s``, entry by entry.

    Here ``v_i = w_i t_i``, ``s = sign(sum_i v_i)``, and both sums run in the order of the models.

    Attributes:
        weights: w_i.
        sizes: d_i.
        factors: f_i; 1 if None.
        take: ``mean``, or ``sum`` without the divisor, or ``max``, the largest ``|v_i|``.
        zero: the sign elected where the sum is exactly zero; 0 for none, so that nothing is taken there.
        scale: of the result.
        counted: whether signs are counted; else the merge returns zeros.
    """

    weights: Sequence[float]
    sizes: Sequence[float]
    factors: Sequence[float] | None = None
    take: str = "mean"
    zero: int = 1
    scale: float = 1.0
    counted: bool = True

    def merge(
        self,
        vectors: Sequence[torch.Tensor],
        base: torch.Tensor,
        out: torch.Tensor,
        floors: Sequence[float] | None = None,
    ) -> tuple[int, bool]:
        """The merge of one block, in `out`; the vectors may be overwritten.

        Args:
            vectors: t_i, flat.
            base: W_0.
            out: receives the result.
            floors: for each vector the magnitude below which its entries count as zero.

        Returns:
            How many more of the sums are positive than negative, and whether there are entries that are not zero but
            add up to zero; zeros if that is not counted.

        Complexity: O(vectors x elements); one pass through memory where it is compiled, about eight else.
        """
        fast = loops(*vectors, base, out)
        if fast is None:
            counts = self._merge(vectors, base, out, floors or [0.0] * len(vectors))
            return counts if self.counted else (0, False)
        limits = np.array(floors or [0.0] * len(vectors), dtype=np.float32)
        found = fast.disjoint(addresses(vectors), limits, self._rule(), base.numpy(), out.numpy())
        return int(found[0]), bool(found[1])

    def _rule(self) -> Rule:
        rows = (self.weights, self.factors or [1.0] * len(self.weights), self.sizes)
        return np.array(rows, dtype=np.float32), _TAKE[self.take], self.zero, self.counted, self.scale

    def _merge(
        self,
        vectors: Sequence[torch.Tensor],
        base: torch.Tensor,
        out: torch.Tensor,
        floors: Sequence[float],
    ) -> tuple[int, bool]:
        total = self.total(vectors, floors, out)
        surplus, undecided = balance(total)
        cancelled = nonzero(vectors[0])
        for vector in vectors[1:-1]:
            cancelled.bitwise_or_(nonzero(vector))
        cancelled.bitwise_and_(undecided)
        doubtful = len(vectors) > 1 and count_ones(cancelled) > 0
        negative = sign_bits_(total.add_(0.0))
        if doubtful and self.zero < 0:
            negative[positions(cancelled)] = torch.iinfo(negative.dtype).min
        elif doubtful and self.zero == 0:
            for vector in vectors:
                vector[positions(cancelled)] = 0
        agreeing = [flip_(vector, negative).clamp_(min=0) for vector in vectors]
        if self.take == "max":
            merged = agreeing[0]
            for vector in agreeing[1:]:
                torch.maximum(merged, vector, out=merged)
        else:
            divisor = self._divisor(agreeing) if self.take == "mean" else None
            for vector, factor in zip(agreeing, self.factors or [1.0] * len(vectors), strict=True):
                if factor != 1:
                    vector.mul_(factor)
            merged = agreeing[0]
            for vector in agreeing[1:]:
                merged.add_(vector)
            if divisor is not None:
                merged.div_(divisor)
        merged.add_(0.0)  # no entry is -0, which would survive in a base of -0
        torch.add(flip_(merged, negative).mul_(self.scale), base, out=out)
        return surplus, doubtful

    def total(self, vectors: Sequence[torch.Tensor], floors: Sequence[float], out: torch.Tensor) -> torch.Tensor:
        """``sum_i v_i`` in `out`; the vectors become the trimmed and weighted v_i."""
        for vector, weight, floor in zip(vectors, self.weights, floors, strict=True):
            if floor > 0:
                trim_below_(vector, floor)
            if weight != 1:
                vector.mul_(weight)
        if len(vectors) == 1:
            return out.copy_(vectors[0])
        torch.add(vectors[0], vectors[1], out=out)
        for vector in vectors[2:]:
            out.add_(vector)
        return out

    def _divisor(self, agreeing: Sequence[torch.Tensor]) -> torch.Tensor:
        """The sum of the sizes of the models that agree; 1 where none does, and the sum of the entries is 0."""
        if len(agreeing) < 256 and all(size == 1 for size in self.sizes):
            votes = nonzero(agreeing[0])
            for vector in agreeing[1:]:
                votes.add_(nonzero(vector))
            return votes.clamp_(min=1).to(agreeing[0].dtype)
        counted = torch.zeros_like(agreeing[0])
        for vector, size in zip(agreeing, self.sizes, strict=True):
            counted.add_(nonzero(vector), alpha=size)
        return counted.masked_fill_(counted == 0, 1)


def variance(vectors: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """The variance over the vectors, entry by entry, in `out`: ``sum_{i<j} (t_i - t_j)^2 / n^2`` for n vectors.

    That is ``mean((t_i - mean(t))^2)``, but zero exactly where all are equal. Accumulated in float64, so that the
    order of the vectors hardly matters.

    Complexity: O(vectors^2 x elements).
    """
    if (fast := loops(*vectors, out)) is not None:
        fast.variance(addresses(vectors), out.numpy())
        return out
    step = _TILE if out.device.type == "cpu" else max(1, out.numel())
    for first in range(0, out.numel(), step):
        wide = [vector[first : first + step].double() for vector in vectors]
        total, gap = torch.zeros_like(wide[0]), torch.empty_like(wide[0])
        for one, other in itertools.combinations(wide, 2):
            torch.sub(one, other, out=gap)
            total.add_(gap.mul_(gap))
        out[first : first + step] = total.div_(len(vectors) ** 2)
    return out
