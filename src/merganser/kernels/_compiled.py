"""Whether loops compiled by Numba are used: only where it is installed, and where the work is worth their start-up."""

from __future__ import annotations

import importlib.util
import threading
from typing import TYPE_CHECKING

from merganser._torch import torch

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["accelerate", "loops"]

_lock = threading.Lock()
_found: list[ModuleType] = []


def accelerate() -> bool:
    """Use compiled loops from now on in this process, if Numba is installed. No result changes by that.

    Returns:
        Whether they are used.
    """
    with _lock:
        if not _found and importlib.util.find_spec("numba") is not None:
            from merganser.kernels import _loops

            _found.append(_loops)
    return bool(_found)


def loops(*tensors: torch.Tensor) -> ModuleType | None:
    """The compiled loops, if they are used and can take these tensors: contiguous, of 32 bits at most, on the CPU."""
    if not _found:
        return None
    for tensor in tensors:
        if not (tensor.is_cpu and tensor.element_size() <= 4 and tensor.is_contiguous()):
            return None
    return _found[0]
