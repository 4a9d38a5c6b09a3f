"""DC-Merge: task vectors cut to the strongest entries of a basis that covers the directions of all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._matrices import MatrixMethod
from merganser.methods._options import option
from merganser.methods._spectral import Triple, join, matrix_delta, polar, svd_elements, thin_svd

__all__ = ["DcMerge"]

_EQUAL = 1e-9
"""Up to which relative difference magnitudes are equal: smoothing makes many so, up to rounding."""


@dataclass(frozen=True)
class DcMerge(MatrixMethod, name="dc_merge"):
    """``T = A (B o M) C'``: a sign-elected mean in the basis that covers all tasks' directions, block by block.

    1. Truncate: keep the k leading singular triples ``U_i s_i V_i'`` of each ``w_i t_i``.
    2. Smooth their singular values, keeping the sum: not at all, to their mean, or to a line that falls from
       ``min(rho, s_1 / s_k)`` to 1.
    3. Cover: ``A = P([U_1..U_n])`` and ``C = P([V_1..V_n])``, P the nearest orthogonal matrix (see `tsv`).
    4. Project: ``M_i = A' U_i s_i V_i' C``; keep the share `density` of its entries that is largest in magnitude.
    5. B is the mean of the ``M_i`` over those whose sign is that of their sum; M is 1 in the n diagonal blocks that
       belong to one task's directions each.

    k is ``floor(r / models)``, r being the smaller side of the matrix, and the share is of r^2 entries; with `rank`
    (as low-rank adapters want it) it is that, and the share is of ``(models rank)^2`` entries. At least one entry is
    kept, and all that equal the smallest kept (to nine digits). Triples of a zero singular value are left out.
    Matrices only, whatever their role; all other tensors take the mean of the task vectors.

    In float64, by eigendecompositions of Gram matrices where the inputs are float32. O(m n r) per model for a matrix
    ``[m, n]``; one task vector at a time is in memory.
    """

    density: float = option(0.001, "share of the entries in the common basis that is kept", gt=0.0, le=1.0)
    rank: int = option(0, "directions per task; 0 for an equal share of the matrix's rank", ge=0)
    smoothing: str = option("none", "singular values per task", choices=("none", "average", "linear"))
    rho: float = option(5.0, "for smoothing=linear: the largest ratio of first to last", ge=1.0)

    about = About(
        title="Merge the strongest entries of truncated task vectors in a basis common to all",
        equation="W = W_0 + lambda A (M o mean{ top(A' t_i C) : sign agrees }) C',  A = P([U_1..U_n])",
        source="DC-Merge, CVPR 2026, arXiv:2603.06242",
        helps="Fully fine-tuned vision models; low-rank adapters with rank set to theirs and smoothing=average.",
        hurts="More models than the rank of a matrix, which is then left as it is in the base.",
        work=9000,
        deviations="The authors complete bases by arbitrary vectors where tasks have too few directions or coincide; "
        "here there are none. Their code for adapters has rank=16 and smooths, that for full models does not.",
    )

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Decompositions, joined singular vectors before and after, and entries in the common basis."""
        rows, columns = spec.shape
        small = min(rows, columns)
        return svd_elements(rows, columns) + 8 * (rows + columns) * small + 10 * small * small

    def merge_matrix(self, block: Block) -> torch.Tensor:
        """One matrix."""
        dtype, models, smaller = block.base.dtype, len(block.weights), min(block.spec.shape)
        share = smaller // models
        share, size = (min(self.rank, share), models * min(self.rank, share)) if self.rank else (share, smaller)
        triples = [self._smooth(thin_svd(matrix_delta(block, i), dtype, share)) for i in range(models)]
        left, values, right = join(triples)
        block.report(directions=len(values))
        left, right = polar(left, dtype), polar(right, dtype)
        stops = torch.tensor([len(own) for _, own, _ in triples]).cumsum(0).tolist()
        runs = [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]
        count = max(1, int(self.density * (size * size)))
        blocks = [_strongest(triple, left, right, count, runs) for triple in triples]
        core = left.new_zeros(len(values), len(values))
        for run, parts in zip(runs, zip(*blocks, strict=True), strict=True):
            core[run, run] = _elected_mean(torch.stack(parts))
        return left @ core @ right

    def _smooth(self, triple: Triple) -> Triple:
        left, values, right = triple
        if self.smoothing == "none" or not len(values):
            return triple
        top = min(self.rho, float(values[0] / values[-1])) if self.smoothing == "linear" else 1.0
        line = torch.linspace(top, 1.0, len(values), dtype=values.dtype, device=values.device)
        return left, values.sum() * line / line.sum(), right


def _strongest(
    triple: Triple, left: torch.Tensor, right: torch.Tensor, count: int, runs: Sequence[slice]
) -> list[torch.Tensor]:
    """The diagonal blocks of one task's entries in the common basis, without all but the `count` largest entries."""
    entries = (left.mT @ triple[0] * triple[1]) @ (triple[2] @ right.mT)
    if count < entries.numel():
        threshold = entries.abs().view(-1).kthvalue(entries.numel() - count + 1).values
        entries.mul_(entries.abs() >= threshold * (1 - _EQUAL))
    return [entries[run, run].clone() for run in runs]


def _elected_mean(entries: torch.Tensor) -> torch.Tensor:
    """The mean over the tasks of entries ``[n, k, k]`` whose sign is that of their sum; 0 where the sum is 0."""
    sign = entries.sum(dim=0).sign()
    agrees = (entries.sign() == sign) & (sign != 0)
    return (entries * agrees).sum(dim=0) / agrees.sum(dim=0).clamp(min=1)
