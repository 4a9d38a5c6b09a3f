"""Arcee Fusion: take from a model the entries whose change is exceptionally important."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._rows import chunks, row_cuts, spread
from merganser.methods._select import Values
from merganser.methods._tensor_select import tensor_thresholds

__all__ = ["ArceeFusion"]

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FusionState:
    """Per tensor the divergence of every row, and the importance from which entries are taken."""

    divergences: Mapping[str, Array]
    thresholds: Mapping[str, float]


@dataclass(frozen=True)
class ArceeFusion(Method, name="arcee_fusion"):
    """``W = W_1`` where the importance is at least ``Q2 + 1.5 (Q3 - Q1)`` of its tensor, else ``W_0``.

    The importance of an entry is ``|W_1 - W_0| KL(softmax(row of W_1) || softmax(row of W_0))``; rows run along the
    last dimension, and the quartile q of n entries is the one of rank ``floor(q (n - 1))``, from 0. With a
    scale other than 1 the entries that are taken move by ``scale (W_1 - W_0)``.

    Divergences are computed in float64, as ``E_p[d] + log E_p[exp(-d)]`` with p the softmax of the model's row and d
    its difference, which does not cancel for small d. Quartiles are exact, by radix selection. Passes: one for the
    divergences, two for the quartiles, one to merge. O(elements); memory of one number per row.
    """

    about = About(
        title="Take the entries whose change, times the divergence of their row, is an outlier",
        equation="W = W_1 where |W_1 - W_0| KL(row) >= Q2 + 1.5 (Q3 - Q1), else W_0",
        source="Arcee, arcee_fusion, 2025; mergekit",
        helps="Distillates and other models from which only the main changes are wanted.",
        hurts="Changes that act together in many small steps: they are cut off one by one.",
        work=60,
        passes=4,
        deviations="mergekit computes the divergences in the storage type or float32, where those of fine-tunes are "
        "mostly rounding errors; entries near the threshold then differ.",
    )
    scope = "model"
    needs = frozenset({"base"})
    arity = (1, 1)

    def buffers(self, models: int) -> int:
        """Model and importance, and in the first pass copies and exponentials in float64."""
        return 12

    def prepare(self, context: Context) -> FusionState:
        """The divergences of all rows, then the thresholds of all tensors."""
        parts: dict[str, list[tuple[int, Array]]] = defaultdict(list)
        for key, pieces in context.each(_row_sums):
            parts[key.name] += pieces
        divergences = {name: _divergences(context.specs[name], parts[name]) for name in context.specs}
        importances = Values(lambda block, models: iter((_importance(block, divergences[block.key.name]),)))
        found = tensor_thresholds(context, lambda name, _: [_kept(context.specs[name].numel)], importances, models=1)
        thresholds = {
            name: q2.value + 1.5 * (q3.value - q1.value)
            for name, ((q1, q2, q3),) in found.items()
            if context.specs[name].numel
        }
        return FusionState(divergences, thresholds)

    def merge(self, block: Block, state: FusionState) -> torch.Tensor:
        """Model or base, entry by entry."""
        name = block.key.name
        if not block.base.numel():
            return block.base.clone()
        taken = kernels.at_least(_importance(block, state.divergences[name]), state.thresholds[name])
        factor = self.scale * block.weights[0]
        if factor != 1:
            return block.delta(0, slot=0).mul_(factor).mul_(taken).add_(block.base)
        return torch.where(taken.bool(), block.model(0, slot=0), block.base)


def _length(spec: BlockSpec) -> int:
    """Entries per row; a scalar is a row of one."""
    return max(1, spec.shape[-1]) if spec.shape else 1


def _row_sums(block: Block) -> list[tuple[int, Array]]:
    """Per chunk, from which row on, and for every row in it: m, and the sums of e, e d and e expm1(-d).

    Here ``e = exp(a - m)``, a the model's entries, m the largest of them in the row and chunk.
    """
    length = _length(block.spec)
    base, model = block.base.cpu().numpy(), block.model(0, slot=0).cpu().numpy()
    buffers = np.empty((4, min(kernels.CHUNK, model.size)))
    pieces = []
    for start, first, last in chunks(block):
        row, cuts = row_cuts(start, start + last - first, length)
        a, d, e, product = buffers[:, : last - first]
        a[:], d[:] = model[first:last], base[first:last]
        np.subtract(a, d, out=d)
        highest = np.maximum.reduceat(a, cuts)
        np.subtract(a, np.repeat(highest, np.diff(cuts, append=last - first)), out=e)
        torch.from_numpy(e).exp_()  # several numbers at a time, unlike numpy
        sums = [np.add.reduceat(e, cuts), np.add.reduceat(np.multiply(e, d, out=product), cuts)]
        with np.errstate(over="ignore"):
            np.expm1(np.negative(d, out=d), out=d)
            sums.append(np.add.reduceat(np.multiply(e, d, out=d), cuts))
        pieces.append((row, np.stack([highest, *sums])))
    return pieces


def _divergences(spec: BlockSpec, pieces: list[tuple[int, Array]]) -> Array:
    """``KL(p || q)`` of every row, from the sums over its chunks in their order."""
    rows = spec.numel // _length(spec)
    highest, sums = np.full(rows, -np.inf), np.zeros((3, rows))
    for row, piece in pieces:
        part = slice(row, row + piece.shape[1])
        largest = np.maximum(highest[part], piece[0])
        sums[:, part] = sums[:, part] * np.exp(highest[part] - largest) + piece[1:] * np.exp(piece[0] - largest)
        highest[part] = largest
    total, difference, change = sums
    found: Array = np.maximum(0.0, difference / total + np.log1p(change / total))
    return found


def _importance(block: Block, divergences: Array) -> torch.Tensor:
    """Of every entry; overwrites the task vector."""
    delta = block.delta(0, slot=0).abs_()
    if not delta.numel():
        return delta
    return torch.mul(delta, spread(divergences, block, _length(block.spec), delta), out=block.buffer("importance"))


def _kept(numel: int) -> list[int]:
    """How many entries are not below each quartile, which is the entry of the 0-based rank ``q (numel - 1) / 4``."""
    last = numel - 1
    return [max(0, numel - rank) for rank in (last // 4, last // 2, 3 * last // 4)]
