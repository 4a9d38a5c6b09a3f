"""Products that accumulate into an existing tensor."""

from __future__ import annotations

from merganser._torch import torch

__all__ = ["flat_product", "product"]


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, add: bool) -> None:
    """``out = a b`` or ``out += a b``, over the last two dimensions.

    Nothing is allocated where all three have two dimensions, or all three have three. O(m k n) per product.
    """
    beta = 1 if add else 0
    if a.dim() == b.dim() == out.dim() == 2:
        torch.addmm(out, a, b, beta=beta, out=out)
    elif a.dim() == b.dim() == out.dim() == 3:
        torch.baddbmm(out, a, b, beta=beta, out=out)
    elif add:
        out.add_(torch.matmul(a, b))
    else:
        torch.matmul(a, b, out=out)


def flat_product(
    x: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor, *, width: int, add: bool, stacked: bool
) -> None:
    """``out = x matrix`` or ``out += x matrix`` on blocks flattened to rows.

    Args:
        x: ``[..., *shape]`` with `width` elements in a block, contiguous.
        matrix: ``[width, m]``, or ``[n, width, m]`` if stacked.
        out: ``[..., *shape]`` with m elements in a block, contiguous.
        width: elements of a block of `x`.
        add: whether to add to `out`.
        stacked: whether each block has its own matrix.
    """
    lead = (matrix.shape[0], -1) if stacked else (-1,)
    product(x.view(*lead, width), matrix, out.view(*lead, matrix.shape[-1]), add=add)
