"""Counting floating-point operations: of products of matrices, factorisations, and elementwise arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ["FlopCounter"]

_CUBIC = {
    "linalg_cholesky_ex": 1 / 3,
    "linalg_eigh": 9.0,
    "_linalg_eigh": 9.0,
    "_linalg_svd": 14.0,
    "linalg_qr": 4 / 3,
    "linalg_lu_factor_ex": 2 / 3,
    "linalg_inv_ex": 2.0,
    "_linalg_solve_ex": 2 / 3,
}
"""Operations per ``n m min(n, m)`` of an n x m matrix (Golub and Van Loan, Matrix computations)."""

_TRIANGULAR = ("linalg_solve_triangular", "cholesky_solve", "triangular_solve")


class FlopCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what torch computes in the thread of its ``with`` block; `total` afterwards.

    A multiplication and an addition are two operations. Elementwise functions count one per element of their result,
    reductions one per element of their input; copies count nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation and count it."""
        out = func(*args, **(kwargs or {}))
        self.total += int(_count(func, args, kwargs or {}, out))
        return out


def _count(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=out))
    name = packet.__name__
    first = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if first is None or not first.is_floating_point():
        return 0
    if name in _CUBIC and first.dim() >= 2:
        rows, columns = first.shape[-2:]
        return _CUBIC[name] * (first.numel() // max(1, rows * columns)) * rows * columns * min(rows, columns)
    if name in _TRIANGULAR:
        other = next((a for a in args[1:] if isinstance(a, torch.Tensor)), first)
        return 2.0 * first.numel() * min(first.shape[-1], other.shape[-1])
    if torch.Tag.pointwise in func.tags and isinstance(out, torch.Tensor):
        return out.numel() if "copy" not in name and "clone" not in name else 0
    if name in ("sum", "mean", "dot", "vdot", "linalg_vector_norm", "var", "prod"):
        return first.numel() * (2 if name != "sum" else 1)
    return 0
