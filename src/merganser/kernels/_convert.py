"""Elements of one type made those of another, and whether they are finite."""

from __future__ import annotations

from merganser._torch import torch
from merganser.kernels._arithmetic import count_nonfinite
from merganser.kernels._compiled import loops

__all__ = ["convert"]


def convert(values: torch.Tensor, out: torch.Tensor, minus: torch.Tensor | None = None) -> bool:
    """``out = values - minus``, with `values` first rounded to the type of `out`; in place if both are one tensor.

    Returns:
        Whether all values are finite in that type.
    """
    if values is not out and (fast := loops(values, out)) is not None:
        if values.dtype == torch.bfloat16 and out.dtype == torch.float32:
            raw = values.view(torch.uint16).numpy()
            if minus is None:
                return bool(fast.widen(raw, out.numpy()))
            if minus.is_contiguous():
                return bool(fast.widen_less(raw, minus.numpy(), out.numpy()))
        narrowing = values.dtype == torch.float32 and out.dtype == torch.bfloat16 and minus is None
        if narrowing and fast.narrow(values.numpy(), out.view(torch.uint16).numpy()):
            return True
    if values is not out:
        out.copy_(values)
    finite = not out.is_floating_point() or not count_nonfinite(out)
    if minus is not None:
        out.sub_(minus)
    return finite
