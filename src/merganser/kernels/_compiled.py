"""Whether loops compiled by Numba are used: only where it is installed, and where the work is worth their start-up."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from merganser._torch import torch

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["accelerate", "loops"]

_SETTINGS = ".numba_config.yaml"
"""A file in the current directory that Numba would obey; it may come from a stranger, with a cache of code."""

_lock = threading.Lock()
_found: list[ModuleType] = []


def accelerate() -> bool:
    """Use compiled loops from now on in this process, if Numba works here. No result changes by that.

    Numba is not imported where the current directory holds settings for it.

    Returns:
        Whether they are used.
    """
    with _lock:
        if not _found:
            if "numba" not in sys.modules and Path(_SETTINGS).exists():
                return False
            try:
                from merganser.kernels import _loops
            except (ImportError, RuntimeError):  # not installed, not made for this numpy, or nowhere to keep its code
                return False
            _found.append(_loops)
    return True


def loops(*tensors: torch.Tensor, dtype: torch.dtype | None = None) -> ModuleType | None:
    """The compiled loops, if they are used and can take these tensors: contiguous, on the CPU.

    Args:
        tensors: what they would read and write.
        dtype: of all tensors; float32 if None.
    """
    if not _found:
        return None
    wanted = torch.float32 if dtype is None else dtype
    for tensor in tensors:
        if not (tensor.is_cpu and tensor.dtype == wanted and tensor.is_contiguous()):
            return None
    return _found[0]
