"""OPCM: models merged one after the other, each without its part in the directions that are taken already."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from merganser import kernels
from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.errors import InputError, Place, RecipeError
from merganser.methods._base import About, Method
from merganser.methods._block import Block, Context
from merganser.methods._options import list_option, option

__all__ = ["Opcm"]


@dataclass(frozen=True)
class OpcmState:
    """What the passes before the merge found.

    Attributes:
        norms: those of the task vectors, over the whole model.
        total: the norm of the sum of the cleaned task vectors.
    """

    norms: tuple[float, ...]
    total: float

    @property
    def factor(self) -> float:
        """What brings the sum to the mean norm of the task vectors."""
        return math.fsum(self.norms) / len(self.norms) / self.total if self.total > 0 else 0.0


@dataclass(frozen=True)
class Opcm(Method, name="opcm"):
    """Orthogonal projection-based continual merging: ``W = W_0 + scale S mean_i ||t_i|| / ||S||``.

    S is the running sum of cleaned task vectors; norms are over the whole model. Weights of linear layers take
    ``S <- S + t - U K V'`` with the thin SVD ``S = U diag(s) V'`` and ``M = U' t V``: K is M in its leading block
    ``[:r, :r]``, and the diagonal of M outside of it, else 0. r is the number of leading singular values whose
    cumulative share of ``sum(s)`` is at most `alpha`. All other tensors, embeddings among them: ``S <- S + t``.
    `weights` multiply the task vectors.

    The order of the models matters. This is the method of the paper without its rescaling at every step, which cancels.
    Directions whose singular value is zero to rounding have no diagonal entry in M: there S is empty, and U and V
    would be arbitrary.

    ``keep_diagonal=True`` leaves the diagonal alone, as the first released code did by mistake.

    A model is added to an earlier merge without the others by ``onto=`` (``--onto``): S is the earlier result's task
    vector times what its lock file says. That is the merge of all in that order, up to the rounding of the earlier
    result to its type; `earlier` then holds that merge's ||S||, scale, precision and ||t_1||, ||t_2||, ...

    Two passes with one SVD per matrix and arriving model in each: O(models out in min(out, in)). That of a float32
    matrix comes from the eigenvectors of its smaller Gram matrix in float64, which is faster and no less exact. Memory
    of one matrix and its factors.
    """

    alpha: float = option(0.5, "share of the singular values whose directions are taken", ge=0.0, le=1.0)
    keep_diagonal: bool = option(False, "keep the diagonal outside of the leading block, as the first code did")
    earlier: tuple[float, ...] = list_option((), "what an earlier merge remembers; set by `onto`", whole=False)

    about = About(
        title="Models one after the other, each without its part in the directions that are taken already",
        equation="S <- S + t_i - U K V',  K = (U' t_i V on the leading block and the diagonal);  "
        "W = W_0 + lambda S mean_i ||t_i|| / ||S||",
        source="Tang et al., Merging models on the fly without retraining (OPCM), 2025, arXiv:2501.09522",
        helps="Models that arrive one by one: a new one is added to the merge without the earlier ones.",
        hurts="The order matters; one SVD per matrix and model.",
        work=60,
        passes=2,
        deviations="The first release does not remove the diagonal (keep_diagonal=true); FusionBench does.",
    )
    scope = "model"
    needs = frozenset({"base"})
    symmetric = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 < len(self.earlier) < 4:
            raise RecipeError("E0306", "`earlier` has too few numbers", places=Place(key="earlier"))

    def whole(self, spec: BlockSpec, statistics: frozenset[str]) -> bool:
        """Matrices that are not embeddings."""
        return len(spec.shape) == 2 and spec.role in (Role.LINEAR, Role.HEAD) and spec.numel > 0

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """The factors in float64 and in the compute type, products with them, and the Gram matrix or the SVD's own."""
        return 9 * spec.numel + 10 * min(spec.shape) ** 2

    def buffers(self, models: int) -> int:
        """The sum, the arriving task vector, and two for the float64 pieces of norms."""
        return 4

    def memory(self, state: OpcmState) -> Mapping[str, Any]:
        """The norms of all task vectors and of their sum."""
        return {"norms": list(state.norms), "sum": state.total, "scale": self.scale}

    def resumed(self, memory: Mapping[str, Any]) -> Opcm:
        """This method, going on from an earlier sum.

        Raises:
            InputError: E0421, the scale was 0, so that nothing of the earlier models is left.
        """
        if memory["scale"] == 0:
            raise InputError("E0421", "the earlier merge had the scale 0: nothing of its models is left in it")
        return replace(self, earlier=(memory["sum"], memory["scale"], memory["precision"], *memory["norms"]))

    def _check_earlier(self, norm: float, base: float) -> None:
        """Check that the first model is what the earlier merge made from this base.

        Raises:
            InputError: E0421, its distance from the base is not that of the earlier result.
        """
        _, scale, precision, *norms = self.earlier
        expected = abs(scale) * math.fsum(norms) / len(norms)
        if abs(norm**2 - expected**2) > 0.02 * expected**2 + (precision * base) ** 2:
            raise InputError(
                "E0421",
                f"the earlier merge lies {norm:g} from this base; its lock file says {expected:g}",
                why="the base is another one, or the weights or the selection of tensors were changed",
                fix="give the base that the earlier merge was made with",
            )

    def prepare(self, context: Context) -> OpcmState:
        """The norms of the task vectors and of the sum."""
        parts = [values for _, values in context.each(self._squares, as_merged=True)]
        *norms, total, base = (math.sqrt(kernels.exact_sum(column)) for column in zip(*parts, strict=True))
        if self.earlier:
            self._check_earlier(norms[0], base)
            norms[:1] = self.earlier[3:]
        return OpcmState(tuple(norms), total)

    def _squares(self, block: Block) -> list[kernels.Partials]:
        """Sums of squares of the task vectors and, last, of the sum of the cleaned ones and of the base."""
        found: list[kernels.Partials] = []
        total = self._sum(block, found)
        return [*found, kernels.chunk_squares(total), kernels.chunk_squares(block.base)]

    def _weight(self, block: Block, index: int) -> float:
        """What a task vector is multiplied by: its weight, or what makes the earlier sum of the earlier result."""
        if index or not self.earlier:
            return block.weights[index]
        total, scale, _, *norms = self.earlier
        size = scale * math.fsum(norms) / len(norms)
        return total / size if size else 0.0

    def _sum(self, block: Block, squares: list[kernels.Partials] | None = None) -> torch.Tensor:
        """The sum of the cleaned task vectors; the squares of the task vectors are added to `squares`."""
        total = block.buffer("sum").zero_()
        matrix = self.whole(block.spec, frozenset())
        for index in range(len(block.weights)):
            delta = block.delta(index, slot=0)
            resumed = index == 0 and bool(self.earlier)
            if squares is not None and resumed:
                squares.append(kernels.chunk_squares(delta))
            weight = self._weight(block, index)
            if weight != 1:
                delta.mul_(weight)
            if squares is not None and not resumed:
                squares.append(kernels.chunk_squares(delta))
            if matrix and index:
                shape = block.spec.shape
                delta.view(shape).sub_(self._taken(total.view(shape), delta.view(shape)))
            total.add_(delta)
        return total

    def _taken(self, total: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        """``U K V'``: the part of a task vector in the directions that the sum has taken."""
        u, s, v = _thin_svd(total)
        rounding = max(16 * torch.finfo(total.dtype).eps, max(total.shape) * torch.finfo(s.dtype).eps)
        rank = int((s > s[0] * rounding).sum())
        if not rank:
            return torch.zeros_like(delta)
        leading = min(rank, int((s.cumsum(0) / s.sum() <= self.alpha + rounding).sum()))
        u, v = u[:, :rank].to(delta), v[:, :rank].to(delta)
        product = delta @ v
        taken: torch.Tensor = u[:, :leading] @ (u[:, :leading].mT @ product[:, :leading]) @ v[:, :leading].mT
        if not self.keep_diagonal:
            rest = u[:, leading:]
            taken += (rest * (rest * product[:, leading:]).sum(dim=0)) @ v[:, leading:].mT
        return taken

    def merge(self, block: Block, state: OpcmState) -> torch.Tensor:
        """The base plus the sum, scaled to the mean norm of the task vectors."""
        return self._sum(block).mul_(self.scale * state.factor).add_(block.base)


def _thin_svd(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x = U diag(s) V'`` in float64, singular values descending.

    Of a float32 matrix s is exact to 1e-8 of the largest, finer than float32 itself; columns of V for smaller ones are
    not of unit length.
    """
    if x.dtype == torch.float64:
        u, s, vh = torch.linalg.svd(x, full_matrices=False)
        return u, s, vh.mT
    if x.shape[0] > x.shape[1]:
        v, s, u = _thin_svd(x.mT)
        return u, s, v
    wide = x.double()
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    s, u = squares.flip(0).clamp_(min=0).sqrt_(), vectors.flip(1)
    return u, s, (wide.mT @ u).div_(s.clamp(min=torch.finfo(s.dtype).tiny))
