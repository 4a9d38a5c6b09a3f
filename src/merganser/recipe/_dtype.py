"""The types that merged weights may have."""

from __future__ import annotations

from merganser._torch import torch
from merganser.errors import Place, RecipeError, suggestion

__all__ = ["parse_dtype"]

_FLOAT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "float64": "f64"}


def parse_dtype(name: str | torch.dtype | None, place: Place | None = None) -> torch.dtype | None:
    """The torch type of a name such as ``bfloat16``, ``bf16`` or ``torch.bfloat16``.

    Raises:
        RecipeError: E0311, unknown or not floating-point.
    """
    if name is None:
        return None
    text = str(name).removeprefix("torch.")
    text = {short: long for long, short in _FLOAT_TYPES.items()}.get(text, text)
    if text not in _FLOAT_TYPES:
        raise RecipeError(
            "E0311",
            f"`{name}` is not a type for merged weights",
            places=place or Place(key="dtype"),
            fix=suggestion(text, _FLOAT_TYPES),
        )
    value: torch.dtype = getattr(torch, text)
    return value
