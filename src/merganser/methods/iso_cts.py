"""Iso-CTS: a flat spectrum over directions common to the tasks and directions of their own."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._matrices import MatrixMethod
from merganser.methods._options import option
from merganser.methods._spectral import Triple, join, matrix_delta, polar, svd_elements, thin_svd
from merganser.operators import rank_tolerance

__all__ = ["IsoCts"]

_ROUNDING = 1e-10
"""The error of a projection, relative to the norm of what is projected."""


@dataclass(frozen=True)
class IsoCts(MatrixMethod, name="iso_cts"):
    """``T = mean(s) P([U_1..U_n U_c]) P([V_1..V_n V_c])'``: common and task-specific directions, all as strong.

    1. ``U_c, s_c, V_c``: the k leading singular triples of ``sum_i w_i t_i``.
    2. ``U_i, s_i, V_i``: the s leading triples of ``(I - U_c U_c') w_i t_i``, what the common space lacks of task i.
    3. P is the nearest orthogonal matrix (see `tsv`), and the mean is over all r values of s_c and s_1..s_n.

    Of ``r = min(m, n)`` directions, ``s = round((r - int(common r)) / models)`` go to each task (halves to even) and
    the other ``k = r - s models`` are common. Triples of a zero singular value are left out. Matrices only, whatever
    their role; all other tensors take the mean of the task vectors.

    In float64, by eigendecompositions of Gram matrices where the inputs are float32; step 2 works in the complement of
    ``U_c``, which is small unless m exceeds n. O(m n r) per model at most. Reads the models twice.
    """

    common: float = option(0.8, "share of the directions that are common to all tasks", ge=0.0, le=1.0)

    about = About(
        title="Iso-C in common directions, with task-specific directions added at equal strength",
        equation="W = W_0 + lambda mean(s) P([U_1..U_n U_c]) P([V_1..V_n V_c])'",
        source="Marczak et al., No task left behind: isotropic model merging, ICML 2025, arXiv:2502.04959",
        helps="Many fully fine-tuned vision models, more than eight above all; tune the scale (1.1 to 1.9).",
        hurts="Low-rank adapters and models in the wild: rounding noise is raised to the level of the signal.",
        work=5000,
        passes=2,
        deviations="Other implementations give zero singular values arbitrary singular vectors, and raise these too.",
    )

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Decompositions, a complement, and the joined singular vectors before and after."""
        rows, columns = spec.shape
        small = min(rows, columns)
        return svd_elements(rows, columns) + 8 * (rows + columns) * small + 4 * small * small

    def merge_matrix(self, block: Block) -> torch.Tensor:
        """One matrix."""
        dtype, models, smaller = block.base.dtype, len(block.weights), min(block.spec.shape)
        own = min(round((smaller - int(smaller * self.common)) / models), smaller // models)
        total, floor = torch.zeros((), dtype=torch.float64), 0.0
        for index in range(models):
            delta = matrix_delta(block, index)
            floor += _floor(delta, dtype)
            total = delta.add_(total)
        common = thin_svd(total, dtype, smaller - own * models, floor=floor)
        triples = [*self._own(block, common[0], own), common] if own else [common]
        left, values, right = join(triples)
        return (polar(left, dtype) @ polar(right, dtype)).mul_(values.sum() / smaller)

    def _own(self, block: Block, common: torch.Tensor, count: int) -> list[Triple]:
        """For every task the leading triples of what its task vector has outside the common space ``[m, k]``."""
        rows, columns = block.spec.shape
        dtype = block.base.dtype
        small = rows - common.shape[1] < columns
        complement = torch.linalg.qr(common, mode="complete").Q[:, common.shape[1] :] if small else common
        triples: list[Triple] = []
        for index in range(len(block.weights)):
            delta = matrix_delta(block, index)
            floor = _floor(delta, dtype)
            within = complement.mT @ delta
            if small:
                left, values, right = thin_svd(within, dtype, count, floor=floor)
                triples.append((complement @ left, values, right))
            else:
                triples.append(thin_svd(delta.sub_(common @ within), dtype, count, floor=floor))
        return triples


def _floor(delta: torch.Tensor, dtype: torch.dtype) -> float:
    """What rounding leaves of a task vector ``[m, n]`` where it cancels."""
    return max(_ROUNDING, rank_tolerance(dtype, max(delta.shape))) * float(torch.linalg.vector_norm(delta))
