"""What the matching methods share: metrics from statistics, tensors as matrices, and the report of a solve."""

from __future__ import annotations

import math
from typing import Any

from merganser._torch import torch
from merganser.blocks import BlockSpec, Role
from merganser.methods._block import Block
from merganser.operators import Dense, Diagonal, Gram, Identity, Kronecker, LowRank, Operator
from merganser.solvers import Solution

__all__ = [
    "as_matrix",
    "check_sign",
    "figures",
    "from_matrix",
    "matrix_elements",
    "mean_model",
    "metric",
    "metrics",
    "report",
    "rescaled",
]

_ASYMMETRY = 1e-4
"""Largest difference of two mirrored entries, relative to the largest entry."""
_ROUNDING = 1e-6
"""Negative eigenvalues of this size, relative to the trace, come from rounding in float32."""


def as_matrix(block: Block, x: torch.Tensor) -> torch.Tensor:
    """The flat block as the weight ``[out, in]`` of a linear map; the inputs of a convolution are its patches."""
    shape = block.spec.shape
    if len(shape) < 2:
        return x
    matrix = x.view(shape[0], math.prod(shape[1:]))
    return matrix.mT.contiguous() if block.transposed else matrix


def from_matrix(block: Block, matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of `as_matrix`: flat, in the order of the stored tensor."""
    return (matrix.mT if block.transposed and matrix.dim() == 2 else matrix).reshape(-1)


def metric(block: Block, objective: str, index: int) -> Operator | None:
    """The metric of model `index` on ``as_matrix``, or None where its statistics were not collected.

    ========== ======================================
    identity   ``I``
    diagonal   ``diag(F)``
    gram       ``A (x) I``; none for embeddings, which are averaged as in RegMean and MaTS
    kfac       ``A (x) G``
    block      ``F``, d x d
    lowrank    ``Z'Z / n``
    ========== ======================================
    """
    shape = block.spec.shape
    if objective == "identity":
        return Identity.like(as_matrix(block, block.model(index)))
    if objective == "diagonal":
        fisher = block.statistic("fisher", index)
        if fisher is None:
            return None
        check_sign(block, index, fisher)
        return Diagonal(as_matrix(block, fisher))
    if objective == "block":
        matrix = block.statistic("block", index)
        if matrix is None:
            return None
        _check_gram(block, "block", index, matrix)
        return Dense(matrix, sizes=_sizes(block))
    if objective == "lowrank":
        rows = block.statistic("rows", index)
        return None if rows is None else LowRank(rows / math.sqrt(len(rows)), sizes=_sizes(block))
    gram = None if block.spec.role is Role.EMBEDDING else block.statistic("gram", index)
    if gram is None or gram.dim() == 1:  # the counts of rows that were looked up: an embedding, whatever its name
        return None
    _check_gram(block, "gram", index, gram)
    rows_out, columns = shape[0], math.prod(shape[1:])
    if block.transposed:
        rows_out, columns = columns, rows_out
    if objective == "gram":
        return Gram(gram, rows_out)
    output = block.statistic("output_gram", index)
    if output is None:
        return None
    _check_gram(block, "output_gram", index, output)
    return Kronecker(gram, output)


def metrics(block: Block, objective: str) -> list[Operator]:
    """The metrics of all models, or none where no model's statistics were collected.

    Raises:
        NumericError: E0604, some models have one and others have none.
    """
    found = [metric(block, objective, index) for index in range(len(block.weights))]
    known = [one for one in found if one is not None]
    if known and len(known) < len(found):
        raise block.fault(
            objective, found.index(None), f"the statistics of `{block.spec.name}` are of another form in this model"
        )
    return known


def check_sign(block: Block, index: int | None, fisher: torch.Tensor) -> None:
    """Refuse a Fisher with negative values.

    Args:
        block: whose Fisher it is.
        index: the model; None for the base.
        fisher: its values.

    Raises:
        NumericError: E0604.
    """
    if fisher.numel() and float(fisher.min()) < 0:
        raise block.fault(
            "fisher", index, f"the Fisher of `{block.spec.name}` has negative values, which no square has"
        )


def _check_gram(block: Block, kind: str, index: int, matrix: torch.Tensor) -> None:
    """Refuse a matrix that no Gram matrix can be, asymmetric or indefinite beyond its rounding, and inputs of zero.

    Raises:
        NumericError: E0604.
    """
    what = f"the {kind} of `{block.spec.name}`"
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    if (
        kind == "gram" and not size and matrix.numel()
    ):  # gradients may be zero: of queries that see one key, for example
        raise block.fault(kind, index, f"{what} is zero: no input ever reached it")
    if float((matrix - matrix.mT).abs().max() if size else 0.0) > _ASYMMETRY * size:
        raise block.fault(kind, index, f"{what} is not symmetric")
    shifted = matrix.to(torch.promote_types(matrix.dtype, torch.float32), copy=True)
    shifted.diagonal().add_(_ROUNDING * matrix.diagonal().abs().sum() + torch.finfo(shifted.dtype).tiny)
    if int(torch.linalg.cholesky_ex(shifted).info):
        raise block.fault(kind, index, f"{what} has negative eigenvalues, which no sum of squares has")


def _sizes(block: Block) -> tuple[int, ...] | None:
    shape = block.spec.shape
    return None if len(shape) < 2 else (shape[0], math.prod(shape[1:]))


def mean_model(block: Block) -> torch.Tensor:
    """``sum_i w_i W_i / sum_i w_i``, in a buffer of its own."""
    divisor = math.fsum(block.weights)
    total = block.buffer("mean").zero_()
    for index, weight in enumerate(block.weights):
        total.add_(block.model(index, slot=0), alpha=weight / divisor)
    return total


def rescaled(block: Block, merged: torch.Tensor, scale: float) -> torch.Tensor:
    """``W_0 + scale (W - W_0)``."""
    return merged if scale == 1 else merged.sub(block.base).mul_(scale).add_(block.base)


def report(block: Block, solution: Solution) -> None:
    """Record how a block's solve ended."""
    block.report(**figures(solution))


def figures(solution: Solution) -> dict[str, Any]:
    """How a solve ended, as plain data."""
    return {
        "status": solution.status.value,
        "iterations": solution.iterations,
        "residual": solution.residual,
        "smallest": solution.smallest,
        "largest": solution.largest,
        "ridge": solution.ridge,
        "history": [float(f"{value:.4g}") for value in solution.history],
        "objective": [float(f"{value:.4g}") for value in solution.objective],
        "seconds": round(solution.seconds, 4),
    }


def matrix_elements(spec: BlockSpec, models: int, *, outputs: bool) -> int:
    """Elements of the square factors of a tensor, of all models: in^2, and out^2 if `outputs`."""
    if len(spec.shape) < 2:
        return models * spec.numel * spec.numel
    rows, columns = spec.shape[0], math.prod(spec.shape[1:])
    return models * (columns * columns + (rows * rows if outputs else 0))
