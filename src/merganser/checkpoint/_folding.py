"""What an adapter does to rows of a tensor, and its factors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from merganser._torch import torch
from merganser.checkpoint._base import Checkpoint

__all__ = ["Change", "Matrices"]

Matrix: TypeAlias = "np.ndarray[Any, Any]"

_KEPT = 8  # factors in memory, as float32 matrices


class Matrices:
    """The last few factors that were read, as matrices of float32; safe to share between threads."""

    def __init__(self, factors: Checkpoint) -> None:
        self._factors = factors
        self._kept: OrderedDict[tuple[str, bool, bool], Matrix] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str, turned: bool = False, *, flat: bool = False) -> Matrix:
        """A factor: rows as they are and all the rest as columns, transposed, or as a vector."""
        wanted = (key, turned, flat)
        with self._lock:
            if wanted in self._kept:
                self._kept.move_to_end(wanted)
                return self._kept[wanted]
        tensor = self._factors.read(key)
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).numpy()
        found = wide.reshape(-1) if flat else wide.reshape(len(wide), -1)
        found = np.ascontiguousarray(found.T) if turned else found
        with self._lock:
            self._kept[wanted] = found
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor: ``m (W + s L R) / |W + s L R|``, without m ``W + s L R``; or ``l W``.

    Attributes:
        left: key of L and whether it is stored transposed.
        right: key of R and whether it is.
        scale: s.
        magnitude: key of m, one number per row.
        factor: key of l, one number per row or column.
        rows: whether l has one per row.
    """

    left: tuple[str, bool] = ("", False)
    right: tuple[str, bool] = ("", False)
    scale: float = 0.0
    magnitude: str | None = None
    factor: str | None = None
    rows: bool = True

    def apply(self, rows: Matrix, matrices: Matrices, first: int, last: int) -> None:
        """Change rows of the tensor in place.

        The product is added one rank at a time, so that the bits do not depend on how many rows there are.

        Args:
            rows: (last - first, numbers per row).
            matrices: the adapter's.
            first: number of the first row.
            last: one past the last.
        """
        if self.factor is not None:
            factor = matrices.get(self.factor, flat=True).astype(rows.dtype, copy=False)
            rows *= factor[first:last, None] if self.rows else factor
            return
        left = matrices.get(*self.left)[first:last].astype(rows.dtype)
        right = matrices.get(*self.right)
        product, total = np.empty_like(rows), np.zeros_like(rows)
        for index in range(left.shape[1]):
            np.multiply(left[:, index, None], right[index], out=product)
            total += product
        total *= rows.dtype.type(self.scale)
        rows += total
        if self.magnitude is not None:
            magnitude = matrices.get(self.magnitude, flat=True)[first:last].astype(rows.dtype)
            norms = np.sqrt(np.add.reduce(np.square(rows, dtype=np.float64), axis=1))
            with np.errstate(divide="ignore", invalid="ignore"):  # of a row of zeros; NaN is refused later
                rows *= (magnitude / norms).astype(rows.dtype)[:, None]
