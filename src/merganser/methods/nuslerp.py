"""NuSLERP: slerp with weights, between models or task vectors, by tensor or by row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.kernels import CHUNK, chunk_products
from merganser.methods._base import About, Method, check_normalisable
from merganser.methods._block import Block, Context
from merganser.methods._options import option
from merganser.methods._rows import chunks, row_cuts, spread

__all__ = ["NuSlerp"]

Array = npt.NDArray[np.float64]

_COLLINEAR = 1e-6
"""Sine of an angle below which two vectors count as collinear: rounded to float32 they are off by about 1e-7."""
_LONGEST = 1 << 13
"""Elements of a vector that blocks keep together; the inner product of longer ones is divided among threads."""


@dataclass(frozen=True)
class NuSlerp(Method, name="nuslerp"):
    """``slerp(x_1, x_2; t)`` with ``t = w_2 / (w_1 + w_2)``, of two models or their task vectors.

    With ``theta`` the angle between x_1 and x_2 it is ``[sin((1-t) theta) x_1 + sin(t theta) x_2] / sin(theta)``, and
    ``(1-t) x_1 + t x_2`` where they are collinear; zeros count as orthogonal to everything. The x_i are task vectors
    where a base is given, to which the result is then added.

    The angle is that of the whole tensor, or, with ``nuslerp_flatten=false``, one for every vector along the last
    dimension (``nuslerp_row_wise=false``) or the first one (true). Two passes, O(elements), one angle per vector in
    memory; vectors along the last dimension are measured while merging, which leaves one pass.
    """

    nuslerp_flatten: bool = option(True, "one angle per tensor")
    nuslerp_row_wise: bool = option(False, "without flatten: vectors along the first dimension, not the last")

    about = About(
        title="Weighted interpolation of two models or task vectors along the sphere",
        equation="W = W_0 + [sin((1-t) theta) t_1 + sin(t theta) t_2] / sin(theta),  t = w_2 / (w_1 + w_2)",
        source="mergekit, nuslerp, 2024",
        helps="Two task vectors that are far from parallel, where slerp of the models would be linear.",
        hurts="More than two models: multislerp, karcher.",
        work=8,
        passes=2,
        deviations="The names of the options and the dimension that each stands for are mergekit's.",
    )
    symmetric = False
    takes_base = True
    arity = (2, 2)

    def requires(self, models: int) -> frozenset[str]:
        """The base, where the scale is not 1."""
        return frozenset() if self.scale == 1 else frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The two vectors, the shares of every element, and one chunk's products in float64."""
        return 6

    def passes(self) -> int:
        """One to measure vectors, unless blocks hold them whole."""
        return 2 if self.nuslerp_flatten or self.nuslerp_row_wise else 1

    def check(self, models: int, weights: Sequence[float]) -> None:
        """The weights must not sum to zero."""
        super().check(models, weights)
        check_normalisable(self, weights)

    def _rows(self, spec: BlockSpec) -> tuple[int, int, bool]:
        """How many vectors there are, the period of their positions, and whether they run along the first dimension."""
        if self.nuslerp_flatten or len(spec.shape) < 2 or not spec.numel:
            return 1, max(1, spec.numel), False
        if self.nuslerp_row_wise:
            count = spec.numel // spec.shape[0]
            return count, count, True
        return spec.numel // spec.shape[-1], spec.shape[-1], False

    def row(self, spec: BlockSpec) -> int:
        """A vector along the last dimension, unless it is long."""
        count, length, inner = self._rows(spec)
        return length if count > 1 and not inner and length <= _LONGEST else 1

    def prepare(self, context: Context) -> dict[str, Array]:
        """The cosine of every pair of vectors, but of those that blocks keep together."""
        sums = {n: np.zeros((3, self._rows(spec)[0])) for n, spec in context.specs.items() if self.row(spec) == 1}
        for key, pieces in context.each(self._products, as_merged=True):
            for first, piece in pieces:
                sums[key.name][:, first : first + piece.shape[1]] += piece
        return {name: _cosines(*table) for name, table in sums.items()}

    def _products(self, block: Block) -> list[tuple[int, Array]]:
        """Inner product and squared norms of the vectors' parts in every chunk, from the first vector on."""
        if self.row(block.spec) > 1:
            return []
        count, length, inner = self._rows(block.spec)
        a, b = _vectors(block)
        if count == 1:
            found = np.stack(chunk_products((a, b), ((0, 1), (0, 0), (1, 1))), axis=1)
            return [(0, part.reshape(3, 1)) for part in found]
        buffer = np.empty((3, CHUNK))
        pieces: list[tuple[int, Array]] = []
        for start, first, last in chunks(block):
            x, y = (v[first:last].double().cpu().numpy() for v in (a, b))
            row, cuts = row_cuts(start, start + last - first, length)
            products = buffer[:, : last - first]
            for out, (left, right) in zip(products, ((x, y), (x, x), (y, y)), strict=True):
                np.multiply(left, right, out=out)
            if inner:
                pieces += _columns(products, start % length, length)
            else:
                pieces.append((row, np.stack([np.add.reduceat(line, cuts) for line in products])))
        return pieces

    def merge(self, block: Block, state: Mapping[str, Array]) -> torch.Tensor:
        """The combination of one block."""
        count, length, inner = self._rows(block.spec)
        t = block.weights[1] / math.fsum(block.weights)
        first, second = _vectors(block)
        if self.row(block.spec) > 1:
            rows = first.view(-1, length), second.view(-1, length)
            for vectors, share in zip(rows, _shares(_cosines(*_row_products(*rows)), t), strict=True):
                vectors.mul_(torch.from_numpy(share).to(first).unsqueeze(1))
            merged = first.add_(second)
        elif count == 1:
            a, b = (share.item() for share in _shares(state[block.key.name], t))
            merged = first.mul_(a).add_(second, alpha=b)
        else:
            shares = _shares(state[block.key.name], t)
            one, two = (spread(share, block, length, first, inner=inner) for share in shares)
            merged = first.mul_(one).add_(second.mul_(two))
        return merged.mul_(self.scale).add_(block.base) if block.based else merged


def _vectors(block: Block) -> list[torch.Tensor]:
    return [block.delta(i, slot=i) if block.based else block.model(i, slot=i) for i in range(2)]


def _row_products(a: torch.Tensor, b: torch.Tensor) -> Array:
    """Inner products of the rows of two matrices, and their squared norms."""
    lines = max(1, CHUNK // a.shape[1])
    found = np.empty((3, len(a)))
    for first in range(0, len(a), lines):
        x, y = (v[first : first + lines].double().cpu().numpy() for v in (a, b))
        for out, (left, right) in zip(found, ((x, y), (x, x), (y, y)), strict=True):
            out[first : first + lines] = np.matmul(left[:, None, :], right[:, :, None])[:, 0, 0]
    return found


def _columns(products: Array, offset: int, period: int) -> list[tuple[int, Array]]:
    """Sums over elements of equal position modulo `period`, the first of which has position `offset`."""
    head = min((period - offset) % period, products.shape[1])
    rows = (products.shape[1] - head) // period
    tail = head + rows * period
    pieces = [(offset, products[:, :head].copy())] if head else []
    if rows:
        pieces.append((0, products[:, head:tail].reshape(3, rows, period).sum(axis=1)))
    return [*pieces, (0, products[:, tail:].copy())]


def _cosines(dots: Array, first: Array, second: Array) -> Array:
    norms = np.sqrt(first) * np.sqrt(second)
    cosines: Array = np.clip(np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0), -1.0, 1.0)
    return cosines


def _shares(cosines: Array, t: float) -> tuple[Array, Array]:
    """The coefficients of both vectors, for every cosine."""
    theta = np.arccos(cosines)
    sine = np.sin(theta)
    apart = sine > _COLLINEAR
    divisor = np.where(apart, sine, 1.0)
    return (
        np.where(apart, np.sin((1 - t) * theta) / divisor, 1 - t),
        np.where(apart, np.sin(t * theta) / divisor, t),
    )
