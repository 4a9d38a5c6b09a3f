"""WIDEN: weigh every column of a weight by how much its magnitude and its direction changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import option

__all__ = ["Widen"]


@dataclass(frozen=True)
class Widen(Method, name="widen"):
    """``W[:, c] = W_0[:, c] + scale sum_i w_i s_ic (W_i - W_0)[:, c]`` with a score s_ic for every column c.

    A column belongs to one input; of an embedding, to one token. Its magnitude is m = ||W[:, c]||, its direction
    W[:, c] / m. Per matrix and model the changes ``|m_i - m_0|`` and ``1 - cos(D_i, D_0)`` are ranked over the d
    columns, ``r = rank / d``. The score is the softmax of r over the models; where ``r > threshold mean(r)`` it is
    `score` instead. s_ic is the mean of the scores of magnitude and direction. Vectors and scalars have one score per
    entry, from ``|t_i|`` in the place of r. Other tensors (convolutions) take the mean of the task vectors.

    Scores are not normalised: with threshold = score = 1 every model adds its full task vector in the columns that it
    changed more than average. Columns that are zero in the base or in a model have no direction and rank last.

    ``direction="chord"`` computes ``1 - cos`` as ``(a c - b^2) / (m_i m_0 (m_i m_0 + b + c))`` from a = ||t||^2,
    b = <t, W_0> and c = ||W_0||^2 in float64, which is exact for nearly parallel columns too. ``"cosine"`` subtracts
    the rounded cosine from 1, as the released code does: in float32 the ranks of small changes are then noise.

    Two passes, O(models x elements) + O(models x d log d) per matrix; memory O(models x columns of the model).
    """

    threshold: float = option(1.0, "multiple of the mean rank above which a column counts as important", ge=0.0)
    score: float = option(1.0, "weight of important columns", ge=0.0)
    direction: str = option("chord", "how the change of direction is computed", choices=("chord", "cosine"))

    about = About(
        title="Weigh every column by how much its magnitude and its direction changed",
        equation="W[:, c] = W_0[:, c] + lambda sum_i s_ic t_i[:, c],  s_ic = softmax_i(rank) or `score` if important",
        source="Yu et al., Extend model merging from fine-tuned to pre-trained LLMs (WIDEN), 2024, arXiv:2408.03092",
        helps="Language models that were trained further with large changes, together with fine-tuned ones.",
        hurts="Many models: the scores are not normalised, so that their sum grows; lower the scale.",
        work=40,
        passes=2,
        deviations="The released code takes 1 - cos in float32 (direction=cosine); small changes then rank by noise.",
    )
    scope = "model"
    needs = frozenset({"base"})

    def buffers(self, models: int) -> int:
        """The task vectors, and three for the sum and for pieces in float64."""
        return models + 3

    def prepare(self, context: Context) -> Mapping[str, torch.Tensor]:
        """For matrices the scores ``[models, columns]``, for vectors the mean ``|t_i|`` of every model."""
        state: dict[str, torch.Tensor] = {}
        parts = context.each(_measure)
        for name, group in itertools.groupby(parts, key=lambda part: part[0].name):
            spec = context.specs[name]
            found = itertools.chain.from_iterable(map(itemgetter(1), group))
            if len(spec.shape) == 2:
                sums = torch.zeros(2 * context.models + 1, _columns(spec), dtype=torch.float64)
                for column, values in found:
                    sums[:, column : column + values.shape[1]] += values
                state[name] = self._column_scores(sums, spec.shape[0], context.dtype)
            elif len(spec.shape) < 2:
                own: list[list[kernels.Partials]] = [[] for _ in range(context.models)]
                for index, values in found:
                    own[index].append(values.numpy())
                totals = [kernels.exact_sum(parts) for parts in own]
                state[name] = torch.tensor(totals, dtype=torch.float64) / max(1, spec.numel)
        return state

    def _column_scores(self, sums: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """The scores of a matrix's columns, from ``||W_0||^2`` and every model's ``||t||^2`` and ``<t, W_0>``.

        Columns that are parallel up to the rounding of these sums have the same direction.
        """
        c, a, b = sums[0], sums[1::2], sums[2::2]
        before, after = c.sqrt(), (c + 2 * b + a).clamp(min=0).sqrt()
        magnitude = (2 * b + a).abs() / (before + after)
        both = before * after
        if self.direction == "chord":
            apart = a * c - b * b
            noise = (8 + math.sqrt(rows)) * torch.finfo(apart.dtype).eps * a * c
            direction = torch.where(apart > noise, apart, 0.0) / (both * (both + b + c))
            direction = torch.where(b + c > 0, direction, 1 - (b + c) / both)
        else:
            direction = (1 - ((b + c) / both).to(dtype)).double()
        direction = torch.where(both > 0, direction, torch.inf)
        magnitude = torch.where(before + after > 0, magnitude, 0.0)
        return ((self._by_rank(magnitude) + self._by_rank(direction)) / 2).to(dtype)

    def _by_rank(self, change: torch.Tensor) -> torch.Tensor:
        """Scores from the ranks of the changes among the columns of each model."""
        d = change.shape[1]
        order = torch.argsort(change, dim=1, stable=True)
        ranks = torch.empty_like(order)
        ranks.scatter_(1, order, torch.arange(d).expand_as(order))
        shares = torch.softmax(ranks.double() / d, dim=0)
        # 2 rank > threshold (d - 1) says that rank / d exceeds the threshold times its mean, without rounding
        return torch.where(2 * ranks > self.threshold * (d - 1), self.score, shares)

    def merge(self, block: Block, state: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The base plus the weighted task vectors."""
        total = block.buffer("total").zero_()
        known = state.get(block.key.name)
        if known is None:
            for index, weight in enumerate(block.weights):
                total.add_(block.delta(index, slot=0), alpha=weight / sum(block.weights))
        elif len(block.spec.shape) == 2:
            for index, weight in enumerate(block.weights):
                delta = block.delta(index, slot=0)
                _multiply(block, delta, known[index].to(delta.device))
                total.add_(delta, alpha=weight)
        else:
            self._merge_vector(block, known, total)
        return total.mul_(self.scale).add_(block.base)

    def _merge_vector(self, block: Block, means: torch.Tensor, total: torch.Tensor) -> None:
        deltas = block.deltas()
        for first in range(0, total.numel(), kernels.CHUNK):
            pieces = torch.stack([delta[first : first + kernels.CHUNK].double() for delta in deltas])
            changes = pieces.abs()
            limits = self.threshold * means.to(pieces.device).unsqueeze(1)
            scores = torch.where(changes > limits, self.score, torch.softmax(changes, dim=0))
            weights = torch.tensor(block.weights, dtype=torch.float64, device=pieces.device).unsqueeze(1)
            total[first : first + kernels.CHUNK].copy_(pieces.mul_(scores).mul_(weights).sum(dim=0))


def _columns(spec: BlockSpec) -> int:
    return spec.shape[0 if spec.role is Role.EMBEDDING else 1]


def _measure(block: Block) -> list[tuple[int, torch.Tensor]]:
    """What the scores need of a block: sums over parts of columns, or of magnitudes, always over the same chunks.

    Returns:
        For a matrix the first column and ``[||W_0||^2, ||t_1||^2, <t_1, W_0>, ...]`` of it and of following columns,
        in the order in which they are to be added up; for a vector every model's index and sums of magnitudes.
    """
    if len(block.spec.shape) < 2:
        sums = [kernels.chunk_l1(block.delta(index, slot=0)) for index in range(len(block.weights))]
        return [(index, torch.from_numpy(values)) for index, values in enumerate(sums)]
    if len(block.spec.shape) > 2:
        return []
    found: list[tuple[int, torch.Tensor]] = []
    deltas = block.deltas()
    for first in range(0, block.base.numel(), kernels.CHUNK):
        chunk = slice(first, first + kernels.CHUNK)
        base = block.base[chunk].double()
        products = [base * base]
        for delta in deltas:
            piece = delta[chunk].double()
            products += [piece * piece, piece * base]
        for column, part, rows in _runs(block, first, first + base.numel()):
            local = slice(part.start - first, part.stop - first)
            summed = [_summed(product[local], rows, block.spec) for product in products]
            found.append((column, torch.stack(summed).cpu()))
    return found


def _summed(x: torch.Tensor, rows: int, spec: BlockSpec) -> torch.Tensor:
    """Sums over the parts of columns in a run of whole rows, or in a part of one row."""
    if spec.role is Role.EMBEDDING:
        return x.view(max(1, rows), -1).sum(dim=1)
    return x.view(rows, -1).sum(dim=0) if rows else x


def _runs(block: Block, start: int, stop: int) -> Iterator[tuple[int, slice, int]]:
    """Elements [start, stop) of a block, cut at the rows of the matrix: part of a row, whole rows, part of a row.

    Yields:
        The first column, the elements, and the number of rows (0 for a part of one).
    """
    width = block.spec.shape[1]
    by_row = block.spec.role is Role.EMBEDDING
    first, last = block.key.start + start, block.key.start + stop
    edges = [first, min(last, -(-first // width) * width)]
    edges += [max(edges[1], last // width * width), last]
    for low, high, whole in zip(edges, edges[1:], (False, True, False), strict=False):
        if low < high:
            column = low // width if by_row else low % width
            part = slice(low - block.key.start, high - block.key.start)
            yield column, part, (high - low) // width if whole else 0


def _multiply(block: Block, delta: torch.Tensor, scores: torch.Tensor) -> None:
    """Multiply every column of a block of a matrix by its score, in place."""
    for column, part, rows in _runs(block, 0, delta.numel()):
        piece = delta[part].view(max(1, rows), -1)
        if block.spec.role is Role.EMBEDDING:
            piece.mul_(scores[column : column + len(piece)].unsqueeze(1))
        else:
            piece.mul_(scores[column : column + piece.shape[1]])
