"""torch, imported at its first use.

Modules of this package write ``from merganser._torch import torch``; the attribute that is asked for first brings the
real module in. Commands that only talk about methods, recipes or errors (``--help``, ``methods``, ``explain``)
therefore start without paying for torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["torch"]

if TYPE_CHECKING:
    import torch as torch
else:

    class _Torch:
        """Stands for the module until an attribute is asked for, and keeps what was found."""

        def __getattr__(self, name: str) -> Any:
            import torch

            value = getattr(torch, name)
            setattr(self, name, value)
            return value

    torch = _Torch()
