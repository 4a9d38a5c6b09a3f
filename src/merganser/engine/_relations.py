"""How the task vectors of several models relate, tensor by tensor, in one pass over the weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.engine._executor import Executor
from merganser.engine._stream import Stream
from merganser.engine._tensor import TensorPlan
from merganser.methods import Block
from merganser.methods._combination import Matrix, matrix_of, partial_products

__all__ = ["ROUNDED", "Counts", "Relations", "relate"]

Counts = npt.NDArray[np.int64]

ROUNDED = ("bfloat16", "float16")
"""Types of published weights, whose rounding can swallow small changes."""

_BLOCK = 1 << 18


@dataclass(frozen=True)
class Relations:
    """The task vectors ``t_i = W_i - W_0`` of n models, of one tensor or of several together.

    Attributes:
        elements: how many numbers a model has here.
        base_square: ``||W_0||^2``.
        products: ``<t_i, t_j>``, n x n.
        both: entries that models i and j both changed, n x n; on the diagonal those that model i changed.
        conflicts: of these, entries of opposite sign, n x n.
        equal: whether models i and j are the same everywhere, n x n.
        faded: by type of `ROUNDED`, the entries of each task vector that ``W_0 + t_i / n`` loses when it is rounded to
            that type: it is then the rounded ``W_0``. Of the entries that the model changed.
    """

    elements: int
    base_square: float
    products: Matrix
    both: Counts
    conflicts: Counts
    equal: npt.NDArray[np.bool_]
    faded: Mapping[str, Counts]

    @property
    def norms(self) -> npt.NDArray[np.float64]:
        """``||t_i||``, n."""
        return np.sqrt(np.maximum(np.diagonal(self.products), 0.0))

    @property
    def changed(self) -> npt.NDArray[np.float64]:
        """The share of entries that each model changed, n."""
        return np.diagonal(self.both) / max(1, self.elements)

    @property
    def cosines(self) -> Matrix:
        """Cosines of the task vectors, n x n; NaN where one is zero."""
        sizes = np.outer(self.norms, self.norms)
        cosines: Matrix = np.full_like(self.products, np.nan)
        np.divide(self.products, sizes, out=cosines, where=sizes > 0)
        return np.clip(cosines, -1.0, 1.0)

    @property
    def conflict_rates(self) -> Matrix:
        """Of the entries that both models changed, the share of opposite sign, n x n; NaN where there is none."""
        rates: Matrix = np.full(self.both.shape, np.nan)
        np.divide(self.conflicts, self.both, out=rates, where=self.both > 0)
        return rates

    @property
    def relative_norms(self) -> npt.NDArray[np.float64]:
        """``||t_i|| / ||W_0||``, n; infinite where the base is zero and the model is not."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios: npt.NDArray[np.float64] = self.norms / np.sqrt(self.base_square)
        return np.nan_to_num(ratios, nan=0.0, posinf=np.inf)

    @classmethod
    def total(cls, parts: Sequence[Relations]) -> Relations:
        """Several tensors together; at least one."""
        return cls(
            sum(part.elements for part in parts),
            float(np.sum([part.base_square for part in parts])),
            np.sum([part.products for part in parts], axis=0),
            np.sum([part.both for part in parts], axis=0),
            np.sum([part.conflicts for part in parts], axis=0),
            np.all([part.equal for part in parts], axis=0),
            {name: np.sum([part.faded[name] for part in parts], axis=0) for name in ROUNDED},
        )


def relate(
    tensors: Mapping[str, TensorPlan], executor: Executor, *, progress: Any = None, check_finite: bool = True
) -> dict[str, Relations]:
    """The relations of every tensor.

    Args:
        tensors: each with its inputs and a base.
        executor: runs the blocks.
        progress: called with the number of bytes just read and the tensor's name.
        check_finite: whether NaN and infinite values are errors.

    Raises:
        NumericError: E0601.

    Complexity: one pass, O(models^2) operations per element; memory of one block of every model per thread.
    """
    if not tensors:
        return {}
    stream = Stream(executor, _BLOCK, device=torch.device("cpu"), check_finite=check_finite, progress=progress)
    pieces: dict[str, list[Any]] = defaultdict(list)
    for key, found in stream.context(tensors, 0).each(_measure):
        pieces[key.name].append(found)
    return {name: _joined(tensors[name], pieces[name]) for name in tensors}


def _measure(block: Block) -> tuple[Any, ...]:
    models = len(block.weights)
    vectors, base = block.deltas(), block.base
    products = partial_products(vectors)
    signs = torch.stack([vector.sign() for vector in vectors]).float()
    marks = signs.abs()
    # sums of at most 2^18 products of -1, 0 and 1 are exact in float32
    both, agreement = marks @ marks.mT, signs @ signs.mT
    equal = [[i == j or torch.equal(vectors[i], vectors[j]) for j in range(models)] for i in range(models)]
    faded = []
    for name in ROUNDED:
        dtype = getattr(torch, name)
        rounded = base.to(dtype)
        lost = [
            int(((base + vector / models).to(dtype) == rounded).mul_(mark != 0).sum())
            for vector, mark in zip(vectors, marks, strict=True)
        ]
        faded.append(lost)
    return (
        kernels.chunk_squares(base),
        products,
        both.numpy().astype(np.int64),
        ((both - agreement) / 2).numpy().astype(np.int64),
        np.array(equal),
        np.array(faded, dtype=np.int64),
    )


def _joined(tensor: TensorPlan, pieces: Sequence[tuple[Any, ...]]) -> Relations:
    squares, products, both, conflicts, equal, faded = zip(*pieces, strict=True)
    lost = np.sum(faded, axis=0)
    return Relations(
        tensor.spec.numel,
        kernels.exact_sum(squares),
        matrix_of(len(tensor.inputs), products),
        np.sum(both, axis=0),
        np.sum(conflicts, axis=0),
        np.all(equal, axis=0),
        {name: lost[index] for index, name in enumerate(ROUNDED)},
    )
