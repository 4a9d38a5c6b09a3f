"""TSV-Merge: the leading singular directions of every task vector, made orthogonal to one another."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._matrices import MatrixMethod
from merganser.methods._options import option
from merganser.methods._spectral import join, matrix_delta, polar, svd_elements, thin_svd

__all__ = ["Tsv"]


@dataclass(frozen=True)
class Tsv(MatrixMethod, name="tsv"):
    """``T = P(U) S P(V)'``, where U, S, V join the leading singular triples of every task vector.

    Each ``w_i t_i = U_i S_i V_i'`` contributes its ``floor(r / n)`` largest triples, r being the smaller side of the
    matrix and n the number of models. ``P(X) = X (X' X)^(-1/2)`` is the orthogonal matrix nearest to X (Procrustes).
    Joined in one matrix each, U and V hold directions of several tasks that overlap; P removes the overlap.

    With ``lossless`` every task contributes all its triples. Triples of a zero singular value are left out, so a model
    equal to the base adds nothing but its share. More models than r leave no triple to any: the matrix stays the
    base's. Matrices only, whatever their role; all other tensors take the mean of the task vectors.

    In float64, by eigendecompositions of Gram matrices where the inputs are float32. O(m n r) per model for a
    matrix ``[m, n]``, and twice that for P; one task vector at a time is in memory.
    """

    lossless: bool = option(False, "keep all triples of every task, not an equal share of the matrix's rank")

    about = About(
        title="Truncate each task vector's singular values, then decorrelate the singular vectors of all tasks",
        equation="W = W_0 + lambda P([U_1..U_n]) diag(S_1..S_n) P([V_1..V_n])',  P(X) = X (X' X)^(-1/2)",
        source="Gargiulo et al., Task Singular Vectors, CVPR 2025, arXiv:2412.00081",
        helps="No data and no tuning (scale 1): a strong default for many fully fine-tuned vision models.",
        hurts="Language models in the wild, where it loses to task arithmetic; more models than the rank of a matrix.",
        work=8000,
        deviations="The authors whiten by singular value or by eigendecomposition, which agree. Where a task has fewer "
        "directions than its share, or tasks coincide, other implementations add arbitrary vectors of the null space; "
        "here there are none. FusionBench computes the lossless variant in float32.",
    )

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """Decompositions, and the joined singular vectors before and after."""
        rows, columns = spec.shape
        joined = min(rows, columns) * (models if self.lossless else 1)
        return svd_elements(rows, columns) + 8 * (rows + columns) * joined

    def merge_matrix(self, block: Block) -> torch.Tensor:
        """One matrix."""
        dtype = block.base.dtype
        smaller = min(block.spec.shape)
        share = smaller if self.lossless else smaller // len(block.weights)
        triples = [thin_svd(matrix_delta(block, index), dtype, share) for index in range(len(block.weights))]
        left, values, right = join(triples)
        block.report(directions=len(values))
        return (polar(left, dtype) * values) @ polar(right, dtype)
