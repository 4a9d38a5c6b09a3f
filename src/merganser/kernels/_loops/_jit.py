"""How loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending

__all__ = ["Array", "compiled", "float32_pointer", "uint16_pointer", "vector_at"]

F = TypeVar("F", bound=Callable[..., Any])
Array = Any

_numba: Any = numba
vector_at = _numba.carray
"""An array from a pointer, a shape and a type, in compiled code."""


def compiled(function: F) -> F:
    """A function that Numba compiles when it is first called, or that was compiled and kept earlier."""
    return cast(F, _numba.njit(nogil=True, cache=True, error_model="numpy")(function))


def _intrinsic(function: Callable[..., Any]) -> Callable[[int], Any]:
    return cast("Callable[[int], Any]", _numba.extending.intrinsic(function))


def _pointer(element: str) -> Callable[[Any, Any], Any]:
    def of(context: Any, address: Any) -> Any:
        pointer = _numba.types.CPointer(getattr(_numba.types, element))

        def generate(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], ctx.get_value_type(signature.return_type))

        return pointer(address), generate

    return of


float32_pointer = _intrinsic(_pointer("float32"))
"""The address of float32 elements as a pointer, in compiled code."""

uint16_pointer = _intrinsic(_pointer("uint16"))
"""The same of 16-bit elements."""
