"""What kind of thing the arguments of `merge` are, before anything is done with them."""

from __future__ import annotations

import operator
import os
from typing import Any

from merganser.errors import Place, UsageError

__all__ = ["check_arguments"]


def check_arguments(
    *, weights: Any, statistics: Any, seed: Any, out: Any, evaluator: Any, max_memory: Any, data: Any
) -> None:
    """Refuse arguments of a wrong kind.

    Raises:
        UsageError: E0201, naming the argument and what it may be.
    """
    if not _is_list(weights):
        raise _wrong("weights", weights, "a list with one number per model")
    for name, value in (("statistics", statistics), ("data", data)):
        if not _is_list(value):
            raise _wrong(name, value, "a list with one entry per model")
    if weights is not None and any(weight is None for weight in weights):
        raise _wrong("weights", weights, "a list with one number per model")
    if not _is_whole(seed) or operator.index(seed) < 0:
        raise _wrong("seed", seed, "a whole number from 0 on")
    if out is not None and (not isinstance(out, str | os.PathLike) or not os.fspath(out)):
        raise _wrong("out", out, "the path of a folder, or a name that ends in .safetensors")
    if evaluator is not None and not callable(evaluator):
        raise _wrong("evaluator", evaluator, "a function of a merged state dict that returns a number")
    if max_memory is not None and (not _is_whole(max_memory) or operator.index(max_memory) <= 0):
        raise _wrong("max_memory", max_memory, "a number of bytes, such as 1_000_000_000")


def _is_list(value: Any) -> bool:
    """Whether it is None or has entries in an order."""
    return value is None or (
        hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, str | bytes | dict)
    )


def _is_whole(value: Any) -> bool:
    return not isinstance(value, bool) and hasattr(value, "__index__")


def _wrong(name: str, value: Any, wanted: str) -> UsageError:
    shown = repr(value) if len(repr(value)) < 60 else f"of type {type(value).__name__}"
    return UsageError("E0201", f"`{name}` is {wanted}, not {shown}", places=Place(key=name))
