"""How loops are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numba.extending

__all__ = ["Array", "compiled", "float32_pointer", "vector_at"]

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


@_intrinsic
def float32_pointer(context: Any, address: Any) -> Any:
    """The address of float32 elements as a pointer, in compiled code."""
    pointer = _numba.types.CPointer(_numba.types.float32)

    def generate(ctx: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ctx.get_value_type(signature.return_type))

    return pointer(address), generate
