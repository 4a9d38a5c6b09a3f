"""Iso-C: the sum of the task vectors with a flat spectrum."""

from __future__ import annotations

from dataclasses import dataclass

from merganser._torch import torch
from merganser.blocks import BlockSpec
from merganser.methods._base import About
from merganser.methods._block import Block
from merganser.methods._matrices import MatrixMethod
from merganser.methods._spectral import matrix_delta, svd_elements, thin_svd

__all__ = ["IsoC"]


@dataclass(frozen=True)
class IsoC(MatrixMethod, name="iso_c"):
    """``T = mean(s) U V'``, where ``sum_i w_i t_i = U diag(s) V'``.

    The mean is over all ``r = min(m, n)`` singular values; every direction of the sum gets it, those of a zero singular
    value (which have no singular vectors of their own) excepted. Matrices only, whatever their role; all other tensors
    take the mean of the task vectors.

    In float64, by the eigendecomposition of a Gram matrix where the inputs are float32. O(m n r) for ``[m, n]``.
    """

    about = About(
        title="Sum the task vectors, and set all singular values of the sum to their mean",
        equation="W = W_0 + lambda mean(s) U V',  sum_i t_i = U diag(s) V'",
        source="Marczak et al., No task left behind: isotropic model merging, ICML 2025, arXiv:2502.04959",
        helps="Many fully fine-tuned vision models or T5; tune the scale on validation data (0.9 to 1.5).",
        hurts="Low-rank adapters and models in the wild: rounding noise is raised to the level of the signal.",
        work=1500,
        deviations="Other implementations give zero singular values arbitrary singular vectors, and raise these too.",
    )

    def workspace(self, spec: BlockSpec, models: int) -> int:
        """The sum, its decomposition and its polar factor."""
        return svd_elements(*spec.shape) + 4 * spec.numel

    def merge_matrix(self, block: Block) -> torch.Tensor:
        """One matrix."""
        total = matrix_delta(block, 0)
        for index in range(1, len(block.weights)):
            total.add_(matrix_delta(block, index))
        left, values, right = thin_svd(total, block.base.dtype)
        return (left @ right).mul_(values.sum() / min(block.spec.shape))
