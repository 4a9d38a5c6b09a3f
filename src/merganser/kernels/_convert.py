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
    fast = loops(out, *([] if minus is None else [minus]))
    if fast is not None and loops(values, dtype=torch.bfloat16) is not None:
        raw = values.view(torch.uint16).numpy()
        return bool(fast.widen(raw, out.numpy()) if minus is None else fast.widen_less(raw, minus.numpy(), out.numpy()))
    fast = loops(values) if minus is None else None
    narrowing = fast is not None and loops(out, dtype=torch.bfloat16) is not None
    if fast is not None and narrowing and fast.narrow(values.numpy(), out.view(torch.uint16).numpy()):
        return True
    if values is not out:
        out.copy_(values)
    finite = not out.is_floating_point() or not count_nonfinite(out)
    if minus is not None:
        out.sub_(minus)
    return finite
